"""Training of a prepared run: actors, loop, signals, restarts, and how it ends."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from recipes.restarting import Recovery, begin_restart, reconnect
from rlsys.config import ConfigError, RootConfig
from rlsys.driver.watchdog import PhaseTimeoutError

if TYPE_CHECKING:
    from types import FrameType

    from rich.console import Console

    from recipes.prepared_run import Prepared, Started
    from rlsys.run.directory import RunDirectory
    from rlsys.run.observers.observer import Outcome
    from rlsys.run.observers.run_status import StatusWriter
    from rlsys.run.run_log import HeldLog
    from rlsys.run.storage import RunStorage
    from workers.cluster import Cluster

RootT = TypeVar("RootT", bound=RootConfig)

TASKS_END_S = 5.0  # for the tasks of a session to be cancelled
SAME_REQUEST_S = 2.0  # a scheduler may signal a process and its parent, which passes it on


@dataclass(frozen=True, kw_only=True)
class _Surroundings:
    """What outlives the actors of a run, and where it tells what happens."""

    recovery: Recovery
    status: StatusWriter
    log: HeldLog
    console: Console
    storage: RunStorage | None


async def train(
    prepared: Prepared, log: HeldLog, console: Console, storage: RunStorage | None
) -> int:
    """Train, with restarts from the newest checkpoint where they help; return the exit code.

    A resume changes no file before the loop starts.
    """
    from rlsys.run.observers.console import print_summary
    from rlsys.run.observers.metrics_log import read_metrics
    from rlsys.run.observers.run_status import StatusWriter
    from workers.local_ray import interrupt_on_sigterm

    began = time.monotonic()
    config, directory = prepared.config, prepared.directory
    interrupt_on_sigterm()
    console.print(
        f"{config.recipe}: {config.model.path}, starting Ray and the actors ...", highlight=False
    )
    status = StatusWriter(directory, held=prepared.resume)
    recovery = Recovery.of(prepared, console)
    prepared = replace(prepared, recovery=recovery)
    around = _Surroundings(
        recovery=recovery, status=status, log=log, console=console, storage=storage
    )

    try:
        ended = await _with_restarts(prepared, around)
    except (asyncio.CancelledError, KeyboardInterrupt):
        if recovery.trains or not prepared.resume:
            status.interrupt("left while its actors did not run; continue with --resume")
        raise
    if ended is None:
        return 1

    outcome, step = ended
    print_summary(console, read_metrics(directory.metrics), directory, time.monotonic() - began)
    if outcome == "finished":
        return 0
    saved = "saved; " if step else ""
    stopped = f"stopped after step {step} of {config.trainer.steps}: {saved}continue with"
    print_lines(console, [f"{stopped} --run.directory {directory.path} --resume"])
    return 130


def keep_logs(directory: RunDirectory, console: Console) -> None:
    """Collect what the actors printed, before they are killed."""
    from workers.actor_logs import keep_actor_logs

    missed = keep_actor_logs(directory.logs)
    warn([f"output of actors was not collected: {line}" for line in missed], console)


async def _with_restarts(prepared: Prepared, around: _Surroundings) -> tuple[Outcome, int] | None:
    """Return how the run ended and its last step; None where it failed, which is reported.

    Raises:
        ConfigError: refused at set-up, so that there are no results.
    """
    recovery = around.recovery
    while True:
        try:
            return await _train_once(prepared, around)
        except Exception as error:
            if isinstance(error, ConfigError) and not (recovery.trains or recovery.restarted):
                raise
            # No session is there to finish its step.
            _end_stopping_on_signals()
            restarted = await begin_restart(prepared, error, around.console)
            if restarted is None:
                around.status.fail(f"{type(error).__name__}: {error}")
                around.log.end_hold()
                _report_failure(error, prepared.directory, around.console)
                return None
            prepared = restarted


async def _train_once(prepared: Prepared, around: _Surroundings) -> tuple[Outcome, int]:
    """Start the actors, train until the end or a failure, and stop the actors.

    Returns:
        How the run ended, and its last step.
    """
    from workers.reward_worker import RewardOutput

    directory, recovery, console = prepared.directory, around.recovery, around.console
    earlier_tasks = asyncio.all_tasks()
    # Not in a thread, although it blocks: Ray sets its signal handlers in the main thread only.
    if recovery.restarted:
        prepared, cluster = await reconnect(prepared, console)
    else:
        cluster = prepared.connect()
    cluster.faults = recovery.faults
    reward_output = RewardOutput()

    try:
        recovery.begin_start(cluster, directory.failures)
        starting = _start(prepared, cluster, around)
        started = await recovery.watchdog.guard(starting)
        session = started.session
        reward_output.follow(cluster.supervised_of("reward"))
        if prepared.resume and not recovery.trains:
            directory.create(prepared.config, prepared.reasons)
        recovery.trains = True
        around.log.end_hold()
        _stop_on_signals(session.request_stop, console)
        if around.storage is not None:
            _stop_on_loss(around.storage, session.request_stop)
            around.storage.begin()
        return await started.loop.run(), session.step
    except Exception as error:
        recovery.save_evidence(error, cluster, directory.failures)
        if isinstance(error, PhaseTimeoutError):
            await _end_tasks(earlier_tasks)
            await _kill_processes(cluster)
        raise
    finally:
        try:
            await reward_output.finish()
            await _end_tasks(earlier_tasks)
            if recovery.trains or not isinstance(sys.exception(), ConfigError):
                keep_logs(directory, console)
        finally:
            cluster.shutdown()


async def _kill_processes(cluster: Cluster) -> None:
    """Kill the processes of a hang, as far as Ray still says which they are."""
    from workers.stack_dumps import kill_processes

    try:
        await kill_processes(cluster.actors)
    except Exception:  # the hang itself decides what follows
        logging.getLogger(__name__).exception("the processes could not be killed one by one")


def _stop_on_loss(storage: RunStorage, request_stop: Callable[[], None]) -> None:
    """Stop the session where another process takes the storage, or did so before it started."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        with suppress(RuntimeError):  # the event loop has ended with the run
            loop.call_soon_threadsafe(request_stop)

    storage.on_loss = stop
    if storage.is_lost:
        request_stop()


async def _end_tasks(earlier: set[asyncio.Task[Any]]) -> None:
    """Cancel the tasks that are left of a session: they must not see how its actors end."""
    left = asyncio.all_tasks() - earlier - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=TASKS_END_S)


async def _start(prepared: Prepared, cluster: Cluster, around: _Surroundings) -> Started:
    """Start the actors, and go to the run's checkpoint, or to the beginning without one."""
    recovery = around.recovery
    started = await prepared.start(cluster, around.status, around.console, recovery.faults)
    session = started.session
    if prepared.checkpoint:
        await session.restore(prepared.checkpoint)
    elif recovery.initial is None:
        recovery.initial = await session.states()
    else:
        await session.load_states(recovery.initial)
    return started


def _report_failure(error: Exception, directory: RunDirectory, console: Console) -> None:
    """Log the traceback, update the report, and print the error and how to continue."""
    from rlsys.run.observers.html_report import update_report

    update_report(directory)
    logging.getLogger(__name__).error("the run failed", exc_info=error)
    message = str(error).strip().splitlines()
    console.print(
        f"the run failed: {message[-1] if message else type(error).__name__}",
        style="red",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    console.print(
        f"details in {directory.log}, output of the actors in {directory.logs}. Continue with "
        f"--run.directory {directory.path} --resume",
        highlight=False,
        soft_wrap=True,
    )


def _stop_on_signals(request_stop: Callable[[], None], console: Console) -> None:
    """Stop after the current step at the first Ctrl-C or SIGTERM, and at once at a later one."""
    loop = asyncio.get_running_loop()
    requests: list[float] = []

    def stop_at_once(number: int, frame: FrameType | None) -> None:
        if time.monotonic() - requests[0] > SAME_REQUEST_S:
            signal.default_int_handler(number, frame)

    def stop(number: signal.Signals) -> None:
        if requests:  # the loop also sees the signals that `stop_at_once` handles
            return
        requests.append(time.monotonic())
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, stop_at_once)
        console.print("stopping after this step; once more to stop at once", highlight=False)
        request_stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)


def _end_stopping_on_signals() -> None:
    """Let Ctrl-C and SIGTERM end the process at once."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.remove_signal_handler(number)
        signal.signal(number, signal.default_int_handler)


def print_lines(console: Console, lines: Sequence[str]) -> None:
    """Print lines on the console, and write them to the run's log where there is one."""
    for line in lines:
        logging.getLogger(__name__).info("%s", line)
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def warn(warnings: Sequence[str], console: Console) -> None:
    """Print warnings on the console, and write them to the run's log."""
    for warning in warnings:
        logging.getLogger(__name__).info("warning: %s", warning)
        console.print(
            f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True
        )
