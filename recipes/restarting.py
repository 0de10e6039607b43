"""Restarts of a run inside of its process: what outlives its actors, and how they come back.

    failure -> evidence -> all actors end -> pause -> resources -> actors -> newest checkpoint

The session and the loop know nothing of it, but that a failure may not be the end.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from rlsys.config import ConfigError
from rlsys.config.secrets import redacted
from rlsys.driver.restarts import Failure, FailureKind, Restart, Restarts, number_of
from rlsys.driver.watchdog import Watchdog

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from recipes.prepared_run import Prepared
    from rlsys.driver.faults import FaultLog
    from rlsys.run.checkpoints import Checkpoint
    from workers.cluster import Cluster
    from workers.failures import Victim

    PreparedT = TypeVar("PreparedT", bound=Prepared)

ERROR_FILE = "error.txt"
RESOURCES_EVERY_S = 2.0  # between two looks whether lost resources are there again

# The kinds of `rlsys.run.fault_events`.
FAULT_OF: Mapping[FailureKind, str] = {
    "lost process": "training_group",
    "out of memory": "out_of_memory",
    "hang": "phase_timeout",
}

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Recovery:
    """What outlives the actors and the session of a run."""

    restarts: Restarts
    watchdog: Watchdog
    faults: FaultLog
    initial: Mapping[str, Any] | None = None  # states before the first step, for a new beginning
    victim: Victim | None = None  # of the last failure; None: not known
    trains: bool = False  # whether a loop has started, so that there may be results

    @classmethod
    def of(cls, prepared: Prepared, console: Console) -> Recovery:
        """Return that of a run; its watchdog knows the times of the steps before a resume."""
        from rlsys.driver.faults import FaultLog
        from rlsys.run.fault_events import Fault, FaultFile, count_faults
        from rlsys.run.observers.metrics_log import read_metrics
        from workers.failures import failure_kind

        directory, trainer = prepared.directory, prepared.config.trainer
        watchdog = Watchdog(trainer.phase_timeout_s)
        if prepared.resume:
            watchdog.learn(record.values for record in read_metrics(directory.metrics))

        file = FaultFile(directory)

        def show(fault: Fault) -> None:  # until there is a session
            file.on_fault(fault)
            say(fault.line(), console)

        faults = FaultLog(count_faults(directory.faults))
        faults.listen(show)
        # A resumed run adds to the evidence of the failures before.
        earlier = max((number_of(one.name) for one in directory.failures.glob("*")), default=0)
        restarts = Restarts(trainer.max_restarts, failure_kind, earlier=earlier)
        return cls(restarts=restarts, watchdog=watchdog, faults=faults)

    @property
    def restarted(self) -> bool:
        """Whether the actors that run now are not the first ones."""
        return bool(self.restarts.failures)

    def begin_start(self, cluster: Cluster, failures: Path) -> None:
        """Watch the start of the actors, and from then on the session.

        Args:
            failures: directory for the stacks of a hang.
        """
        from workers.stack_dumps import dump_stacks

        async def collect_evidence() -> str:
            return await dump_stacks(cluster.actors, failures / self.restarts.next_name)

        self.victim = None
        step = self.restarts.begin_start()
        self.faults.enter(step, "start")
        self.watchdog.begin_start(step)
        self.watchdog.collect_evidence = collect_evidence

    def save_evidence(self, error: Exception, cluster: Cluster, failures: Path) -> None:
        """Write the traceback of a failure, and find out which actor died."""
        from workers.failures import dead_actor, failure_kind, victim_of

        if not self.restarts.is_failure(error):
            return
        directory = failures / self.restarts.next_name
        try:
            directory.mkdir(parents=True, exist_ok=True)
            text = "".join(traceback.format_exception(error))
            (directory / ERROR_FILE).write_text(redacted(text))
            self.victim = victim_of(error, cluster.actors)
            if self.victim is None and failure_kind(error) == "lost process":
                # A supervised actor may be dead as well, but is restarted by itself.
                others = cluster.actors.keys() - cluster.supervised.keys()
                self.victim = dead_actor({name: cluster.actors[name] for name in sorted(others)})
        except Exception:  # the failure itself matters more
            logger.exception("the evidence of a failure could not be saved in %s", directory)

    def record(self, failure: Failure, action: str, evidence: Path) -> None:
        """Count a failure in the metrics, and show it with what is done about it."""
        event, reason = failure.kind, failure.message
        if failure.kind == "out of memory":  # Ray's message is a paragraph about its settings
            reason = "a process was ended, or an allocation failed, since memory ran out"
        if self.victim:
            event, reason = f"{self.victim.name} died", self.victim.reason
        details = evidence / failure.name
        self.faults.record(FAULT_OF[failure.kind], event, reason, f"{action}; details in {details}")


async def begin_restart(
    prepared: PreparedT, error: Exception, console: Console
) -> PreparedT | None:
    """Announce a restart, wait for its pause, and return the run at its newest checkpoint.

    Return None where there is no restart, and say why unless the machinery did not fail.
    """
    assert prepared.recovery is not None, "a run that restarts has one"
    recovery, failures = prepared.recovery, prepared.directory.failures
    restarts = recovery.restarts
    if not restarts.is_failure(error):
        return None

    checkpoint = await asyncio.to_thread(prepared.store.latest)
    refusal = restarts.refusal(error)
    if refusal is None and checkpoint is None and prepared.checkpoint is not None:
        refusal = f"no undamaged checkpoint is left in {prepared.directory.checkpoints}"
    if refusal is not None:
        recovery.record(restarts.note(error), f"no restart: {refusal}", failures)
        return None

    restart = restarts.begin(error)
    recovery.record(restart.failure, _announcement(restart, checkpoint), failures)
    await asyncio.sleep(restart.pause_s)
    return replace(prepared, checkpoint=checkpoint)


def _announcement(restart: Restart, checkpoint: Checkpoint | None) -> str:
    origin = f"checkpoint {checkpoint.path}" if checkpoint else "the beginning"
    steps = f"{restart.lost_steps} step{'s' if restart.lost_steps != 1 else ''}"
    return (
        f"restart {restart.failure.number} of all actors, from {origin} ({steps} lost), in "
        f"{restart.pause_s:g} s"
    )


async def reconnect(prepared: PreparedT, console: Console) -> tuple[PreparedT, Cluster]:
    """Connect and reserve again, with fewer generation workers where resources stay away.

    It waits at most `cluster.recovery_timeout_s` for all of them.

    Raises:
        ConfigError: there is no place even for one generation worker.
    """
    from workers.cluster import CapacityError

    limit = prepared.config.cluster.recovery_timeout_s
    began, waiting = time.monotonic(), False
    while True:
        try:
            return prepared, prepared.connect()
        except CapacityError as error:
            if time.monotonic() - began >= limit:
                return _with_fewer_workers(prepared, error, console)
            if not waiting:
                say(f"waiting at most {limit:g} s for resources: {error}", console)
            waiting = True
        await asyncio.sleep(RESOURCES_EVERY_S)


def _with_fewer_workers(
    prepared: PreparedT, error: ConfigError, console: Console
) -> tuple[PreparedT, Cluster]:
    """Connect with as many generation workers as there is a place for.

    Raises:
        ConfigError: `error`, if there is none for one.
    """
    from workers.cluster import CapacityError

    wanted = prepared.generation_workers
    for workers in range(wanted - 1, 0, -1):
        fewer = prepared.with_generation_workers(workers)
        try:
            cluster = fewer.connect()
        except CapacityError:
            continue
        say(f"going on with {workers} of {wanted} generation workers: {error}", console)
        return fewer, cluster
    raise error


def say(line: str, console: Console) -> None:
    """Print a line on the console, and write it to the run's log."""
    logger.warning("%s", line)
    console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
