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
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, Self, TypeVar

from recipes.restarting import Recovery, begin_restart, reconnect
from rlsys.config import ConfigError, RootConfig
from rlsys.config.command_line import HelpRequested, Invocation, parse, places_to_resume
from rlsys.config.errors import as_config_error
from rlsys.config.hardware import Hardware, detect_hardware
from rlsys.driver.watchdog import PhaseTimeoutError
from rlsys.run.ray_job import stop_wait_warning
from rlsys.run.run_log import HeldLog, log_to
from rlsys.run.shown_text import shown

if TYPE_CHECKING:
    from types import FrameType

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
    from rlsys.run.storage import RunStorage
    from workers.cluster import Cluster

TASKS_END_S = 5.0  # for the tasks of a session to be cancelled

RootT = TypeVar("RootT", bound=RootConfig)

SAME_REQUEST_S = 2.0  # a scheduler may signal a process and its parent, which passes it on


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
        config, words = recipe(hardware), sys.argv[1:] if arguments is None else arguments
        _fetch_to_resume(config, words)
        return _run(parse(config, words), prepare, hardware)

    exit_with_code_of(run, continued="a saved run")


def exit_with_code_of(run: Callable[[], int], *, continued: str) -> NoReturn:
    """Exit with the code that `run` returns, 0 after help, 130 if interrupted, 2 if refused.

    After any other error it prints the traceback and exits with 1.

    Args:
        continued: what --resume continues after an interrupt.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars of libraries in a log
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
        print(shown("\n".join(f"error: {line}" for line in lines)), file=sys.stderr)
        code = 2
    except Exception:
        print(shown(traceback.format_exc()), file=sys.stderr)
        code = 1
    sys.exit(code)


def _run(invocation: Invocation[RootT], prepare: Prepare[RootT], hardware: Hardware) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from rlsys.run.observers.plain_console import PlainConsole

    console = PlainConsole()
    with as_config_error():  # preparation only checks input
        prepared = prepare(invocation, hardware, console)
    if prepared is None:
        return 0 if invocation.dry_run else _store_complete_run(invocation.config, console)
    if invocation.dry_run:
        print(shown(prepared.plan))
        if prepared.online.cluster.joined_address:
            print(shown(f"places (nothing was started):\n{prepared.places()}"))
        _print_start(prepared, console)
        return 0

    prepared = _claim(prepared)
    log = log_to(prepared.directory.log, held=prepared.resume)
    _print_start(prepared, console)
    storage: RunStorage | None = None
    try:
        storage = _claim_storage(prepared.config, prepared.directory, prepared.store, console)
        code = asyncio.run(_train(prepared, log, console, storage))
        stored = storage is None or _store_rest(storage, prepared.directory, console)
        return code if stored else 1
    except ConfigError:  # refused by a worker at set-up: leave no trace of the run
        if storage is not None:
            storage.discard(resumed=prepared.resume)
        if not prepared.resume:
            prepared.directory.discard()
        raise
    except KeyboardInterrupt:
        if storage is not None:
            _store_rest(storage, prepared.directory, console)
        raise


def _fetch_to_resume(config: RootConfig, arguments: Sequence[str]) -> None:
    """With --resume, make the local directory hold the newest state of the run."""
    places = places_to_resume(config, arguments)
    if places is None or places.storage is None or places.given_directory is None:
        return
    from rlsys.run.directory import RunDirectory
    from rlsys.run.fetch_stored_run import fetch_stored_run
    from rlsys.run.observers.plain_console import PlainConsole
    from rlsys.run.stored_place import StoredPlace

    console = PlainConsole()
    fetch_stored_run(
        StoredPlace.open(places.storage),
        RunDirectory(Path(places.given_directory).expanduser()),
        dry_run="--dry-run" in arguments,
        notify=lambda line: _print_lines(console, [line]),
    )


def _claim_storage(
    config: RootConfig, directory: RunDirectory, checkpoints: CheckpointStore, console: Console
) -> RunStorage | None:
    """Take `run.storage` for this process; None where the run has none."""
    if config.run.storage is None:
        return None
    from rlsys.run.storage import RunStorage
    from rlsys.run.stored_place import StoredPlace

    storage = RunStorage(
        StoredPlace.open(config.run.storage),
        directory,
        checkpoints,
        lambda line: _print_lines(console, [line]),
    )
    storage.claim()
    return storage


def _store_complete_run(config: RootConfig, console: Console) -> int:
    """Store what an earlier start of a complete run could not, and return the exit code."""
    from rlsys.run.checkpoints import CheckpointStore
    from rlsys.run.directory import RunDirectory

    directory = RunDirectory.named_by(config)
    store = CheckpointStore(directory.checkpoints, keep=config.trainer.checkpoints.keep)
    store.latest()  # finds damaged ones, which are not stored
    storage = _claim_storage(config, directory, store, console)
    return 0 if storage is None or _store_rest(storage, directory, console) else 1


def _store_rest(storage: RunStorage, directory: RunDirectory, console: Console) -> bool:
    """Wait until all of a run is stored, say where or what is missing; return whether all is."""
    from rlsys.run.storage import shortened

    with _one_signal_held_back(storage.shown, console):
        missing = storage.finish()
    if not missing:
        console.print(f"{'stored':<12} {storage.shown}", highlight=False, soft_wrap=True)
        return True
    console.print(
        f"not stored in {storage.shown}: {shortened(missing)}. All files are in {directory.path}; "
        f"--resume with --run.directory {directory.path} stores them.",
        style="red",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return False


@contextmanager
def _one_signal_held_back(place: str, console: Console) -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM pass with a line, and interrupt at the second."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def note(number: int, frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.default_int_handler)
        console.print(f"still storing in {place}; once more to leave at once", highlight=False)

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: not a handler of Python's, but Ray's, and Ray is not running any more.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


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
    stop_wait = stop_wait_warning(os.environ)
    _warn([*prepared.warnings, *([stop_wait] if stop_wait else [])], console)


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


async def _train(
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

    while True:
        try:
            outcome, step = await _train_once(prepared, recovery, status, log, console, storage)
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
    if outcome == "finished":
        return 0
    saved = "saved; " if step else ""
    stopped = f"stopped after step {step} of {config.trainer.steps}: {saved}continue with"
    _print_lines(console, [f"{stopped} --run.directory {directory.path} --resume"])
    return 130


def keep_logs(directory: RunDirectory, console: Console) -> None:
    """Collect what the actors printed, before they are killed; a refusal changes no file."""
    from workers.actor_logs import keep_actor_logs

    if isinstance(sys.exception(), ConfigError):
        return
    missed = keep_actor_logs(directory.logs)
    _warn([f"output of actors was not collected: {line}" for line in missed], console)


async def _train_once(
    prepared: Prepared,
    recovery: Recovery,
    status: StatusWriter,
    log: HeldLog,
    console: Console,
    storage: RunStorage | None,
) -> tuple[Outcome, int]:
    """Start the actors, train until the end or a failure, and stop the actors.

    Returns:
        How the run ended, and its last step.
    """
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
        reward_output.follow(cluster.supervised_of("reward"))
        if prepared.resume and not restarted:
            directory.create(prepared.config, prepared.reasons)
        log.end_hold()
        _stop_on_signals(session.request_stop, console)
        if storage is not None:
            loop = asyncio.get_running_loop()
            storage.on_loss = lambda: loop.call_soon_threadsafe(session.request_stop)
            if not restarted:
                storage.begin()
        return await started.loop.run(), session.step
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
            keep_logs(directory, console)
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
    """Let Ctrl-C and SIGTERM end the process at once: no session is there to finish its step."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.remove_signal_handler(number)
        signal.signal(number, signal.default_int_handler)
