"""Gradient diagnostics: scores against autograd, and estimates against exact variances."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from rlsys.algorithms.gradient_variance import (
    BASELINES,
    gradient_diagnostics,
    plain_weights,
    response_moments,
)
from rlsys.data.packing import pack_rows
from rlsys.metrics import values
from rlsys.models import resolve_model
from rlsys.models.loading import UnsupportedModelError, load_causal_lm
from tests.support.architectures import Architecture, tiny_model
from tests.support.enumerable_policy import ResponseSpace
from tests.support.rollout_examples import random_rollouts, train_batch
from workers.training.gradient_diagnostics import (
    check_diagnosable,
    gradient_metrics,
    last_down_projection,
)
from workers.training.lora import freeze
from workers.training.packed_attention import register_packed_attention
from workers.training.packed_model import PackedCausalLM, PackTensors

CPU = torch.device("cpu")


@pytest.fixture
def one_rank(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def tiny() -> Any:  # a PackedCausalLM
    kernel = register_packed_attention("sdpa")
    return PackedCausalLM(
        load_causal_lm(resolve_model("tiny"), dtype=torch.float32, attention=kernel), chunk_tokens=7
    )


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("budget", [40, 1000])
def test_the_same_as_a_gradient_for_each_token(tiny: Any, budget: int):
    """The reference is one backward pass per token; near-orthogonal directions are included."""
    batch = train_batch(random_rollouts(1, groups=3, samples=4))
    near = np.where(batch.rollouts.response_mask, -5.7, 0).astype(
        np.float32
    )  # so that ratios are of order 1
    batch = replace(batch, rollouts=replace(batch.rollouts, rollout_logprobs=near))

    def plan(rows: np.ndarray) -> list:
        return pack_rows(
            batch.rollouts.sequences,
            rows,
            budget=budget,
            rank=0,
            ranks=1,
            shared_prefix_packing=False,
        )

    got = values(gradient_metrics(tiny, batch, np.arange(12), plan, CPU))

    weight = last_down_projection(tiny).weight
    groups = []
    for rows in np.split(np.arange(12), 3):
        gradients, same, proxy = torch.zeros(4, 4, weight.numel()), torch.zeros(4), torch.zeros(4)
        (pack,) = pack_rows(
            batch.rollouts.sequences,
            rows,
            budget=10**6,
            rank=0,
            ranks=1,
            shared_prefix_packing=True,
        )
        result = tiny(PackTensors.of(pack, CPU))
        scores = torch.stack(
            [
                torch.autograd.grad([one], [weight], retain_graph=True)[0].flatten()
                for one in result.logprobs
            ]
        )
        rewards = torch.from_numpy(batch.rewards.rewards[rows]).double()
        log_ratios = result.logprobs.detach() - torch.from_numpy(near[pack.flat_positions])
        ratios = torch.stack([log_ratios[pack.response_index == i].sum().exp() for i in range(4)])
        for i in range(4):
            own = np.flatnonzero(pack.response_index == i)
            others = (rewards.sum() - rewards[i]) / 3
            used = torch.from_numpy(batch.advantages[pack.flat_positions[own]])
            for k, baseline in enumerate((torch.tensor(0.0), rewards.mean(), others)):
                gradients[k, i] = ratios[i] * (rewards[i] - baseline) * scores[own].sum(0)
                same[k] += (
                    (ratios[i] * (rewards[i] - baseline)) ** 2 * scores[own].square().sum(1)
                ).sum()
                proxy[k] += (
                    (ratios[i] * (rewards[i] - baseline)) ** 2 * result.squared_score_norms[own]
                ).sum()
            gradients[3, i] = (used[:, None] * scores[own]).sum(0)
            same[3] += (used**2 * scores[own].square().sum(1)).sum()
            proxy[3] += (used**2 * result.squared_score_norms[own]).sum()
        variance = 4 * gradients.var(dim=1).sum(1)  # torch's has G - 1
        groups.append(torch.stack([variance, gradients.square().sum((1, 2)), same, proxy]))
    expected = gradient_diagnostics(groups)
    assert got.keys() == {f"gradient/{name}" for name in expected}
    for name, value in expected.items():
        assert got[f"gradient/{name}"] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert (
        got["gradient/variance_ratio/leave_one_out"]
        == got["gradient/proxy_ratio/leave_one_out"]
        == 1
    )
    assert abs(got["gradient/cross_position_fraction/used"]) > 1e-3


def test_the_estimate_is_the_exact_variance_of_a_listed_policy():
    """Ratios and cross-position fraction are within 5 % of the exact ones.

    They are of sampled groups of 6 of a policy whose positions share parameters, with a drifted
    sampler.
    """
    space = ResponseSpace.of(3, 4, context="previous_token")
    generator = torch.Generator().manual_seed(0)
    old = space.random_logits(generator)
    rollout = old + 0.3 * space.random_logits(generator)
    reward = torch.randn(len(space.tokens), generator=generator, dtype=torch.float64)
    scores, chance = space.scores(old), space.probabilities(rollout)
    ratio = (space.logprobs(old) - space.logprobs(rollout)).sum(1).exp()

    def exact(baseline: float) -> tuple[float, float]:
        g = (ratio * (reward - baseline))[:, None] * scores.sum(1)
        mean, second = chance @ g, chance @ g.square().sum(1)
        same = chance @ ((ratio * (reward - baseline)) ** 2 * scores.square().sum((1, 2)))
        return float(second - mean.square().sum()), float(1 - same / second)

    groups = []
    for _ in range(3000):
        drawn = torch.multinomial(chance, 6, replacement=True, generator=generator)
        fixed = ratio[drawn] * (
            reward[drawn] - 0.7
        )  # stands for the weights in use: a constant baseline
        weights = torch.cat([plain_weights(reward[drawn], ratio[drawn]), fixed[None]])
        parts = [
            # A table of logits is not a linear map of inputs: its score vectors are used as outward
            # factors of an input of 1.
            response_moments(
                weights[:, i, None].expand(-1, 4),
                scores[r],
                torch.ones(4, 1, dtype=torch.float64),
                torch.ones(4),
            )
            for i, r in enumerate(drawn)
        ]
        groups.append(sum(parts[1:], start=parts[0]).spread(6))
    got = gradient_diagnostics(groups)
    variance, fraction = exact(0.0)
    at_fixed, fraction_at_fixed = exact(0.7)
    assert got["variance_ratio/none"] / got["variance_ratio/used"] == pytest.approx(
        variance / at_fixed, rel=0.05
    )
    assert got["cross_position_fraction/none"] == pytest.approx(fraction, abs=0.05)
    assert got["cross_position_fraction/used"] == pytest.approx(fraction_at_fixed, abs=0.05)


def test_groups_without_anything_to_compare_are_silent():
    assert gradient_diagnostics([]) == {}
    assert gradient_diagnostics([torch.zeros(4, len(BASELINES))]) == {}


@pytest.mark.parametrize("model_type", ["gpt2", "phi"])
def test_a_model_without_that_projection_is_refused(model_type: str):
    other = PackedCausalLM(tiny_model(Architecture(model_type=model_type)), chunk_tokens=1)
    with pytest.raises(
        UnsupportedModelError,
        match=r"diagnostics\.gradient: the last layer .* has no mlp\.down_proj",
    ):
        check_diagnosable(other)


def test_a_model_that_runs_padded_is_refused():
    llama = tiny_model(Architecture(model_type="llama"))
    padded = PackedCausalLM(llama, chunk_tokens=1, packing=False)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM runs padded"):
        check_diagnosable(padded)


def test_a_projection_that_is_frozen_is_refused():
    llama = tiny_model(Architecture(model_type="llama"))
    freeze(llama, ["model.layers.*"], field="policy.frozen")
    with pytest.raises(UnsupportedModelError, match=r"diagnostics\.gradient: .* policy\.frozen"):
        check_diagnosable(PackedCausalLM(llama, chunk_tokens=1))
