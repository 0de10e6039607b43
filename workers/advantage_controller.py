"""The advantage controller: joins what the other workers made of a batch, and turns rewards into advantages."""

from __future__ import annotations

import itertools
import resource
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from rlsys.config import RunConfig
from rlsys.data.batches import LogprobBatch, RewardBatch, RolloutBatch, StopReason, TrainBatch
from rlsys.data.rollout_files import write_rollouts
from rlsys.driver.credit_assignment import CreditAssigner
from rlsys.driver.metrics import Metric, MetricMap, maximum, mean, total
from rlsys.driver.ports import CreditedBatch, Handle
from rlsys.plugins import load_plugins


class AdvantageController:
    """Ray actor around a `CreditAssigner`."""

    def __init__(self, config: RunConfig) -> None:
        load_plugins(config.plugins)
        self._assigner = CreditAssigner(config)

    def credit(
        self, num_parts: int, num_old: int, num_ref: int, *records: Any
    ) -> tuple[Any, MetricMap]:
        """`records`: `num_parts` RolloutBatches, as many RewardBatches, the LogprobBatches of old and of ref, RewardBatches of greedy responses.

        Returns:
            A reference to the TrainBatch, and the metrics of rewards and advantages.
        """
        remaining = iter(records)

        def take(count: int) -> list[Any]:
            return list(itertools.islice(remaining, count))

        rollouts, rewards = (
            RolloutBatch.concatenate(take(num_parts)),
            RewardBatch.concatenate(take(num_parts)),
        )
        old, ref, greedy = take(num_old), take(num_ref), list(remaining)
        batch, metrics = self._assigner.assign(
            rollouts, rewards, old, ref, RewardBatch.concatenate(greedy) if greedy else None
        )
        return ray.put(batch), batch_metrics(batch) | metrics

    def state(self) -> dict[str, Any]:
        """See `CreditAssigner`."""
        return self._assigner.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """See `CreditAssigner`."""
        self._assigner.load_state(state)

    def write_rollouts(self, batch: TrainBatch, path: str) -> None:
        """Write one step's rollouts as Parquet."""
        write_rollouts(batch, Path(path))

    def metrics(self) -> dict[str, Metric]:
        """Peak memory."""
        return {
            "memory/advantage": maximum(
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
            )
        }


def batch_metrics(batch: TrainBatch) -> dict[str, Metric]:
    """What a batch says about rewards and lengths."""
    rollouts, rewards = batch.rollouts, batch.rewards
    count, lengths = len(rollouts), rollouts.response_lengths
    tokens = int(lengths.sum())
    _, index = np.unique(rollouts.group_ids, return_inverse=True)
    groups = int(index.max()) + 1
    highest, lowest = np.full(groups, -np.inf), np.full(groups, np.inf)
    np.maximum.at(highest, index, rewards.rewards)
    np.minimum.at(lowest, index, rewards.rewards)
    return {
        "reward/mean": mean(float(rewards.rewards.mean()), count),
        "reward/std": mean(float(rewards.rewards.std()), count),
        "reward/accuracy": mean(float(rewards.accuracies.mean()), count),
        "reward/format_rate": mean(
            sum(reason != "no_answer" for reason in rewards.reasons) / count, count
        ),
        **{
            f"reward/component/{name}": mean(float(values.mean()), count)
            for name, values in rewards.components.items()
        },
        **{
            f"reward/reason/{reason}": total(number)
            for reason, number in Counter(rewards.reasons).items()
        },
        "rollout/tokens": total(tokens),
        "rollout/response_length": mean(float(lengths.mean()), count),
        "rollout/response_length_max": maximum(float(lengths.max())),
        "rollout/truncated_share": mean(
            float((rollouts.stop_reasons == StopReason.LENGTH).mean()), count
        ),
        "rollout/equal_reward_groups": mean(float((highest == lowest).mean()), groups),
    }


class AdvantageControllerClient:
    """Implements `ports.AdvantageComputer` over the actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def credit(
        self,
        rollouts: Sequence[Handle[RolloutBatch]],
        rewards: Sequence[Handle[RewardBatch]],
        old_logprobs: Sequence[Handle[LogprobBatch]],
        ref_logprobs: Sequence[Handle[LogprobBatch]],
        greedy_rewards: Sequence[Handle[RewardBatch]] = (),
    ) -> CreditedBatch:
        """See `ports.AdvantageComputer`."""
        records = (*rollouts, *rewards, *old_logprobs, *ref_logprobs, *greedy_rewards)
        batch, metrics = await self._actor.credit.remote(
            len(rollouts), len(old_logprobs), len(ref_logprobs), *records
        )
        return CreditedBatch(batch=batch, metrics=metrics)

    async def state(self) -> dict[str, Any]:
        """See `ports.AdvantageComputer`."""
        return await self._actor.state.remote()

    async def load_state(self, state: dict[str, Any]) -> None:
        """See `ports.AdvantageComputer`."""
        await self._actor.load_state.remote(state)

    async def write_rollouts(self, batch: Handle[TrainBatch], path: Path) -> None:
        """See `ports.AdvantageComputer`."""
        await self._actor.write_rollouts.remote(batch, str(path))

    async def metrics(self) -> dict[str, Metric]:
        """Peak memory."""
        return await self._actor.metrics.remote()
