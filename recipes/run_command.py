"""The command of a recipe: everything from the command line to the summary of the run.

    command line -> checks -> Ray -> actors -> loop -> summary

It is the same for every kind of run; a kind brings a function that checks its configuration and
data and returns a subclass of `Prepared`, which starts its workers and loop. torch, Ray and other
slow imports come after the command line was checked, so they are inside of the functions.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, Self, TypeVar

from recipes.restarting import Recovery, begin_restart, reconnect
from rlsys.config import ConfigError, RootConfig
from rlsys.config.command_line import HelpRequested, Invocation, parse
from rlsys.config.errors import as_config_error
from rlsys.config.hardware import Hardware, detect_hardware
from rlsys.driver.watchdog import PhaseTimeoutError
from rlsys.run.run_log import HeldLog, log_to

if TYPE_CHECKING:
    from rich.console import Console

    from rlsys.config import RunConfig
    from rlsys.driver.faults import FaultLog
    from rlsys.driver.session import HeldOutEvaluation, Session
    from rlsys.run.checkpoints import Checkpoint, CheckpointStore
    from rlsys.run.compute_dtype import ProductSpeed
    from rlsys.run.directory import RunDirectory
    from rlsys.run.observers.console import Progress
    from rlsys.run.observers.observer import Outcome
    from rlsys.run.observers.run_status import StatusWriter
    from rlsys.run.step_time import StepEstimate
    from workers.cluster import Cluster

TASKS_END_S = 5.0  # for the tasks of a session to be cancelled

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

        metrics = MetricsLog(self.directory)
        slowness = StepTimeWatch(
            self.estimate,
            lambda: likely_causes(self.online, detect_hardware(), self.speed),
            progress.notice,
        )
        report, events = ReportWriter(self.directory), FaultFile(self.directory)
        observers = [metrics, status, progress, events, report, slowness]
        watchdog = restarts = None
        if self.recovery:
            watchdog, restarts = self.recovery.watchdog, self.recovery.restarts
            observers += [watchdog, restarts]
        session = Session(self.config, self.store, observers, evaluator, faults, watchdog, restarts)
        session.register("metrics_position", metrics)
        return session


Prepare = Callable[[Invocation[RootT], Hardware, "Console"], Prepared[RootT] | None]


def run_command(
    recipe: Callable[[Hardware], RootT],
    prepare: Prepare[RootT],
    arguments: Sequence[str] | None = None,
) -> NoReturn:
    """Run a recipe as a command, and exit: 0 done, 2 invalid input, 130 interrupted, 1 failed.

    Args:
        prepare: checks everything that can be checked before Ray starts, without changing a file;
            it returns None where a resumed run is already complete.
    """
    hardware = detect_hardware()

    def run() -> int:
        invocation = parse(recipe(hardware), sys.argv[1:] if arguments is None else arguments)
        return _run(invocation, prepare, hardware)

    exit_with_code_of(run, continued="a saved run")


def exit_with_code_of(run: Callable[[], int], *, continued: str) -> NoReturn:
    """Exit with the code that `run` returns, 0 after help, 130 if interrupted, 2 if refused.

    Args:
        continued: what --resume continues after an interrupt.
    """
    try:
        code = run()
    except HelpRequested as help_requested:
        print(help_requested)
        code = 0
    except KeyboardInterrupt:
        print(
            f"interrupted; {continued} can be continued with --run.directory and --resume",
            file=sys.stderr,
        )
        code = 130
    except ConfigError as error:
        lines = str(error).splitlines()
        print("\n".join(f"error: {line}" for line in lines), file=sys.stderr)
        code = 2
    sys.exit(code)


def _run(invocation: Invocation[RootT], prepare: Prepare[RootT], hardware: Hardware) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from rich.console import Console

    console = Console()
    with as_config_error():  # preparation only checks input
        prepared = prepare(invocation, hardware, console)
    if prepared is None:
        return 0
    if invocation.dry_run:
        print(prepared.plan)
        _print_start(prepared, console)
        return 0

    prepared = _claim(prepared)
    log = log_to(prepared.directory.log, held=prepared.resume)
    _print_start(prepared, console)
    try:
        return asyncio.run(_train(prepared, log, console))
    except ConfigError:  # refused by a worker at set-up: leave no trace of the run
        if not prepared.resume:
            prepared.directory.discard()
        raise


def said_complete(
    checkpoint: Checkpoint | None, config: RootConfig, console: Console, *, evaluates: bool
) -> bool:
    """Return whether a resumed run has nothing left to do, and say so on the console."""
    from rlsys.run.resume import already_complete

    if checkpoint is None or not already_complete(checkpoint, config, evaluates=evaluates):
        return False

    console.print(
        f"already complete: {checkpoint.path} is that of step {checkpoint.step}, and trainer.steps "
        f"is {config.trainer.steps}. Nothing is started; a larger --trainer.steps continues from "
        "there.",
        highlight=False,
        soft_wrap=True,
    )
    return True


def changes_of(
    invocation: Invocation[RootT], checkpoint: Checkpoint | None, config: RootConfig
) -> tuple[str, ...]:
    """Return the changes of a resumed run, since its checkpoint or else since its start."""
    from rlsys.run.resume import changes, differences

    if checkpoint:
        return tuple(differences(checkpoint, config))
    if invocation.resume:
        return tuple(changes(invocation.saved or {}, config))
    return ()


def _claim(prepared: Prepared[RootT]) -> Prepared[RootT]:
    """Create the directory of a new run; that of a resumed one is not changed."""
    from rlsys.run.checkpoints import CheckpointStore

    if prepared.resume:
        return prepared

    directory = prepared.directory.claim()
    directory.create(prepared.config, prepared.reasons)
    keep = prepared.config.trainer.checkpoints.keep
    store = CheckpointStore(directory.checkpoints, keep=keep)
    return replace(prepared, directory=directory, store=store)


def _print_start(prepared: Prepared, console: Console) -> None:
    """Print the checkpoint and the changes of a resumed run, the notices and the warnings."""
    if prepared.resume:
        origin = "no complete checkpoint: starting from the beginning"
        if prepared.checkpoint:
            origin = f"resuming from {prepared.checkpoint.path}"
        _print_lines(console, [origin])
        _print_lines(console, [f"changed: {change}" for change in prepared.changes])
    _print_lines(console, prepared.notices)
    _warn(prepared.warnings, console)


def _print_lines(console: Console, lines: Sequence[str]) -> None:
    """Print lines on the console, and write them to the run's log where there is one."""
    for line in lines:
        logging.getLogger(__name__).info("%s", line)
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _warn(warnings: Sequence[str], console: Console) -> None:
    """Print warnings on the console, and write them to the run's log."""
    for warning in warnings:
        logging.getLogger(__name__).info("warning: %s", warning)
        console.print(
            f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True
        )


async def _train(prepared: Prepared, log: HeldLog, console: Console) -> int:
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

    while True:
        try:
            outcome = await _train_once(prepared, recovery, status, log, console)
            break
        except Exception as error:
            if isinstance(error, ConfigError) and not recovery.restarted:
                raise
            restarted = await _restarted(prepared, error, status, console)
            if restarted is None:
                status.fail(f"{type(error).__name__}: {error}")
                log.end_hold()
                _report_failure(error, directory, console)
                return 1
            prepared = restarted

    print_summary(console, read_metrics(directory.metrics), directory, time.monotonic() - began)
    return 0 if outcome == "finished" else 130


async def _train_once(
    prepared: Prepared,
    recovery: Recovery,
    status: StatusWriter,
    log: HeldLog,
    console: Console,
) -> Outcome:
    """Start the actors, train until the end or a failure, and stop the actors."""
    from workers.reward_worker import RewardOutput
    from workers.stack_dumps import kill_processes

    directory, restarted = prepared.directory, recovery.restarted
    earlier_tasks = asyncio.all_tasks()
    # Not in a thread, although it blocks: Ray sets its signal handlers in the main thread only.
    if restarted:
        prepared, cluster = await reconnect(prepared, console)
    else:
        cluster = prepared.connect()
    cluster.faults = recovery.faults
    reward_output = RewardOutput()

    try:
        recovery.begin_start(cluster, directory.failures)
        starting = _start(prepared, recovery, cluster, status, console)
        started = await recovery.watchdog.guard(starting)
        session = started.session
        if "reward-0" in cluster.supervised:
            reward_output.follow(cluster.supervised["reward-0"])
        if prepared.resume and not restarted:
            directory.create(prepared.config, prepared.reasons)
        log.end_hold()
        _stop_on_signals(session.request_stop, console)
        return await started.loop.run()
    except Exception as error:
        recovery.save_evidence(error, cluster, directory.failures)
        if isinstance(error, PhaseTimeoutError):
            await _end_tasks(earlier_tasks)
            await kill_processes(cluster.actors)
        raise
    finally:
        try:
            await reward_output.finish()
            await _end_tasks(earlier_tasks)
        finally:
            cluster.shutdown()


async def _end_tasks(earlier: set[asyncio.Task[Any]]) -> None:
    """Cancel the tasks that are left of a session: they must not see how its actors end."""
    left = asyncio.all_tasks() - earlier - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=TASKS_END_S)


async def _start(
    prepared: Prepared,
    recovery: Recovery,
    cluster: Cluster,
    status: StatusWriter,
    console: Console,
) -> Started:
    """Start the actors, and go to the run's checkpoint, or to the beginning without one."""
    started = await prepared.start(cluster, status, console, recovery.faults)
    session = started.session
    if prepared.checkpoint:
        await session.restore(prepared.checkpoint)
    elif recovery.initial is None:
        recovery.initial = await session.states()
    else:
        await session.load_states(recovery.initial)
    return started


async def _restarted(
    prepared: Prepared[RootT], error: Exception, status: StatusWriter, console: Console
) -> Prepared[RootT] | None:
    """Return the run at the checkpoint from which it is restarted; None where it is not."""
    _end_stopping_on_signals()
    try:
        return await begin_restart(prepared, error, console)
    except (asyncio.CancelledError, KeyboardInterrupt):
        status.on_end("interrupted", "left before the actors were restarted")
        raise


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
        f"details in {directory.log}. Continue with --run.directory {directory.path} --resume",
        highlight=False,
        soft_wrap=True,
    )


def _stop_on_signals(request_stop: Callable[[], None], console: Console) -> None:
    """Stop after the current step at the first Ctrl-C or SIGTERM, and at once at the second."""
    loop = asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        console.print("stopping after this step; once more to stop at once", highlight=False)
        request_stop()
        loop.remove_signal_handler(number)
        signal.signal(number, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)


def _end_stopping_on_signals() -> None:
    """Let Ctrl-C and SIGTERM end the process at once: no session is there to finish its step."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.remove_signal_handler(number)
        signal.signal(number, signal.default_int_handler)
