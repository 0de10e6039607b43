"""Clip-Cov and KL-Cov: which tokens are chosen, and what becomes of them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from rlsys.algorithms.policy_objectives import (
    BatchTokens,
    PolicyObjectiveInputs,
    batch_parameters_of,
    check_objective,
    policy_objective,
)
from rlsys.algorithms.policy_objectives.covariance import covariances

# log pi -1, -2, -3, -6 (mean -3), A 2, 0, -1, 3 (mean 1): covariances 2, -1, 0, -6
LOGPROBS = torch.tensor([-1.0, -2.0, -3.0, -6.0], dtype=torch.float64)
ADVANTAGES = torch.tensor([2.0, 0.0, -1.0, 3.0], dtype=torch.float64)


def tokens(seed: int = 0, **more: Tensor) -> BatchTokens:
    made = BatchTokens(
        log_ratios=torch.zeros(4, dtype=torch.float64),
        logprobs=LOGPROBS,
        advantages=ADVANTAGES,
        positions=torch.tensor([3, 7, 8, 20]),
        seed=seed,
    )
    return made._replace(**more)


def choice(weight: str, made: BatchTokens, **parameters: object) -> list[int]:
    statistic = batch_parameters_of(weight)
    assert statistic is not None
    return statistic(made, **parameters)["selected"].tolist()


def random_tokens(count: int, seed: int) -> BatchTokens:
    generator = torch.Generator().manual_seed(seed)
    return BatchTokens(
        log_ratios=0.3 * torch.randn(count, generator=generator, dtype=torch.float64),
        logprobs=-4 * torch.rand(count, generator=generator, dtype=torch.float64),
        advantages=torch.randn(count, generator=generator, dtype=torch.float64),
        positions=torch.arange(count) * 3 + 1,
    )


def test_covariances_golden():
    assert covariances(tokens()).tolist() == [2.0, -1.0, 0.0, -6.0]


def test_kl_cov_chooses_the_largest_and_at_least_one():
    assert choice("kl_cov", tokens()) == [3]
    assert choice("kl_cov", tokens(), fraction=0.5) == [3, 8]
    assert choice("kl_cov", tokens(), fraction=1.0) == [3, 8, 7, 20]
    # all equal: the first ones
    equal = tokens(logprobs=torch.zeros(4, dtype=torch.float64))
    assert choice("kl_cov", equal, fraction=0.5) == [3, 7]


def test_clip_cov_chooses_at_random_among_those_in_the_range():
    made = random_tokens(2000, 0)
    covariance = covariances(made)
    inside = made.positions[(covariance > 0.5) & (covariance < 2.0)]  # type: ignore[index]
    wide = {"lowest": 0.5, "highest": 2.0, "clip_low": 1.0, "clip_high": 1e9}
    chosen = choice("clip_cov", made, fraction=0.01, **wide)
    assert len(chosen) == len(set(chosen)) == 20
    assert set(chosen) <= set(inside.tolist())
    # the same with the same seed, another one with another, all where there are fewer
    assert choice("clip_cov", made, fraction=0.01, **wide) == chosen
    assert choice("clip_cov", made._replace(seed=1), fraction=0.01, **wide) != chosen
    assert set(choice("clip_cov", made, fraction=1.0, **wide)) == set(inside.tolist())
    assert choice("clip_cov", made, fraction=0.01, lowest=1e6, highest=1e7) == []


def test_every_candidate_of_clip_cov_is_as_likely():
    """200 seeds, one of 40 candidates each: each is chosen 5 times, sd 2.2; none above 17."""
    made = random_tokens(400, 1)
    parameters = {"fraction": 1e-9, "lowest": 1.2, "highest": 1.6, "clip_high": 1e9}
    everything = choice("clip_cov", made, **parameters | {"fraction": 1.0})
    counts = dict.fromkeys(everything, 0)
    for seed in range(5 * len(everything)):
        (one,) = choice("clip_cov", made._replace(seed=seed), **parameters)
        counts[one] += 1
    assert max(counts.values()) < 18
    assert sum(count == 0 for count in counts.values()) <= 4


def test_clip_cov_leaves_out_the_tokens_that_ppo_clips():
    """The only token in the range has A > 0 and a ratio above the width."""
    above = tokens(log_ratios=torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    assert choice("clip_cov", above, clip_high=2.0) == [3]
    assert choice("clip_cov", above, clip_high=1.0) == []


def objective(weight: str, ratios: list[float], **parameters: object) -> tuple[Tensor, Tensor]:
    """Return token losses and gradient of the four tokens, in a response each."""
    live = LOGPROBS[:, None].clone().requires_grad_()
    made = PolicyObjectiveInputs(
        logprobs=live,
        old_logprobs=LOGPROBS[:, None] - torch.tensor(ratios, dtype=torch.float64)[:, None].log(),
        advantages=ADVANTAGES[:, None],
        response_mask=torch.ones(4, 1, dtype=torch.bool),
    )
    losses = policy_objective(made, ratio="token", weight=weight, **parameters).token_losses
    losses.sum().backward()
    assert live.grad is not None
    return losses[:, 0].detach(), live.grad[:, 0]


def test_kl_cov_golden():
    # tokens 0 and 2 are chosen: loss -rho A + |log rho|, gradient -rho A + sign(log rho)
    losses, gradient = objective("kl_cov", [2.0, 1.5, 0.5, 1.0], fraction=0.5)
    assert losses.tolist() == pytest.approx([-4 + math.log(2), 0.0, 0.5 + math.log(2), -3.0])
    assert gradient.tolist() == pytest.approx([-4 + 1, 0.0, 0.5 - 1, -3.0])
    # at ratio 1 the penalty has no gradient
    _, gradient = objective("kl_cov", [1.0] * 4, fraction=1.0)
    assert gradient.tolist() == pytest.approx((-ADVANTAGES).tolist())


def test_clip_cov_golden():
    # token 0 (covariance 2) is in (1, 5): no gradient and no loss; the others are ppo_clip
    losses, gradient = objective("clip_cov", [1.1, 1.5, 0.5, 3.0])
    assert losses.tolist() == pytest.approx([0.0, 0.0, 0.5, -6.0])
    assert gradient.tolist() == pytest.approx([0.0, 0.0, 0.5, 0.0])
    losses, gradient = objective("clip_cov", [1.1, 1.5, 0.5, 3.0], lowest=3.0)
    assert gradient.tolist() == pytest.approx([-2.2, 0.0, 0.5, 0.0])


@pytest.mark.parametrize("weight", ["clip_cov", "kl_cov"])
def test_packs_of_a_mini_batch_with_the_choice_of_the_whole_are_the_whole(weight: str):
    generator = torch.Generator().manual_seed(3)
    live = -4 * torch.rand(6, 5, generator=generator, dtype=torch.float64)
    mask = torch.arange(5)[None, :] < torch.tensor([5, 2, 4, 1, 3, 5])[:, None]
    whole = PolicyObjectiveInputs(
        logprobs=live,
        old_logprobs=live - 0.2 * torch.randn(6, 5, generator=generator, dtype=torch.float64),
        advantages=torch.randn(6, 1, generator=generator, dtype=torch.float64).expand(6, 5),
        response_mask=mask,
        positions=torch.arange(100, 130).reshape(6, 5),
    )
    parameters = {"fraction": 0.2} | ({"lowest": 0.1} if weight == "clip_cov" else {})
    wanted = policy_objective(whole, ratio="token", weight=weight, **parameters).token_losses
    plain = policy_objective(
        whole, ratio="token", weight=weight, **parameters, selected=torch.zeros(0, dtype=torch.long)
    ).token_losses
    assert 0 < int((wanted != plain).sum()) <= 4  # 20 % of 20 tokens

    selected = (wanted != plain) & mask
    positions = torch.arange(100, 130).reshape(6, 5)[selected]
    for rows in ([4, 0], [1], [5, 2, 3]):
        part = {field.name: getattr(whole, field.name)[rows] for field in dataclasses.fields(whole)}
        found = policy_objective(
            PolicyObjectiveInputs(**part),
            ratio="token",
            weight=weight,
            **parameters,
            selected=positions,
        ).token_losses
        assert torch.equal(found, wanted[rows])


@pytest.mark.parametrize(
    ("weight", "parameters", "message"),
    [
        ("kl_cov", {"fraction": 0.0}, r"fraction: 0.0 is outside \(0, 1\]"),
        ("kl_cov", {"coefficient": -1.0}, r"coefficient: -1.0 is outside"),
        ("kl_cov", {"selected": [1]}, r"selected: \[1\] cannot be set, since the trainer"),
        ("clip_cov", {"fraction": 2.0}, r"fraction: 2.0 is outside \(0, 1\]"),
        ("clip_cov", {"lowest": 5.0}, r"lowest: 5 is not below highest 5"),
        ("clip_cov", {"clip_low": 2.0}, r"clip_low: 2.0 is outside \[0, 1\]"),
    ],
)
def test_refusals(weight: str, parameters: dict, message: str):
    with pytest.raises(ValueError, match=rf"^algorithm\.objective\.parameters\.{message}"):
        check_objective("token", weight, parameters)
