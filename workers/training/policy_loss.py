"""The loss of one packed forward pass: the algorithm functions, applied to the tokens of a pack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlsys.algorithms.kl import KLLossTerms, kl_estimate, kl_loss, old_policy_kl
from rlsys.algorithms.loss_aggregation import aggregate_loss
from rlsys.algorithms.policy_objectives import (
    PolicyObjectiveInputs,
    log_ratios,
    policy_objective,
    rollout_correction,
)
from rlsys.config import AlgorithmConfig
from rlsys.data.batches import TrainBatch
from rlsys.data.packing import Pack
from workers.training.packed_model import PackResult


@dataclass(frozen=True, kw_only=True)
class Denominators:
    """Sizes of the whole mini-batch over all ranks: losses of packs add up to the loss of the mini-batch."""

    num_tokens: int
    num_sequences: int
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class PackLoss:
    """The loss to differentiate, and detached sums over the pack's tokens for the metrics."""

    loss: Tensor
    sums: dict[str, float]
    maxima: dict[str, float]


class _Padder:
    """Between the m sampled tokens of a pack and [b, T] arrays of responses."""

    def __init__(self, pack: Pack, device: torch.device) -> None:
        self.rows = torch.from_numpy(pack.response_index).to(device)
        self.columns = torch.from_numpy(pack.response_positions).to(device)
        width = int(pack.response_positions.max()) + 1 if len(pack.response_positions) else 1
        self.shape = (len(pack.rows), width)

    def pad(self, values: Tensor) -> Tensor:
        """[m] -> [b, T], 0 elsewhere; differentiable."""
        return values.new_zeros(self.shape).index_put((self.rows, self.columns), values)


def pack_loss(
    result: PackResult,
    pack: Pack,
    batch: TrainBatch,
    algorithm: AlgorithmConfig,
    sizes: Denominators,
    objective_parameters: Mapping[str, Any],
    *,
    old_kl_coefficient: float = 0.0,
) -> PackLoss:
    """Objective, KL and entropy terms of one pack. Gradient flows through `result` alone.

    `objective_parameters` are those of the weight, with what it took from the whole mini-batch. `old_kl_coefficient` is that of the penalty
    KL(old || live) now.
    """
    device = result.logprobs.device
    padder = _Padder(pack, device)

    def of_batch(array: NDArray[np.float32] | None) -> Tensor:
        assert array is not None, "an update has advantages, and rollouts log-probabilities"
        return torch.from_numpy(array[pack.flat_positions]).to(device)

    mask = padder.pad(torch.ones_like(result.logprobs)).bool()
    old = result.logprobs.detach() if batch.old_logprobs is None else of_batch(batch.old_logprobs)
    objective = policy_objective(
        PolicyObjectiveInputs(
            logprobs=padder.pad(result.logprobs),
            old_logprobs=padder.pad(old),
            advantages=padder.pad(of_batch(batch.advantages)),
            response_mask=mask,
        ),
        ratio=algorithm.objective.ratio,
        weight=algorithm.objective.weight,
        **objective_parameters,
    )
    rollout = of_batch(batch.rollouts.rollout_logprobs)
    token_losses = objective.token_losses
    sums: dict[str, float] = {}
    if algorithm.rollout_correction.level != "none":
        correction = rollout_correction(
            padder.pad(old), padder.pad(rollout), mask, **algorithm.rollout_correction.model_dump()
        )
        token_losses = token_losses * correction
        sums |= {
            "rollout_correction": float(correction.sum()),
            "rollout_masked_share": float((mask & (correction == 0)).sum()),
        }
    if batch.ref_logprobs is not None:
        ref, kl = of_batch(batch.ref_logprobs), algorithm.kl
        if batch.kl_coefficient:
            terms = KLLossTerms(kl.estimator, kl.direction, kl.level, kl.importance_ratio)
            estimate = kl_loss(
                padder.pad(result.logprobs), padder.pad(old), padder.pad(ref), mask, terms
            )
            token_losses = token_losses + batch.kl_coefficient * estimate
        sums |= {
            f"kl_ref_{kind}": float(kl_estimate(result.logprobs.detach(), ref, kind).sum())
            for kind in ("k1", "k3")
        }
    if old_kl_coefficient:
        drift = old_policy_kl(result.logprobs, old)
        token_losses = token_losses + old_kl_coefficient * padder.pad(drift)
        sums["kl_old"] = float(drift.detach().sum())
    if algorithm.entropy.bonus:
        token_losses = token_losses - algorithm.entropy.bonus * padder.pad(result.entropies)
    loss = aggregate_loss(
        token_losses,
        mask,
        algorithm.aggregation,
        num_tokens=sizes.num_tokens,
        num_sequences=sizes.num_sequences,
        max_tokens=sizes.max_tokens,
    )
    ratio = objective.metrics["ratio"]
    gap = (rollout - old).abs()
    sums |= {
        "entropy": float(result.entropies.detach().sum()),
        "ratio": float(ratio.sum()),
        "ratio_square": float((ratio**2).sum()),
        "clipped": float(objective.metrics["clipped"].sum()),
        "gap": float(gap.sum()),
    }
    return PackLoss(
        loss=loss, sums=sums, maxima={"ratio": float(ratio.max()), "gap": float(gap.max())}
    )


def pack_log_ratios(result: PackResult, pack: Pack, batch: TrainBatch, level: str) -> Tensor:
    """[m] log-ratios of one level at the pack's tokens, for weights with a statistic over the mini-batch."""
    assert batch.old_logprobs is not None
    padder = _Padder(pack, result.logprobs.device)
    old = torch.from_numpy(batch.old_logprobs[pack.flat_positions]).to(result.logprobs.device)
    mask = padder.pad(torch.ones_like(result.logprobs)).bool()
    return log_ratios(level, padder.pad(result.logprobs), padder.pad(old), mask)[
        padder.rows, padder.columns
    ]
