"""The losses of models that learn from examples.

    SupervisedLoss    demonstrations: negative log-likelihood
    PreferenceLoss    pairs: direct preference optimization
    RankingLoss       rankings: reward models
    StepLoss          labels of steps: process reward models

Losses that compare responses need all responses to a prompt in one pack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlsys.algorithms.loss_aggregation import aggregate_loss
from rlsys.algorithms.preference import dpo_loss
from rlsys.algorithms.reward_modeling import (
    ABSENT,
    calibration_bins,
    ranking_accuracy,
    ranking_loss,
    right_steps,
    step_loss,
)
from rlsys.algorithms.supervised import negative_log_likelihood
from rlsys.config.offline import PreferenceConfig, RankingConfig, SupervisedConfig
from rlsys.data.example_stream import ExampleBatch
from rlsys.metrics import Metric, mean, total
from workers.training.losses import Denominators, PackColumns, PackLoss
from workers.training.packed_model import PackResult
from workers.training.packed_value_model import ValueResult


class OfflineLoss(Protocol):
    """A `TokenLoss` of a batch of examples, with the metrics of its sums."""

    def __call__(self, result: Any, columns: PackColumns, sizes: Denominators) -> PackLoss:
        """Return the loss of a pack, as a term of the loss of the batch."""
        ...

    def metrics(self, sums: Mapping[str, float]) -> dict[str, Metric]:
        """Return the metrics of this rank, by names without a prefix.

        Args:
            sums: `PackLoss.sums`, added up over the packs of this rank.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class SupervisedLoss:
    """The negative log-likelihood of demonstrations or texts."""

    objective: SupervisedConfig

    def __call__(self, result: PackResult, columns: PackColumns, sizes: Denominators) -> PackLoss:
        """See `OfflineLoss`."""
        logprobs, mask = columns.pad(result.logprobs), columns.mask()
        if self.objective.aggregation == "token_mean":
            loss = negative_log_likelihood(logprobs, mask, num_tokens=sizes.num_tokens)
        else:
            loss = aggregate_loss(
                -logprobs, mask, "sequence_mean", num_sequences=sizes.num_sequences
            )
        sums = {
            "tokens": float(len(result.logprobs)),
            "entropy": float(result.entropies.detach().sum()),
        }
        return PackLoss(loss=loss, sums=sums, maxima={})

    def metrics(self, sums: Mapping[str, float]) -> dict[str, Metric]:
        """See `OfflineLoss`."""
        return _token_metrics(sums)


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """The loss of preference pairs; a ranking of K responses gives all its pairs."""

    objective: PreferenceConfig
    batch: ExampleBatch
    reference: NDArray[np.float32]  # [B] log-probabilities under the reference, summed over tokens

    def __call__(self, result: PackResult, columns: PackColumns, sizes: Denominators) -> PackLoss:
        """See `OfflineLoss`."""
        policy = columns.pad(result.logprobs).sum(dim=1)
        reference = columns.take_rows(self.reference)
        if self.objective.length_normalized:
            lengths = columns.mask().sum(dim=1)
            policy, reference = policy / lengths, reference / lengths

        pairs = pairs_of(self.batch, columns)
        output = dpo_loss(
            policy[pairs.better],
            policy[pairs.worse],
            reference[pairs.better],
            reference[pairs.worse],
            beta=self.objective.beta,
            label_smoothing=self.objective.label_smoothing,
            kind=self.objective.kind,
        )
        margins = output.chosen_rewards - output.rejected_rewards
        right = (margins > 0).double() + 0.5 * (margins == 0)
        # Of the learned tokens, for the metrics of every language model.
        tokens = {
            "tokens": float(len(result.logprobs)),
            "entropy": float(result.entropies.detach().sum()),
        }
        sums = tokens | {
            "prompts": pairs.total(torch.ones_like(margins)),
            "accuracy": pairs.total(right),
            "margin": pairs.total(margins),
            "chosen_reward": pairs.total(output.chosen_rewards),
            "rejected_reward": pairs.total(output.rejected_rewards),
            "chosen_logprob": pairs.total(policy.detach()[pairs.better]),
        }
        loss = (output.losses * pairs.weights).sum() / sizes.num_sequences
        return PackLoss(loss=loss, sums=sums, maxima={})

    def metrics(self, sums: Mapping[str, float]) -> dict[str, Metric]:
        """See `OfflineLoss`."""
        prompts = sums.get("prompts", 0.0)
        names = ("accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logprob")
        return _token_metrics(sums) | {
            f"preference_{name}": mean(sums.get(name, 0.0) / max(prompts, 1.0), prompts)
            for name in names
        }


@dataclass(frozen=True, kw_only=True)
class RankingLoss:
    """The loss of a reward model against rankings."""

    objective: RankingConfig
    batch: ExampleBatch
    measures_calibration: bool = False

    def __call__(self, result: ValueResult, columns: PackColumns, sizes: Denominators) -> PackLoss:
        """See `OfflineLoss`."""
        # Each response has one value, that after its last token.
        rewards = columns.pad(result.values).sum(dim=1)
        table, ranks = ranking_table(self.batch, columns, rewards)
        loss = ranking_loss(
            table,
            ranks,
            kind=self.objective.kind,
            margin=self.objective.margin,
            num_prompts=sizes.num_sequences,
        )
        detached = rewards.detach()
        accuracies = ranking_accuracy(table.detach(), ranks)
        sums = {
            "prompts": float(len(table)),
            "accuracy": float(accuracies.sum()),
            "responses": float(len(rewards)),
            "reward": float(detached.sum()),
            "reward_square": float((detached.double() ** 2).sum()),
        }
        if self.measures_calibration:
            sums |= _calibration_sums(table.detach(), ranks)
        return PackLoss(loss=loss, sums=sums, maxima={})

    def metrics(self, sums: Mapping[str, float]) -> dict[str, Metric]:
        """See `OfflineLoss`."""
        prompts, responses = sums.get("prompts", 0.0), sums.get("responses", 0.0)
        return {
            "ranking_accuracy": mean(sums.get("accuracy", 0.0) / max(prompts, 1.0), prompts),
            "reward_mean": mean(sums.get("reward", 0.0) / max(responses, 1.0), responses),
            "reward_square": mean(sums.get("reward_square", 0.0) / max(responses, 1.0), responses),
        } | _calibration_metrics(sums)


CALIBRATION_BINS = (55, 65, 75, 85, 95)  # their middles, in percent


def _calibration_sums(rewards: Tensor, ranks: Tensor) -> dict[str, float]:
    bins = calibration_bins(rewards, ranks, num_bins=len(CALIBRATION_BINS))
    return {
        f"{name}_{middle}": float(getattr(bins, name)[place])
        for name in ("pairs", "predicted", "observed")
        for place, middle in enumerate(CALIBRATION_BINS)
    }


def _calibration_metrics(sums: Mapping[str, float]) -> dict[str, Metric]:
    """Return predicted and observed fractions of each bin, with its pairs as their weight."""
    metrics: dict[str, Metric] = {}
    for middle in CALIBRATION_BINS:
        pairs = sums.get(f"pairs_{middle}", 0.0)
        for name in ("predicted", "observed"):
            fraction = sums.get(f"{name}_{middle}", 0.0) / max(pairs, 1.0)
            metrics[f"calibration/{name}_at_{middle}"] = mean(fraction, pairs)
    return metrics


@dataclass(frozen=True, kw_only=True)
class StepLoss:
    """The loss of a process reward model against labels of steps."""

    # [N] of the sequences that are packed; read where the model has a value, after each step
    labels: NDArray[np.int8]

    def __call__(self, result: ValueResult, columns: PackColumns, sizes: Denominators) -> PackLoss:
        """See `OfflineLoss`; `sizes.num_tokens` are the steps of the batch."""
        labels = columns.take(self.labels)
        logits = result.values
        loss = step_loss(logits, labels, num_steps=sizes.num_tokens)

        right = right_steps(logits.detach(), labels)
        is_right_step = labels == 1
        sums = {
            "steps": float((labels >= 0).sum()),
            "accuracy": float(right.sum()),
            "right_steps": float(is_right_step.sum()),
            "right_accuracy": float(right[is_right_step].sum()),
            "wrong_steps": float((labels == 0).sum()),
            "wrong_accuracy": float(right[labels == 0].sum()),
        }
        return PackLoss(loss=loss, sums=sums, maxima={})

    def metrics(self, sums: Mapping[str, float]) -> dict[str, Metric]:
        """See `OfflineLoss`."""

        def fraction(part: str, whole: str) -> Metric:
            count = sums.get(whole, 0.0)
            return mean(sums.get(part, 0.0) / max(count, 1.0), count)

        return {
            "step_accuracy": fraction("accuracy", "steps"),
            "step_accuracy_right": fraction("right_accuracy", "right_steps"),
            "step_accuracy_wrong": fraction("wrong_accuracy", "wrong_steps"),
            "right_step_fraction": fraction("right_steps", "steps"),
        }


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The pairs of the prompts in a pack, as places among its responses."""

    better: Tensor  # [n]
    worse: Tensor  # [n]
    weights: Tensor  # [n] 1 / (pairs of the same prompt)

    def total(self, values: Tensor) -> float:
        """Return the sum over prompts of the mean over their pairs."""
        return float((values * self.weights).sum())


def pairs_of(batch: ExampleBatch, columns: PackColumns) -> Pairs:
    """Return all pairs of responses to one prompt of which one is better."""
    ranks = columns.take_rows(batch.ranks)
    groups = columns.take_rows(batch.sequences.group_ids)
    is_pair = (groups[:, None] == groups) & (ranks[:, None] < ranks)
    better, worse = is_pair.nonzero(as_tuple=True)
    # A prompt's pairs, counted at each of its responses.
    counts = ((groups[:, None] == groups).double() @ is_pair.double().sum(dim=1)).clamp(min=1)
    return Pairs(better=better, worse=worse, weights=(1 / counts[better]).float())


def ranking_table(
    batch: ExampleBatch, columns: PackColumns, rewards: Tensor
) -> tuple[Tensor, Tensor]:
    """Return [P, K] the rewards of the prompts in a pack, and their ranks; -1 where absent."""
    groups = columns.take_rows(batch.sequences.group_ids)
    ranks = columns.take_rows(batch.ranks)
    _, prompts = groups.unique(return_inverse=True)
    same = prompts[:, None] == prompts
    places = torch.tril(same, diagonal=-1).sum(dim=1)  # earlier responses to the same prompt

    shape = (int(prompts.max()) + 1, int(places.max()) + 1)
    table = rewards.new_zeros(shape).index_put((prompts, places), rewards)
    absent = torch.full(shape, ABSENT, dtype=ranks.dtype, device=ranks.device)
    return table, absent.index_put((prompts, places), ranks)


def _token_metrics(sums: Mapping[str, float]) -> dict[str, Metric]:
    tokens = sums.get("tokens", 0.0)
    entropy = sums.get("entropy", 0.0) / max(tokens, 1.0)
    return {"tokens": total(tokens), "entropy": mean(entropy, tokens)}
