"""The advantage controller: joins what the other workers made of a batch, and turns rewards into advantages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from rlsys.algorithms.advantages import AdvantageInputs, get_advantage_estimator
from rlsys.config import RunConfig
from rlsys.data.batches import LogprobBatch, RewardBatch, RolloutBatch, StopReason, TrainBatch
from rlsys.data.padding import ResponsePadding
from rlsys.data.rollout_files import write_rollouts
from rlsys.driver.metrics import Metric, MetricMap, maximum, mean, total
from rlsys.driver.ports import CreditedBatch, Handle
from rlsys.plugins import load_plugins


class AdvantageController:
    """Ray actor that runs any registered estimator."""

    def __init__(self, config: RunConfig) -> None:
        load_plugins(config.plugins)
        self._estimator = get_advantage_estimator(config.algorithm.advantage.name)
        self._parameters = config.algorithm.advantage.parameters

    def credit(self, num_parts: int, num_old: int, *records: Any) -> tuple[Any, MetricMap]:
        """`records`: `num_parts` RolloutBatches, as many RewardBatches, `num_old` LogprobBatches of old, the rest of ref.

        Returns:
            A reference to the TrainBatch, and the metrics of rewards and advantages.
        """
        rollouts = RolloutBatch.concatenate(records[:num_parts])
        rewards = RewardBatch.concatenate(records[num_parts : 2 * num_parts])
        logprobs = records[2 * num_parts :]
        batch, diagnostics = self.advantages(rollouts, rewards, logprobs[:num_old], logprobs[num_old:])
        return ray.put(batch), batch_metrics(batch) | diagnostics

    def advantages(
        self, rollouts: RolloutBatch, rewards: RewardBatch, old: Sequence[LogprobBatch], ref: Sequence[LogprobBatch]
    ) -> tuple[TrainBatch, dict[str, Metric]]:
        """The train batch of a joined batch, and the estimator's diagnostics."""
        offsets = rollouts.sequence_offsets
        old_logprobs = LogprobBatch.scatter(old, offsets) if old else None
        ref_logprobs = LogprobBatch.scatter(ref, offsets) if ref else None
        padding = ResponsePadding.of(rollouts)
        inputs = AdvantageInputs(
            rewards=torch.from_numpy(rewards.rewards.copy()),
            response_mask=padding.pad(rollouts.response_mask),
            group_ids=torch.from_numpy(rollouts.group_ids.copy()),
            rollout_logprobs=padding.pad(rollouts.rollout_logprobs),
            old_logprobs=None if old_logprobs is None else padding.pad(old_logprobs),
            ref_logprobs=None if ref_logprobs is None else padding.pad(ref_logprobs),
        )
        output = self._estimator(inputs, **self._parameters)
        tokens = len(rollouts.token_ids)
        batch = TrainBatch(
            rollouts=rollouts,
            rewards=rewards,
            advantages=padding.unpad(output.advantages, tokens),
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            returns=None if output.returns is None else padding.unpad(output.returns, tokens),
        )
        return batch, {f"advantage/{name}": mean(value) for name, value in output.diagnostics.items()}

    def write_rollouts(self, batch: TrainBatch, path: str) -> None:
        """Write one step's rollouts as Parquet."""
        write_rollouts(batch, Path(path))

    def metrics(self) -> dict[str, Metric]:
        """Peak memory."""
        import resource

        return {"memory/advantage": maximum(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2)}


def batch_metrics(batch: TrainBatch) -> dict[str, Metric]:
    """What a batch says about rewards, lengths and advantages."""
    rollouts, rewards = batch.rollouts, batch.rewards
    count, lengths = len(rollouts), rollouts.response_lengths
    tokens = int(lengths.sum())
    _, index = np.unique(rollouts.group_ids, return_inverse=True)
    groups = int(index.max()) + 1
    highest, lowest = np.full(groups, -np.inf), np.full(groups, np.inf)
    np.maximum.at(highest, index, rewards.rewards)
    np.minimum.at(lowest, index, rewards.rewards)
    advantages = batch.advantages[rollouts.response_mask]
    return {
        "reward/mean": mean(float(rewards.rewards.mean()), count),
        "reward/std": mean(float(rewards.rewards.std()), count),
        "reward/accuracy": mean(float(rewards.accuracies.mean()), count),
        "reward/format_rate": mean(sum(reason != "no_answer" for reason in rewards.reasons) / count, count),
        **{f"reward/component/{name}": mean(float(values.mean()), count) for name, values in rewards.components.items()},
        **{f"reward/reason/{reason}": total(number) for reason, number in Counter(rewards.reasons).items()},
        "rollout/tokens": total(tokens),
        "rollout/response_length": mean(float(lengths.mean()), count),
        "rollout/response_length_max": maximum(float(lengths.max())),
        "rollout/truncated_share": mean(float((rollouts.stop_reasons == StopReason.LENGTH).mean()), count),
        "rollout/equal_reward_groups": mean(float((highest == lowest).mean()), groups),
        "advantage/mean_abs": mean(float(np.abs(advantages).mean()) if tokens else 0.0, tokens),
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
    ) -> CreditedBatch:
        """See `ports.AdvantageComputer`."""
        records = (*rollouts, *rewards, *old_logprobs, *ref_logprobs)
        batch, metrics = await self._actor.credit.remote(len(rollouts), len(old_logprobs), *records)
        return CreditedBatch(batch=batch, metrics=metrics)

    async def write_rollouts(self, batch: Handle[TrainBatch], path: Path) -> None:
        """See `ports.AdvantageComputer`."""
        await self._actor.write_rollouts.remote(batch, str(path))

    async def metrics(self) -> dict[str, Metric]:
        """Peak memory."""
        return await self._actor.metrics.remote()
