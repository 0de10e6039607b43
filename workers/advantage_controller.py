"""The advantage controller: it joins the records of a batch and estimates its advantages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from rlsys.config import RunConfig
from rlsys.data.batches import ScoredBatch
from rlsys.data.rollout_files import write_rollouts
from rlsys.driver.credit_assignment import CreditAssigner
from rlsys.driver.ports import CreditedBatch, Handle, StepHandles
from rlsys.metrics import Metric, MetricMap, maximum, peak_memory_gib
from rlsys.plugins import load_plugins
from workers.supervision import SupervisedActor, supervised


@dataclass(frozen=True, kw_only=True)
class CreditFacts:
    """The small part of the result of a step."""

    has_dropped: bool
    metrics: MetricMap
    state: dict[str, Any]  # of the controller, after the step


class AdvantageController:
    """The Ray actor around a `CreditAssigner`."""

    def __init__(self, config: RunConfig) -> None:
        load_plugins(config.plugins)
        self._assigner = CreditAssigner(config)

    def credit(self, step: StepHandles) -> tuple[ScoredBatch, ScoredBatch | None, CreditFacts]:
        """Return the batch, the dropped one, and what the driver opens.

        They are results of their own, which the caller owns: what an actor itself puts into the
        object store is lost when it dies.
        """
        # The handles are object references inside of `step`, which Ray does not resolve by itself.
        references: list[Any] = step.all()
        records = dict(zip(references, ray.get(references), strict=True))

        credited = self._assigner.credit(step.opened(records))
        facts = CreditFacts(
            has_dropped=credited.dropped is not None,
            metrics=credited.metrics,
            state=self._assigner.state(),
        )
        return credited.batch, credited.dropped, facts

    def state(self) -> dict[str, Any]:
        """See `CreditAssigner`."""
        return self._assigner.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """See `CreditAssigner`."""
        self._assigner.load_state(state)

    def write_rollouts(
        self,
        batch: ScoredBatch,
        path: str,
        dropped: ScoredBatch | None,
        advantages: NDArray[np.float32] | None,
    ) -> None:
        """Write everything that was sampled in one step as Parquet."""
        write_rollouts(batch, Path(path), dropped=dropped, advantages=advantages)

    def metrics(self) -> dict[str, Metric]:
        """Return the peak memory of this process."""
        return {"memory/advantage": maximum(peak_memory_gib())}


class AdvantageControllerClient:
    """The `ports.AdvantageComputer` over the actor.

    Where the actor dies, its successor gets the state after the last complete step.
    """

    def __init__(self, actor: SupervisedActor | Any) -> None:
        self._actor = supervised(actor, "the advantage controller")
        self._actor.prepare_with(self._restore)
        self._state: dict[str, Any] | None = None  # None: that of a new controller

    async def _restore(self, actor: Any) -> None:
        if self._state is not None:
            await actor.load_state.remote(self._state)

    async def credit(self, step: StepHandles) -> CreditedBatch:
        """See `ports.AdvantageComputer`."""

        async def attempt(actor: Any) -> tuple[CreditedBatch, CreditFacts]:
            batch, dropped, small = actor.credit.options(num_returns=3).remote(step)
            facts: CreditFacts = await small
            credited = CreditedBatch(
                batch=batch,
                dropped=dropped if facts.has_dropped else None,
                metrics=facts.metrics,
            )
            return credited, facts

        credited, facts = await self._actor.run(attempt)
        self._state = facts.state
        return credited

    async def state(self) -> dict[str, Any]:
        """See `ports.AdvantageComputer`."""
        return await self._actor.call("state")

    async def load_state(self, state: dict[str, Any]) -> None:
        """See `ports.AdvantageComputer`."""
        await self._actor.call("load_state", state)
        self._state = state

    async def write_rollouts(
        self,
        batch: Handle[ScoredBatch],
        path: Path,
        *,
        dropped: Handle[ScoredBatch] | None = None,
        advantages: Handle[NDArray[np.float32]] | None = None,
    ) -> None:
        """See `ports.AdvantageComputer`."""
        await self._actor.call("write_rollouts", batch, str(path), dropped, advantages)

    async def metrics(self) -> dict[str, Metric]:
        """See `ports.AdvantageComputer`."""
        return await self._actor.call("metrics")
