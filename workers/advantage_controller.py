"""The advantage controller: joins what the other workers made of a batch, and turns rewards into advantages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from rlsys.config import RunConfig
from rlsys.data.batches import LogprobBatch, RewardBatch, RolloutBatch, ScoredBatch, TrainBatch
from rlsys.data.rollout_files import write_rollouts
from rlsys.driver.batch_metrics import batch_metrics
from rlsys.driver.credit_assignment import CreditAssigner
from rlsys.driver.ports import CreditedBatch, Handle
from rlsys.metrics import Metric, MetricMap, maximum, peak_memory_gib
from rlsys.plugins import load_plugins


class AdvantageController:
    """Ray actor around a `CreditAssigner`."""

    def __init__(self, config: RunConfig) -> None:
        load_plugins(config.plugins)
        self._assigner = CreditAssigner(config)

    def credit(
        self, num_parts: int, num_dropped: int, num_old: int, num_ref: int, *records: Any
    ) -> tuple[Any, Any, MetricMap]:
        """`records`: `num_parts` RolloutBatches, as many RewardBatches, `num_dropped` of both that were not kept, the LogprobBatches of old and of
        ref, RewardBatches of greedy responses.

        Returns:
            A reference to the TrainBatch; one to the ScoredBatch of what was not kept, or None; and the metrics of samples and advantages.
        """
        remaining = iter(records)

        def take(count: int) -> list[Any]:
            return list(itertools.islice(remaining, count))

        rollouts, rewards = (
            RolloutBatch.concatenate(take(num_parts)),
            RewardBatch.concatenate(take(num_parts)),
        )
        dropped = joined(take(num_dropped), take(num_dropped))
        old, ref, parts = take(num_old), take(num_ref), list(remaining)
        greedy = RewardBatch.concatenate(parts) if parts else None
        batch, metrics = self._assigner.assign(rollouts, rewards, old, ref, greedy)
        return (
            ray.put(batch),
            None if dropped is None else ray.put(dropped),
            batch_metrics(batch, dropped, greedy) | metrics,
        )

    def state(self) -> dict[str, Any]:
        """See `CreditAssigner`."""
        return self._assigner.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """See `CreditAssigner`."""
        self._assigner.load_state(state)

    def write_rollouts(
        self,
        batch: TrainBatch,
        path: str,
        dropped: ScoredBatch | None,
        advantages: NDArray[np.float32] | None,
    ) -> None:
        """Write everything that was sampled in one step as Parquet."""
        write_rollouts(batch, Path(path), dropped=dropped, advantages=advantages)

    def metrics(self) -> dict[str, Metric]:
        """Peak memory."""
        return {"memory/advantage": maximum(peak_memory_gib())}


def joined(rollouts: Sequence[RolloutBatch], rewards: Sequence[RewardBatch]) -> ScoredBatch | None:
    """Parts as one batch; None where there is none."""
    if not rollouts:
        return None
    return ScoredBatch(
        rollouts=RolloutBatch.concatenate(rollouts), rewards=RewardBatch.concatenate(rewards)
    )


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
        dropped_rollouts: Sequence[Handle[RolloutBatch]] = (),
        dropped_rewards: Sequence[Handle[RewardBatch]] = (),
    ) -> CreditedBatch:
        """See `ports.AdvantageComputer`."""
        kept, dropped = (*rollouts, *rewards), (*dropped_rollouts, *dropped_rewards)
        batch, dropped_batch, metrics = await self._actor.credit.remote(
            len(rollouts),
            len(dropped_rollouts),
            len(old_logprobs),
            len(ref_logprobs),
            *(*kept, *dropped, *old_logprobs, *ref_logprobs, *greedy_rewards),
        )
        return CreditedBatch(batch=batch, dropped=dropped_batch, metrics=metrics)

    async def state(self) -> dict[str, Any]:
        """See `ports.AdvantageComputer`."""
        return await self._actor.state.remote()

    async def load_state(self, state: dict[str, Any]) -> None:
        """See `ports.AdvantageComputer`."""
        await self._actor.load_state.remote(state)

    async def write_rollouts(
        self,
        batch: Handle[TrainBatch],
        path: Path,
        *,
        dropped: Handle[ScoredBatch] | None = None,
        advantages: Handle[NDArray[np.float32]] | None = None,
    ) -> None:
        """See `ports.AdvantageComputer`."""
        await self._actor.write_rollouts.remote(batch, str(path), dropped, advantages)

    async def metrics(self) -> dict[str, Metric]:
        """Peak memory."""
        return await self._actor.metrics.remote()
