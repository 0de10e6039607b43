"""Metrics of the samples of a step: of everything that was sampled, and of what was trained on.

    sampled = kept by dynamic sampling + dropped by it        reward/*  rollout/*
    trained = kept and not masked out of the loss             trained/*

The two differ only with `algorithm.dynamic_sampling` and `algorithm.overlong.mask_truncated`.
Reward and accuracy are over everything that was sampled, since that is what the policy does.
Dynamic sampling keeps groups that are neither all right nor all wrong, so their mean says little.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlsys.data.batches import RewardBatch, RolloutBatch, ScoredBatch, StopReason
from rlsys.metrics import Metric, maximum, mean, total
from rlsys.run.reward_failures import failure_counts

# Absent where the first reward is a model, which says neither right nor wrong.
OF_RIGHT_AND_WRONG = ("reward/accuracy", "reward/format_rate", "trained/accuracy")


def batch_metrics(
    batch: ScoredBatch, dropped: ScoredBatch | None = None, greedy: RewardBatch | None = None
) -> dict[str, Metric]:
    """Return `reward/*` and `rollout/*` of what was sampled, `trained/*` of what enters the loss.

    `greedy` are the rewards of the greedy responses that an estimator compares with. They count
    among the failures and nowhere else.
    """
    sampled = [batch] if dropped is None else [batch, dropped]
    everything = _Columns.of(sampled)
    trained = _Columns.of([batch]).where(batch.trained)

    rewards = [part.rewards for part in sampled]
    if greedy is not None:
        rewards.append(greedy)
    failures = {f"reward/{name}": total(n) for name, n in failure_counts(rewards).items()}

    found = (
        _sampled_metrics(everything)
        | _reward_details(sampled)
        | failures
        | _trained_metrics(trained)
    )
    if not batch.rewards.has_accuracy:
        for name in OF_RIGHT_AND_WRONG:
            del found[name]
    return found


class _Columns:
    """Numbers of some responses, one per response."""

    def __init__(
        self,
        rewards: NDArray[np.float32],
        correct: NDArray[np.bool_],
        lengths: NDArray[np.int64],
        truncated: NDArray[np.bool_],
        groups: NDArray[np.int64],
    ) -> None:
        self.rewards = rewards
        self.correct = correct
        self.lengths = lengths
        self.truncated = truncated
        self.groups = groups

    @staticmethod
    def of(batches: Sequence[ScoredBatch]) -> _Columns:
        """Return the columns of all responses of `batches`."""
        rollouts: list[RolloutBatch] = [batch.rollouts for batch in batches]
        return _Columns(
            np.concatenate([batch.rewards.rewards for batch in batches]),
            np.concatenate([batch.rewards.correct for batch in batches]),
            np.concatenate([part.response_lengths for part in rollouts]),
            np.concatenate([part.stop_reasons == StopReason.LENGTH for part in rollouts]),
            np.concatenate([part.group_ids for part in rollouts]),
        )

    def where(self, chosen: NDArray[np.bool_] | None) -> _Columns:
        """Return the columns of the responses `chosen`; None: all."""
        if chosen is None:
            return self
        return _Columns(
            self.rewards[chosen],
            self.correct[chosen],
            self.lengths[chosen],
            self.truncated[chosen],
            self.groups[chosen],
        )

    def frac_reward_zero_std(self) -> Metric:
        """Return the fraction of the groups in which no two rewards differ.

        Missing rewards are not compared: fmax and fmin ignore NaN.
        """
        ids, index = np.unique(self.groups, return_inverse=True)
        highest = np.full(len(ids), -np.inf)
        lowest = np.full(len(ids), np.inf)
        np.fmax.at(highest, index, self.rewards)
        np.fmin.at(lowest, index, self.rewards)
        return _mean_of(highest <= lowest)


def _mean_of(values: NDArray) -> Metric:
    """Return the mean of one number per response or group.

    A missing value (NaN) is left out. Without any value the weight is 0, and no number is written.
    """
    present = values[~np.isnan(values)]
    return mean(float(present.mean()) if len(present) else 0.0, len(present))


def _std_of(values: NDArray) -> Metric:
    """Return the standard deviation, with the conventions of `_mean_of`."""
    present = values[~np.isnan(values)]
    return mean(float(present.std()) if len(present) else 0.0, len(present))


def _sampled_metrics(columns: _Columns) -> dict[str, Metric]:
    return {
        "reward/mean": _mean_of(columns.rewards),
        "reward/std": _std_of(columns.rewards),
        "reward/accuracy": _mean_of(columns.correct),
        "rollout/responses": total(len(columns.rewards)),
        "rollout/tokens": total(int(columns.lengths.sum())),
        "rollout/response_length": _mean_of(columns.lengths),
        "rollout/response_length_max": maximum(float(columns.lengths.max())),
        "rollout/truncated_fraction": _mean_of(columns.truncated),
        "rollout/frac_reward_zero_std": columns.frac_reward_zero_std(),
    }


def _reward_details(batches: Sequence[ScoredBatch]) -> dict[str, Metric]:
    """Return the means of the components, and counts of the reasons that reward functions gave."""
    rewards = [batch.rewards for batch in batches]
    components = {}
    for name in rewards[0].components:
        values = np.concatenate([part.components[name] for part in rewards])
        components[f"reward/component/{name}"] = _mean_of(values)

    reasons = [reason for part in rewards for reason in part.reasons]
    answered = np.array([reason != "no_answer" for reason in reasons])
    verdicts = {
        f"reward/reason/{reason}": total(number) for reason, number in Counter(reasons).items()
    }
    return {"reward/format_rate": _mean_of(answered)} | components | _steps(rewards) | verdicts


def _steps(rewards: Sequence[RewardBatch]) -> dict[str, Metric]:
    """Return the number of steps and their mean reward, of each function that rewards steps."""
    metrics = {}
    for name in rewards[0].step_rewards:
        steps = [part.step_rewards[name] for part in rewards]
        counts = np.concatenate([np.diff(part.offsets) for part in steps])
        failed = np.isnan(np.concatenate([part.components[name] for part in rewards]))
        metrics[f"reward/steps/{name}"] = _mean_of(np.where(failed, np.nan, counts))
        metrics[f"reward/step_mean/{name}"] = _mean_of(
            np.concatenate([part.rewards for part in steps])
        )
    return metrics


def _trained_metrics(columns: _Columns) -> dict[str, Metric]:
    return {
        "trained/responses": total(len(columns.rewards)),
        "trained/tokens": total(int(columns.lengths.sum())),
        "trained/reward_mean": _mean_of(columns.rewards),
        "trained/reward_std": _std_of(columns.rewards),
        "trained/accuracy": _mean_of(columns.correct),
        "trained/response_length": _mean_of(columns.lengths),
        "trained/truncated_fraction": _mean_of(columns.truncated),
        "trained/frac_reward_zero_std": columns.frac_reward_zero_std(),
    }
