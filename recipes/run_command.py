"""The command of a recipe: everything from the command line to the summary of the run.

    command line -> checks -> Ray -> actors -> loop -> summary

It is the same for every kind of run; a kind brings a function that checks its configuration and
data and returns a subclass of `Prepared`, which starts its workers and loop. torch, Ray and other
slow imports come after the command line was checked, so they are inside of the functions.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from recipes.prepared_run import Prepare, Prepared, RootT
from recipes.training import print_lines, train, warn
from rlsys.config import ConfigError, RootConfig
from rlsys.config.command_line import HelpRequested, Invocation, parse, places_to_resume
from rlsys.config.errors import as_config_error
from rlsys.config.hardware import Hardware, detect_hardware
from rlsys.run.ray_job import stop_wait_warning
from rlsys.run.run_log import log_to
from rlsys.run.shown_text import shown

if TYPE_CHECKING:
    from rich.console import Console

    from rlsys.run.checkpoints import Checkpoint, CheckpointStore
    from rlsys.run.directory import RunDirectory
    from rlsys.run.storage import RunStorage


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
        code = asyncio.run(train(prepared, log, console, storage))
        stored = storage is None or _store_rest(storage, prepared.directory, console)
        return code if stored else 1
    except ConfigError:  # refused by a worker at set-up: leave no trace of the run
        if storage is not None:
            storage.discard(resumed=prepared.resume)
        if not prepared.resume:
            prepared.directory.discard()
        raise
    except BaseException:  # an interrupt, or an error of the driver itself
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
        notify=lambda line: print_lines(console, [line]),
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
        lambda line: print_lines(console, [line]),
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
    remedy = f"--resume with --run.directory {directory.path} stores them."
    if storage.is_lost:
        remedy = "The other process goes on with the run."
    console.print(
        f"not stored in {storage.shown}: {shortened(missing)}. All files are in {directory.path}; "
        f"{remedy}",
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
        print_lines(console, [origin])
        print_lines(console, [f"changed: {change}" for change in prepared.changes])
    print_lines(console, prepared.notices)
    stop_wait = stop_wait_warning(os.environ)
    warn([*prepared.warnings, *([stop_wait] if stop_wait else [])], console)
