"""The loss of packs: KL terms of whole responses, and the penalty to the old policy."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch

from rlsys.algorithms.kl import KLLossTerms, kl_loss, old_policy_kl
from rlsys.config import (
    AlgorithmConfig,
    KLConfig,
    ObjectiveConfig,
    RolloutCorrectionConfig,
)
from rlsys.data.batches import TrainBatch
from rlsys.data.packing import pack_rows
from rlsys.data.padding import ResponsePadding
from tests.support.rollout_examples import rollouts, train_batch
from workers.training.losses import Denominators, PackColumns
from workers.training.packed_model import PackResult
from workers.training.policy_loss import PolicyLoss

KLS = {
    "tokens": KLConfig(coefficient=0.3),
    "tokens, prefix ratio": KLConfig(coefficient=0.3, importance_ratio="prefix"),
    "responses": KLConfig(coefficient=0.3, level="sequence", importance_ratio="product"),
}


def example() -> TrainBatch:
    """Return responses of lengths 2, 4, 1, 3, one with a tool's token in the middle."""
    responses = rollouts(
        [([9], [[1, 2], [1, 2, 3, 4]]), ([8, 8], [[5], [5, 6, 7]])], holes={1: [2]}
    )
    batch = train_batch(responses)
    noise = np.random.default_rng(3)
    count = len(responses.token_ids)

    def logprobs() -> np.ndarray:
        return np.where(responses.response_mask, -noise.random(count), 0.0).astype(np.float32)

    return dataclasses.replace(
        batch, old_logprobs=logprobs(), ref_logprobs=logprobs(), kl_coefficient=0.3
    )


def losses_of(
    batch: TrainBatch, live: torch.Tensor, algorithm: AlgorithmConfig, budget: int, penalty: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the total loss over packs, and the totals of their sums."""
    sizes = Denominators(num_tokens=9, num_sequences=4, max_tokens=4)
    compute_loss = PolicyLoss(batch=batch, algorithm=algorithm, old_kl_coefficient=penalty)
    packs = pack_rows(
        batch.rollouts.sequences,
        np.arange(4),
        budget=budget,
        rank=0,
        ranks=1,
        shared_prefix_packing=True,
    )

    total, sums = live.new_zeros(()), {}
    for pack in packs:
        logprobs = live[torch.from_numpy(pack.flat_positions)]
        zeros = torch.zeros_like(logprobs)
        result = PackResult(logprobs, zeros, zeros, zeros[:, None])
        part = compute_loss(result, PackColumns(pack, live.device), sizes)

        total = total + part.loss
        for name, value in part.sums.items():
            sums[name] = sums.get(name, 0.0) + value
    return total, sums


@pytest.mark.parametrize("budget", [4, 1000])
@pytest.mark.parametrize("name", KLS)
def test_kl_terms_do_not_depend_on_the_packing(name: str, budget: int):
    """Compare with -log pi A + 0.3 KL + 0.5 KL(old || live), summed over the padded batch."""
    batch = example()
    kl = KLS[name]
    algorithm = AlgorithmConfig(
        kl=kl, objective=ObjectiveConfig(weight="none"), aggregation="sequence_sum"
    )

    generator = torch.Generator().manual_seed(2)
    live = -torch.rand(len(batch.rollouts.token_ids), generator=generator)
    live.requires_grad_()
    loss, sums = losses_of(batch, live, algorithm, budget, penalty=0.5)
    (found,) = torch.autograd.grad(loss, live)

    padding = ResponsePadding.of(batch.rollouts.sequences)
    assert batch.old_logprobs is not None
    assert batch.ref_logprobs is not None
    mask = padding.pad(batch.rollouts.response_mask)
    old = padding.pad(batch.old_logprobs)
    ref = padding.pad(batch.ref_logprobs)
    advantages = padding.pad(batch.advantages)
    logprobs = torch.zeros(padding.shape).index_put(
        (torch.from_numpy(padding.rows), torch.from_numpy(padding.columns)),
        live[torch.from_numpy(padding.flat)],
    )

    terms = KLLossTerms(kl.estimator, kl.direction, kl.level, kl.importance_ratio)
    drift = torch.where(mask, old_policy_kl(logprobs, old), 0.0)
    tokens = 0.3 * kl_loss(logprobs, old, ref, mask, terms) + 0.5 * drift
    expected = (torch.where(mask, -logprobs * advantages, 0.0) + tokens).sum() / 4
    (exact,) = torch.autograd.grad(expected, live)

    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.allclose(found, exact, atol=1e-6)
    assert sums["kl_old"] == pytest.approx(float(drift.detach().sum()), rel=1e-5)


def test_without_a_penalty_there_is_no_metric_of_it():
    batch = example()
    algorithm = AlgorithmConfig(kl=KLS["tokens"], objective=ObjectiveConfig(weight="none"))
    _, sums = losses_of(batch, torch.zeros(len(batch.rollouts.token_ids)), algorithm, 1000, 0.0)
    assert "kl_old" not in sums
    assert {"kl_ref_k1", "kl_ref_k3"} <= set(sums)


@pytest.mark.parametrize("budget", [4, 1000])
def test_rejected_responses_have_no_gradient(budget: int):
    """Compare which tokens have a gradient with a plain loop over the responses."""
    noise = np.random.default_rng(5)
    batch = example()
    rollouts_of = batch.rollouts
    mask = rollouts_of.response_mask
    drawn = np.where(mask, -noise.random(len(mask)), 0.0).astype(np.float32)
    sampled = dataclasses.replace(rollouts_of, rollout_logprobs=drawn)
    advantages = np.where(mask, noise.normal(size=len(mask)), 0.0).astype(np.float32)
    batch = dataclasses.replace(batch, rollouts=sampled, advantages=advantages, kl_coefficient=0.0)
    settings = RolloutCorrectionConfig(max_sequence_kl=0.07, sequence_kl="k2", off_policy_mask=0.02)
    algorithm = AlgorithmConfig(
        objective=ObjectiveConfig(weight="none"),
        rollout_correction=settings,
        aggregation="token_mean",
    )
    live_values = np.where(mask, -noise.random(len(mask)), 0.0).astype(np.float32)
    live = torch.tensor(live_values, requires_grad=True)

    total, sums = losses_of(batch, live, algorithm, budget, 0.0)
    total.backward()

    assert batch.old_logprobs is not None
    kept = mask.copy()
    for start, end in pairwise(sampled.sequence_offsets):
        tokens = np.arange(start, end)[mask[start:end]]
        difference = batch.old_logprobs[tokens] - drawn[tokens]
        if (difference**2 / 2).mean() > 0.07:
            kept[tokens] = False
        if (drawn[tokens] - live_values[tokens]).mean() > 0.02:
            kept[tokens[advantages[tokens] < 0]] = False
    assert 0 < kept.sum() < mask.sum()
    assert live.grad is not None
    assert ((live.grad.numpy() != 0) == kept).all()
    assert sums["rollout_masked_fraction"] == mask.sum() - kept.sum()


def test_masked_tokens_keep_their_penalties_and_count_in_averages():
    batch = example()
    algorithm = AlgorithmConfig(
        kl=KLS["tokens"],
        objective=ObjectiveConfig(weight="none"),
        # No ratio of two random policies is in this band.
        rollout_correction=RolloutCorrectionConfig(level="token", mask_above=1e-6),
        aggregation="token_mean",
    )
    without = dataclasses.replace(batch, advantages=np.zeros_like(batch.advantages))
    plain = algorithm.model_copy(update={"rollout_correction": RolloutCorrectionConfig()})
    live = torch.zeros(len(batch.rollouts.token_ids))
    masked, sums = losses_of(batch, live, algorithm, 1000, 0.5)
    penalties, _ = losses_of(without, live, plain, 1000, 0.5)
    assert sums["rollout_masked_fraction"] == batch.rollouts.response_mask.sum()
    assert float(penalties) != 0
    assert float(masked) == float(penalties)
