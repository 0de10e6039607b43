"""The worker of expert iteration that chooses the responses to learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from rlsys.config.expert_iteration import ExpertIterationRunConfig
from rlsys.data.batches import RewardBatch, RolloutBatch, ScoredBatch
from rlsys.data.example_stream import ExampleBatch
from rlsys.data.rollout_files import write_rollouts
from rlsys.driver.expert_selection import choose_responses
from rlsys.driver.ports import Handle, KeptResponses
from rlsys.metrics import Metric, MetricMap, maximum, peak_memory_gib
from workers.supervision import SupervisedActor, supervised


@dataclass(frozen=True, kw_only=True)
class ChoiceFacts:
    """The small part of the result of a step."""

    responses: int
    metrics: MetricMap


class ResponseFilter:
    """The Ray actor around `choose_responses`."""

    def __init__(self, config: ExpertIterationRunConfig) -> None:
        self._settings = config.expert

    def choose(
        self, rollouts: Sequence[Any], rewards: Sequence[Any]
    ) -> tuple[ExampleBatch, ScoredBatch, ChoiceFacts]:
        """Return the batch, everything that was sampled, and what the driver opens.

        They are results of their own, which the caller owns: what an actor itself puts into the
        object store is lost when it dies.
        """
        # The handles are object references inside of sequences, which Ray does not resolve.
        chosen = choose_responses(
            RolloutBatch.concatenate(ray.get(list(rollouts))),
            RewardBatch.concatenate(ray.get(list(rewards))),
            self._settings,
        )
        facts = ChoiceFacts(responses=len(chosen.batch), metrics=chosen.metrics)
        return chosen.batch, chosen.sampled, facts

    def write_rollouts(self, sampled: ScoredBatch, path: str) -> None:
        """Write everything that was sampled in one step as Parquet."""
        write_rollouts(sampled, Path(path))

    def metrics(self) -> dict[str, Metric]:
        """Return the peak memory of this process."""
        return {"memory/filter": maximum(peak_memory_gib())}


class ResponseFilterClient:
    """The `ports.ResponseFilter` over the actor, which has no state."""

    def __init__(self, actor: SupervisedActor | Any) -> None:
        self._actor = supervised(actor, "the response filter")

    async def choose(
        self, rollouts: Sequence[Handle[RolloutBatch]], rewards: Sequence[Handle[RewardBatch]]
    ) -> KeptResponses:
        """See `ports.ResponseFilter`."""

        async def attempt(actor: Any) -> KeptResponses:
            results = actor.choose.options(num_returns=3).remote(list(rollouts), list(rewards))
            batch, sampled, small = results
            facts: ChoiceFacts = await small
            return KeptResponses(
                responses=facts.responses, batch=batch, sampled=sampled, metrics=facts.metrics
            )

        return await self._actor.run(attempt)

    async def write_rollouts(self, sampled: Handle[ScoredBatch], path: Path) -> None:
        """See `ports.ResponseFilter`."""
        await self._actor.call("write_rollouts", sampled, str(path))

    async def metrics(self) -> dict[str, Metric]:
        """See `ports.ResponseFilter`."""
        return await self._actor.call("metrics")
