"""A run that was checked and may start: what the command, the restarts and each kind share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar

from rlsys.config import RootConfig
from rlsys.config.command_line import Invocation
from rlsys.config.hardware import Hardware, detect_hardware

if TYPE_CHECKING:
    from rich.console import Console

    from recipes.restarting import Recovery
    from rlsys.config import RunConfig
    from rlsys.driver.faults import FaultLog
    from rlsys.driver.session import HeldOutEvaluation, Session
    from rlsys.run.checkpoints import Checkpoint, CheckpointStore
    from rlsys.run.compute_dtype import Machine, ProductSpeed
    from rlsys.run.directory import RunDirectory
    from rlsys.run.observers.console import Progress
    from rlsys.run.observers.observer import Outcome
    from rlsys.run.observers.run_status import StatusWriter
    from rlsys.run.step_time import StepEstimate
    from workers.cluster import Cluster

RootT = TypeVar("RootT", bound=RootConfig)


class Loop(Protocol):
    """The training loop of some kind of run."""

    async def run(self) -> Outcome: ...


@dataclass(frozen=True, kw_only=True)
class Started:
    """A loop whose workers are ready, and its session."""

    loop: Loop
    session: Session


@dataclass(frozen=True, kw_only=True)
class Prepared(Generic[RootT]):
    """A run that was checked and may start."""

    config: RootT
    resume: bool
    store: CheckpointStore
    checkpoint: Checkpoint | None  # to resume from
    directory: RunDirectory
    plan: str  # for a dry run
    changes: tuple[str, ...]  # in the configuration of a resumed run
    notices: tuple[str, ...]  # on the data, the precision and the time of a step
    reasons: tuple[str, ...]  # of choices that depend on the machine, for config.yaml
    warnings: tuple[str, ...]
    speed: ProductSpeed | None  # of matrix products on this machine
    estimate: StepEstimate | None  # of a step's time
    recovery: Recovery | None = None  # None: not started yet

    @property
    def online(self) -> RunConfig:
        """The RL run with the same model, engine and rewards."""
        raise NotImplementedError

    def connect(self) -> Cluster:
        """Connect to Ray and reserve the resources of the run."""
        raise NotImplementedError

    async def start(
        self, cluster: Cluster, status: StatusWriter, console: Console, faults: FaultLog
    ) -> Started:
        """Start all actors, and build the loop and its session; both write to `faults`."""
        raise NotImplementedError

    @property
    def unreserved(self) -> Mapping[str, int]:
        """How many actors there are of the roles that reserve nothing."""
        raise NotImplementedError

    def places(self) -> str:
        """Join the cluster, find the place of every actor, and give all places back.

        Raises:
            ConfigError: an actor has no place; the message names what each node lacks.
        """
        cluster = self.connect()
        try:
            return cluster.places(self.unreserved)
        finally:
            cluster.shutdown()

    @property
    def generation_workers(self) -> int:
        """The number of generation workers; 0 where nothing is sampled."""
        generation = getattr(self.config, "generation", None)
        return generation.workers if generation else 0

    def with_generation_workers(self, workers: int) -> Self:
        """Return the run with another number of generation workers."""
        generation = getattr(self.config, "generation")  # noqa: B009  (not every kind has one)
        changed = generation.model_copy(update={"workers": workers})
        return replace(self, config=self.config.model_copy(update={"generation": changed}))

    def open_session(
        self,
        progress: Progress,
        status: StatusWriter,
        evaluator: HeldOutEvaluation | None,
        faults: FaultLog,
    ) -> Session:
        """Return the session of the run: its observers, evaluation and checkpoints."""
        from rlsys.driver.session import Session
        from rlsys.run.fault_events import FaultFile
        from rlsys.run.observers.html_report import ReportWriter
        from rlsys.run.observers.metrics_log import MetricsLog
        from rlsys.run.step_time import StepTimeWatch, likely_causes
        from workers.ray_metrics import RayMetrics

        metrics = MetricsLog(self.directory)
        slowness = StepTimeWatch(
            self.estimate,
            lambda: likely_causes(self.online, detect_hardware(), self.speed),
            progress.notice,
        )
        gauges = RayMetrics(self.directory.path.resolve().name, self.config.recipe)
        report, events = ReportWriter(self.directory), FaultFile(self.directory)
        observers = [metrics, status, progress, events, report, slowness, gauges]
        watchdog = restarts = None
        if self.recovery:
            watchdog, restarts = self.recovery.watchdog, self.recovery.restarts
            observers += [watchdog, restarts]
        session = Session(self.config, self.store, observers, evaluator, faults, watchdog, restarts)
        session.register("metrics_position", metrics)
        return session


def machines_of(config: RunConfig, model_directory: Path) -> tuple[Machine, ...]:
    """Return the machines of the cluster that a run joins; none where it starts Ray itself.

    Raises:
        ConfigError: no cluster answers.
    """
    if config.cluster.joined_address is None:
        return ()
    from workers.cluster_machines import machines_of_cluster

    return machines_of_cluster(config, model_directory)


Prepare = Callable[[Invocation[RootT], Hardware, "Console"], Prepared[RootT] | None]
