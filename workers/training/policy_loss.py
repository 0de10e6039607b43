"""The loss of the policy on one pack: the algorithm functions, applied to its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlsys.algorithms.kl import KLLossTerms, kl_estimate, kl_loss, old_policy_kl
from rlsys.algorithms.loss_aggregation import aggregate_loss
from rlsys.algorithms.policy_objectives import (
    BatchTokens,
    PolicyObjectiveInputs,
    PolicyObjectiveOutput,
    is_zero_at_zero_advantage,
    log_ratios,
    off_policy_sequence_mask,
    policy_objective,
    responses_within_kl,
    rollout_correction,
)
from rlsys.config import AlgorithmConfig
from rlsys.data.batches import TrainBatch
from workers.training.losses import Denominators, PackColumns, PackLoss
from workers.training.packed_model import PackResult


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """The `TokenLoss` of the policy: objective, KL and entropy terms.

    Gradient flows through the pack's result only.
    """

    batch: TrainBatch
    algorithm: AlgorithmConfig
    # The weight's parameters, with its statistic over the whole mini-batch.
    objective_parameters: Mapping[str, Any] = field(default_factory=dict)
    # Of the penalty KL(old || live); it may be adapted from step to step.
    old_kl_coefficient: float = 0.0

    def rows_with_gradient(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of `rows` whose loss has a gradient.

        A response whose advantages are all 0, as in a group of equal rewards, has none unless a KL
        or entropy term brings one.
        """
        entropy = self.algorithm.entropy.bonus
        reference = self.batch.ref_logprobs is not None and self.batch.kl_coefficient
        if entropy or reference or self.old_kl_coefficient:
            return rows
        if not is_zero_at_zero_advantage(self.algorithm.objective.weight):
            return rows

        # NaN counts as a gradient, so that it is seen.
        nonzero = self.batch.advantages != 0
        offsets = self.batch.rollouts.sequence_offsets
        return rows[np.logical_or.reduceat(nonzero, offsets[:-1])[rows]]

    def __call__(self, result: PackResult, columns: PackColumns, sizes: Denominators) -> PackLoss:
        """Return the loss of a pack, as a term of the loss of the mini-batch."""
        mask = columns.mask()
        old = _old_logprobs(self.batch, result, columns)
        rollout = columns.take(self.batch.rollouts.rollout_logprobs)
        sums: dict[str, float] = {}

        objective = self._objective(result, columns, old, mask)
        token_losses = objective.token_losses

        # The correction multiplies the objective only, not the penalties below.
        correction = self._rollout_correction(result, columns, old, rollout)
        if correction is not None:
            # `where`: an infinite loss of a masked token would become NaN in a product with 0.
            token_losses = torch.where(correction == 0, 0.0, token_losses * correction)
            sums["rollout_correction"] = float(correction.sum())
            sums["rollout_masked_fraction"] = float((mask & (correction == 0)).sum())

        # The KL to the reference is a metric even where its coefficient is 0.
        if self.batch.ref_logprobs is not None:
            ref = columns.take(self.batch.ref_logprobs)
            if result.exact_kl is not None:
                sums["kl_ref_exact"] = float(result.exact_kl.detach().sum())
            if self.batch.kl_coefficient:
                penalty = self._reference_kl(result, columns, old, ref, mask)
                token_losses = token_losses + self.batch.kl_coefficient * penalty
            for kind in ("k1", "k3"):
                estimate = kl_estimate(result.logprobs.detach(), ref, kind)
                sums[f"kl_ref_{kind}"] = float(estimate.sum())

        if self.old_kl_coefficient:
            drift = old_policy_kl(result.logprobs, old)
            token_losses = token_losses + self.old_kl_coefficient * columns.pad(drift)
            sums["kl_old"] = float(drift.detach().sum())

        if self.algorithm.entropy.bonus:
            bonus = self.algorithm.entropy.bonus * columns.pad(result.entropies)
            token_losses = token_losses - bonus

        loss = aggregate_loss(
            token_losses,
            mask,
            self.algorithm.aggregation,
            num_tokens=sizes.num_tokens,
            num_sequences=sizes.num_sequences,
            max_tokens=sizes.max_tokens,
        )

        ratio = objective.metrics["ratio"]
        difference = (rollout - old).abs()
        sums |= {
            "entropy": float(result.entropies.detach().sum()),
            "ratio": float(ratio.sum()),
            "ratio_square": float((ratio**2).sum()),
            "clipped": float(objective.metrics["clipped"].sum()),
            "difference": float(difference.sum()),
        }
        maxima = {"ratio": float(ratio.max()), "difference": float(difference.max())}
        return PackLoss(loss=loss, sums=sums, maxima=maxima)

    def _objective(
        self, result: PackResult, columns: PackColumns, old: Tensor, mask: Tensor
    ) -> PolicyObjectiveOutput:
        """Return the token losses of the policy objective."""
        inputs = PolicyObjectiveInputs(
            logprobs=columns.pad(result.logprobs),
            old_logprobs=columns.pad(old),
            advantages=columns.pad(columns.take(self.batch.advantages)),
            response_mask=mask,
            positions=columns.pad(columns.positions()),
        )
        objective = self.algorithm.objective
        return policy_objective(
            inputs,
            ratio=objective.ratio,
            weight=objective.weight,
            **self.objective_parameters,
        )

    def _rollout_correction(
        self, result: PackResult, columns: PackColumns, old: Tensor, rollout: Tensor
    ) -> Tensor | None:
        """Return [b, T] the factors of the token losses, 0 at masked tokens; None: all are 1."""
        settings = self.algorithm.rollout_correction
        masks = (settings.max_sequence_kl, settings.off_policy_mask)
        if settings.level == "none" and masks == (None, None):
            return None

        mask = columns.mask()
        padded_old, padded_rollout = columns.pad(old), columns.pad(rollout)
        weights = rollout_correction(
            padded_old,
            padded_rollout,
            mask,
            level=settings.level,
            cap=settings.cap,
            mask_below=settings.mask_below,
            mask_above=settings.mask_above,
        )
        if settings.max_sequence_kl is not None:
            weights = weights * responses_within_kl(
                padded_old,
                padded_rollout,
                mask,
                estimator=settings.sequence_kl,
                threshold=settings.max_sequence_kl,
            )
        if settings.off_policy_mask is not None:
            weights = weights * off_policy_sequence_mask(
                columns.pad(result.logprobs.detach()),
                padded_rollout,
                columns.pad(columns.take(self.batch.advantages)),
                mask,
                threshold=settings.off_policy_mask,
            )
        return weights

    def _reference_kl(
        self, result: PackResult, columns: PackColumns, old: Tensor, ref: Tensor, mask: Tensor
    ) -> Tensor:
        """Return [b, T] the KL to the reference, as a loss per token."""
        kl = self.algorithm.kl
        if kl.estimator == "exact":
            assert result.exact_kl is not None, "an exact KL needs the reference's hidden states"
            return columns.pad(result.exact_kl)
        terms = KLLossTerms(kl.estimator, kl.direction, kl.level, kl.importance_ratio)
        return kl_loss(
            columns.pad(result.logprobs), columns.pad(old), columns.pad(ref), mask, terms
        )


def _old_logprobs(batch: TrainBatch, result: PackResult, columns: PackColumns) -> Tensor:
    """Return [m] the log-probabilities of the old policy."""
    # They are computed only where a batch has several updates. In its only one the old policy is
    # the live one.
    if batch.old_logprobs is None:
        return result.logprobs.detach()
    return columns.take(batch.old_logprobs)


def pack_tokens(
    result: PackResult, columns: PackColumns, batch: TrainBatch, level: str
) -> BatchTokens:
    """Return a pack's m tokens, for weights with a statistic over the mini-batch, on the CPU.

    `level` is the name of a ratio: token, sequence, future, prefix or product.
    """
    old = _old_logprobs(batch, result, columns)
    padded = log_ratios(level, columns.pad(result.logprobs), columns.pad(old), columns.mask())
    return BatchTokens(
        log_ratios=columns.unpad(padded).cpu(),
        logprobs=result.logprobs.cpu(),
        advantages=columns.take(batch.advantages).cpu(),
        positions=columns.positions().cpu(),
    )


def joined_tokens(parts: Sequence[BatchTokens], seed: int) -> BatchTokens:
    """Return the tokens of all packs, in the order of their positions.

    The order, and so a choice among equal tokens, does not depend on packs and ranks.
    """
    if not parts:
        none = torch.zeros(0)
        return BatchTokens(none, none, none, torch.zeros(0, dtype=torch.int64), seed)

    log_ratios, logprobs, advantages, positions = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("log_ratios", "logprobs", "advantages", "positions")
    )
    order = positions.argsort()
    return BatchTokens(
        log_ratios=log_ratios[order],
        logprobs=logprobs[order],
        advantages=advantages[order],
        positions=positions[order],
        seed=seed,
    )
