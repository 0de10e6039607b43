"""The worker of expert iteration that chooses the responses to learn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from rlsys.config.expert_iteration import ExpertIterationRunConfig
from rlsys.data.batches import RewardBatch, RolloutBatch, ScoredBatch
from rlsys.data.rollout_files import write_rollouts
from rlsys.driver.expert_selection import choose_responses
from rlsys.driver.ports import Handle, KeptResponses
from rlsys.metrics import Metric, maximum, peak_memory_gib


class ResponseFilter:
    """The Ray actor around `choose_responses`."""

    def __init__(self, config: ExpertIterationRunConfig) -> None:
        self._settings = config.expert

    def choose(self, rollouts: Sequence[Any], rewards: Sequence[Any]) -> KeptResponses:
        """See `ports.ResponseFilter`."""
        # The handles are object references inside of sequences, which Ray does not resolve.
        chosen = choose_responses(
            RolloutBatch.concatenate(ray.get(list(rollouts))),
            RewardBatch.concatenate(ray.get(list(rewards))),
            self._settings,
        )
        return KeptResponses(
            responses=len(chosen.batch),
            batch=ray.put(chosen.batch),
            sampled=ray.put(chosen.sampled),
            metrics=chosen.metrics,
        )

    def write_rollouts(self, sampled: ScoredBatch, path: str) -> None:
        """Write everything that was sampled in one step as Parquet."""
        write_rollouts(sampled, Path(path))

    def metrics(self) -> dict[str, Metric]:
        """Return the peak memory of this process."""
        return {"memory/filter": maximum(peak_memory_gib())}


class ResponseFilterClient:
    """The `ports.ResponseFilter` over the actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def choose(
        self, rollouts: Sequence[Handle[RolloutBatch]], rewards: Sequence[Handle[RewardBatch]]
    ) -> KeptResponses:
        """See `ports.ResponseFilter`."""
        return await self._actor.choose.remote(list(rollouts), list(rewards))

    async def write_rollouts(self, sampled: Handle[ScoredBatch], path: Path) -> None:
        """See `ports.ResponseFilter`."""
        await self._actor.write_rollouts.remote(sampled, str(path))

    async def metrics(self) -> dict[str, Metric]:
        """See `ports.ResponseFilter`."""
        return await self._actor.metrics.remote()
