"""The hierarchical estimator: unbiased by enumeration, its fits against refitting, its promises."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlsys.algorithms.advantages import (
    AdvantageInputs,
    hierarchical_advantages,
    rloo_advantages,
    run_estimator,
)
from rlsys.algorithms.advantages.grouping import others_mean
from rlsys.algorithms.advantages.hierarchical.grouped_batch import GroupedBatch
from rlsys.algorithms.advantages.hierarchical.horizons import Horizons
from rlsys.algorithms.advantages.hierarchical.shrinkage import (
    weighted_baseline,
)
from tests.support.enumerable_policy import Enumerated
from tests.support.hierarchical_examples import HORIZONS, LearnedPrompt, joined


def expectation(made: Enumerated, size: int, **parameters: Any) -> Tensor:
    """Return [P] the exact expectation of the gradient estimated from one group of `size`.

    It is a sum over every possible group, with its probability.
    """
    number = len(made.space.tokens)
    total = torch.zeros_like(made.gradient)
    for group in itertools.combinations_with_replacement(range(number), size):
        indices = torch.tensor(group)
        drawn = made.space.inputs(
            indices, made.rewards, made.rollout, made.old, torch.zeros(size, dtype=torch.int64)
        )
        weight = hierarchical_advantages(drawn, diagnostics=False, **parameters).advantages.double()
        counts = torch.bincount(indices, minlength=number)
        orders = torch.exp(
            torch.lgamma(torch.tensor(size + 1.0)) - torch.lgamma(counts + 1.0).sum()
        ).round()
        chance = orders * made.probability[indices].prod()
        total += chance * torch.einsum("gt,gtp->p", weight, made.scores[indices]) / size
    return total


@pytest.mark.parametrize("horizons", HORIZONS)
def test_unbiased_over_every_group_that_can_be_drawn(horizons: str):
    """With default settings no coefficient of a response depends on the response itself."""
    made = Enumerated(4, end_token=True, size=(2, 3))
    exact = expectation(made, 4, horizons=horizons, block_size=2, max_tokens=3)
    assert (
        exact - made.gradient
    ).abs().max() < 2e-7 * made.gradient.abs().max()  # advantages are float32


def test_unbiased_with_a_weighted_baseline():
    """Groups of 8 are enough for a significant correlation of reward and weight."""
    made = Enumerated(4, end_token=True, size=(2, 2))
    made.rewards = (made.ratios[:, -1].square() * made.scores.square().sum((1, 2))).log()
    drawn = grouped(torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]]), made)
    assert (weighted_baseline(drawn) - drawn.baseline).abs().min() > 1e-3
    made.gradient = made.space.gradient(made.old, made.rewards)
    exact = expectation(made, 8)
    assert (exact - made.gradient).abs().max() < 2e-7 * made.gradient.abs().max()


def grouped(indices: Tensor, made: Enumerated) -> GroupedBatch:
    """[K, G] listed responses as a batch."""
    ratios, rewards = made.ratios[indices], made.rewards[indices]
    present = torch.ones_like(rewards, dtype=torch.bool)
    horizons = Horizons.of("final", ratios.shape[2], 1)
    norms = made.scores.square().sum(2)[indices]
    mass = torch.stack([norms.sum(2), made.space.mask[indices].sum(2)], dim=-1)
    return GroupedBatch(
        ratios, rewards, others_mean(rewards, present), present, norms, mass, horizons
    )


def test_clipping_log_ratios_is_biased_as_documented():
    made = Enumerated(4, end_token=True, size=(2, 3))
    error = expectation(made, 3, log_ratio_clip=0.3) - made.gradient
    assert error.abs().max() > 1e-3 * made.gradient.abs().max()


@pytest.mark.parametrize("scope", ["auto", "group", "batch"])
@pytest.mark.parametrize("groups", [1, 2, 12])
def test_no_coefficient_has_seen_its_response(groups: int, scope: str):
    """beta = (base - weight) / rho_{<=L} for the final horizon does not depend on the response.

    Its reward, ratios and squared score norms are changed.
    """
    made = Enumerated(5, size=(3, 4))
    before = made.drawn(groups, 12)
    after = replace(
        before,
        **{
            name: getattr(before, name).clone()
            for name in ("rewards", "rollout_logprobs", "squared_score_norms")
        },
    )
    i = 7
    after.rewards[i] = 4.0
    after.rollout_logprobs[i, 1] -= 0.9  # type: ignore[index]
    after.squared_score_norms[i] *= 30.0  # type: ignore[index]

    def coefficients(batch: AdvantageInputs) -> Tensor:
        assert batch.old_logprobs is not None
        assert batch.rollout_logprobs is not None
        out = hierarchical_advantages(batch, horizons="final", scope=scope, diagnostics=False)
        weight = out.advantages[i].double()
        ratio = (batch.old_logprobs - batch.rollout_logprobs)[i].sum().exp()
        others = torch.cat([batch.rewards[:i], batch.rewards[i + 1 : 12]]).mean()
        return batch.rewards[i] - others - weight / ratio

    assert torch.allclose(coefficients(before), coefficients(after), atol=1e-6)
    if (scope, groups) in (("auto", 12), ("group", 1)):
        assert coefficients(before).abs().max() > 1e-3  # and there is a correction to speak of


@pytest.mark.parametrize("scope", ["auto", "group", "batch"])
@pytest.mark.parametrize("horizons", HORIZONS)
def test_on_policy_it_is_leave_one_out(horizons: str, scope: str):
    made = Enumerated(6, end_token=True)
    drawn = made.space.inputs(
        torch.randint(0, len(made.rewards), (48,), generator=made.generator),
        made.rewards,
        made.old,
        made.old,
        torch.arange(48) // 8,
    )
    out = hierarchical_advantages(drawn, horizons=horizons, scope=scope, block_size=2).advantages
    assert torch.allclose(out, rloo_advantages(drawn).advantages, atol=1e-6, rtol=1e-6)


def test_equal_rewards_and_groups_of_one_get_exactly_zero():
    made = Enumerated(7)
    drawn = made.drawn(6, 5)
    rewards = drawn.rewards.clone()
    rewards[5:10] = 0.1
    ids = drawn.group_ids.clone()
    ids[-1] = 99
    out = hierarchical_advantages(replace(drawn, rewards=rewards, group_ids=ids)).advantages
    assert (out[5:10] == 0).all()
    assert (out[-1] == 0).all()
    assert (out[:5] != 0).any()


def test_padding_tool_tokens_and_order():
    made = Enumerated(11, end_token=True, size=(3, 5))
    drawn = made.drawn(5, 6)
    mask = drawn.response_mask.clone()
    mask[::3, 1] = False  # a tool wrote these: whatever the log-probabilities there say
    drawn = replace(drawn, response_mask=mask)
    out = hierarchical_advantages(drawn).advantages
    assert out.dtype == torch.float64
    assert (out[~mask] == 0).all()
    assert drawn.old_logprobs is not None
    junk = torch.where(mask, drawn.old_logprobs, torch.nan)
    with_junk = replace(drawn, old_logprobs=junk)
    assert torch.equal(hierarchical_advantages(with_junk).advantages, out)

    order = torch.randperm(6, generator=made.generator) + 6 * torch.arange(5)[:, None]
    moved = {
        name: getattr(drawn, name)[order.flatten()]
        for name in ("rewards", "group_ids", "response_mask", "squared_score_norms")
    }
    moved |= {
        name: getattr(drawn, name)[order.flatten()] for name in ("rollout_logprobs", "old_logprobs")
    }
    assert torch.allclose(
        hierarchical_advantages(AdvantageInputs(**moved)).advantages,
        out[order.flatten()],
        atol=1e-5,
    )


def test_scale_and_shift_of_the_rewards():
    drawn = Enumerated(12).drawn(6, 8)
    out = hierarchical_advantages(drawn).advantages
    assert torch.allclose(
        hierarchical_advantages(replace(drawn, rewards=drawn.rewards + 7)).advantages,
        out,
        atol=1e-5,
    )
    assert torch.allclose(
        hierarchical_advantages(replace(drawn, rewards=drawn.rewards * 3)).advantages,
        3 * out,
        atol=1e-5,
    )


def test_a_long_batch_is_finite_and_zero_drift_stays_zero():
    """With 2,000 tokens products of ratios up to 1e69 must not distort the small ones."""
    generator = torch.Generator().manual_seed(3)
    old = -torch.rand(24, 2000, generator=generator)
    noise = torch.randn(24, 2000, generator=generator) * 0.4
    drawn = AdvantageInputs(
        rewards=torch.randint(0, 2, (24,), generator=generator).float(),
        response_mask=torch.ones(24, 2000, dtype=torch.bool),
        group_ids=torch.arange(24) // 8,
        rollout_logprobs=old - noise,
        old_logprobs=old,
        squared_score_norms=torch.ones_like(old),
    )
    for horizons in ("final", "current_and_final", "blocks"):
        out = hierarchical_advantages(drawn, horizons=horizons)
        assert torch.isfinite(out.advantages).all()
        assert all(value == value for value in out.diagnostics.values())


def test_lower_variance_than_leave_one_out_and_no_bias_where_the_policy_has_learned():
    """The variance ratio to leave-one-out is about 0.6 (docs), and the bias is not significant.

    There are 120 batches of 16 prompts x 16 responses, with a sampler behind along the gradient.
    The bias of P = 192 parameters is a chi-squared of 192 degrees in units of its error: above 1.45
    per parameter with probability below 1e-4.
    """
    prompts = [LearnedPrompt(seed) for seed in range(16)]
    generator, errors = torch.Generator().manual_seed(1), []
    for _ in range(120):
        drawn = [p.draw(16, generator) for p in prompts]
        batch = joined(prompts, drawn)
        ratio = torch.stack(
            [p.ratios[d, -1] for p, d in zip(prompts, drawn, strict=True)]
        ).flatten()[:, None]
        both = torch.stack(
            [
                hierarchical_advantages(batch, diagnostics=False).advantages.double(),
                ratio * rloo_advantages(batch).advantages,
            ]
        )
        scores = torch.stack([p.scores[d] for p, d in zip(prompts, drawn, strict=True)])
        estimate = torch.einsum("mkgt,kgtp->mkp", both.reshape(2, 16, 16, -1), scores) / 16
        errors.append(estimate - torch.stack([p.gradient for p in prompts]))
    error = torch.stack(errors)  # [N, 2, K, P]
    ours, theirs = error.square().sum((0, 2, 3)).tolist()
    assert ours < 0.75 * theirs
    standardised = error[:, 0].mean(0) / (error[:, 0].std(0) / 120**0.5)
    assert float(standardised.square().mean()) < 1.45


def test_baseline_with_large_score_norms_of_wrong_responses():
    """Responses of which the policy is certain are right, so wrong ones have the large score norms.

    300 groups of 16, little drift; the best single baseline has 0.7 of the variance.
    """
    made = Enumerated(13, drift=0.1, scale=2.0)
    norms = made.scores.square().sum((1, 2))
    made.rewards = (norms < made.mean(norms)).double()
    made.gradient = made.space.gradient(made.old, made.rewards)
    drawn = torch.multinomial(
        made.probability, 300 * 16, replacement=True, generator=made.generator
    )
    batch = made.space.inputs(
        drawn, made.rewards, made.rollout, made.old, torch.arange(300).repeat_interleave(16)
    )

    def error(weights: Tensor) -> float:
        gradients = (
            torch.einsum("bt,btp->bp", weights.double(), made.scores[drawn])
            .unflatten(0, (300, 16))
            .mean(1)
        )
        return float((gradients - made.gradient).square().sum())

    plain = error(made.ratios[drawn, -1:] * rloo_advantages(batch).advantages)
    assert error(hierarchical_advantages(batch, diagnostics=False).advantages) < 0.7 * plain


@pytest.mark.parametrize(
    ("change", "parameters", "message"),
    [
        ({"rollout_logprobs": None}, {}, "needs rollout_logprobs.*The engine must return"),
        ({"old_logprobs": None}, {}, r"needs old_logprobs.*before the update"),
        ({"squared_score_norms": None}, {}, "needs squared_score_norms.*with old_logprobs"),
        ({"rewards": torch.full((8,), torch.nan)}, {}, "rewards: not all are finite"),
        (
            {"squared_score_norms": torch.full((8, 4), -1.0)},
            {},
            "squared_score_norms: values .* at least 0",
        ),
        (
            {"old_logprobs": torch.full((8, 4), torch.inf)},
            {},
            r"old_logprobs: \d+ values inside the response mask are not finite, first at \(0, 0\)",
        ),
        (
            {"old_logprobs": torch.full((8, 4), 60.0)},
            {},
            r"log-ratio of response 0 reaches .* set .*log_ratio_clip",
        ),
        ({}, {"horizons": "last"}, "parameters.horizons: 'last' is not one of final, current"),
        ({}, {"horizons": "blocks", "block_size": 0}, "block_size: 0 must be at least 1"),
        ({}, {"ridge": -1.0}, "ridge: -1.0 must be finite and at least 0"),
        ({}, {"scope": "world"}, "scope: 'world' is not one of auto, group, batch"),
        ({}, {"solver": "svd"}, "solver: 'svd' is not one of"),
        ({}, {"log_ratio_clip": 0.0}, "log_ratio_clip: 0.0 must be positive"),
    ],
)
def test_bad_input_says_what_to_do(
    change: dict[str, Any], parameters: dict[str, Any], message: str
):
    drawn = Enumerated(14).drawn(1, 8)
    with pytest.raises(ValueError, match=message):
        run_estimator("hierarchical", replace(drawn, **change), parameters)
