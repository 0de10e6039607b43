"""The advantage controller: it joins the records of a batch and estimates its advantages."""

from __future__ import annotations

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
from rlsys.metrics import Metric, maximum, peak_memory_gib
from rlsys.plugins import load_plugins


class AdvantageController:
    """The Ray actor around a `CreditAssigner`."""

    def __init__(self, config: RunConfig) -> None:
        load_plugins(config.plugins)
        self._assigner = CreditAssigner(config)

    def credit(self, step: StepHandles) -> CreditedBatch:
        """See `ports.AdvantageComputer`."""
        # The handles are object references inside of `step`, which Ray does not resolve by itself.
        references: list[Any] = step.all()
        records = dict(zip(references, ray.get(references), strict=True))

        credited = self._assigner.credit(step.opened(records))
        return CreditedBatch(
            batch=ray.put(credited.batch),
            dropped=None if credited.dropped is None else ray.put(credited.dropped),
            metrics=credited.metrics,
        )

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
    """The `ports.AdvantageComputer` over the actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def credit(self, step: StepHandles) -> CreditedBatch:
        """See `ports.AdvantageComputer`."""
        return await self._actor.credit.remote(step)

    async def state(self) -> dict[str, Any]:
        """See `ports.AdvantageComputer`."""
        return await self._actor.state.remote()

    async def load_state(self, state: dict[str, Any]) -> None:
        """See `ports.AdvantageComputer`."""
        await self._actor.load_state.remote(state)

    async def write_rollouts(
        self,
        batch: Handle[ScoredBatch],
        path: Path,
        *,
        dropped: Handle[ScoredBatch] | None = None,
        advantages: Handle[NDArray[np.float32]] | None = None,
    ) -> None:
        """See `ports.AdvantageComputer`."""
        await self._actor.write_rollouts.remote(batch, str(path), dropped, advantages)

    async def metrics(self) -> dict[str, Metric]:
        """See `ports.AdvantageComputer`."""
        return await self._actor.metrics.remote()
