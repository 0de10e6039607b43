"""The command of a recipe: everything from the command line to the summary of the run.

    command line -> checks -> Ray -> actors -> loop -> summary

torch, Ray and other slow imports come after the command line was checked, so they are inside of the
functions.
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
from typing import TYPE_CHECKING, NoReturn

from rlsys.config import ConfigError, RunConfig
from rlsys.config.command_line import HelpRequested, Invocation, dump_yaml, parse
from rlsys.config.errors import Mistakes, as_config_error
from rlsys.config.hardware import Hardware, detect_hardware
from rlsys.run.run_log import HeldLog, log_to

if TYPE_CHECKING:
    from rich.console import Console

    from rlsys.data.prompt_stream import LoadedProblems, LoadedPrompts
    from rlsys.driver.ports import Workers
    from rlsys.driver.session import Session
    from rlsys.driver.synchronous_loop import SynchronousLoop
    from rlsys.run.checkpoints import Checkpoint, CheckpointStore
    from rlsys.run.compute_dtype import DtypeChoice, ProductSpeed
    from rlsys.run.directory import RunDirectory
    from rlsys.run.model_checks import ModelDirectories
    from rlsys.run.observers.run_status import StatusWriter
    from rlsys.run.step_time import StepEstimate
    from workers.cluster import Cluster

Recipe = Callable[[Hardware], RunConfig]


def run_recipe(recipe: Recipe, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a recipe as a command, and exit: 0 done, 2 invalid input, 130 interrupted, 1 failed."""
    hardware = detect_hardware()
    try:
        invocation = parse(recipe(hardware), sys.argv[1:] if arguments is None else arguments)
        code = _run(invocation, hardware)
    except HelpRequested as help_requested:
        print(help_requested)
        code = 0
    except KeyboardInterrupt:
        print(
            "interrupted; a saved run can be continued with --run.directory and --resume",
            file=sys.stderr,
        )
        code = 130
    except ConfigError as error:
        lines = str(error).splitlines()
        print("\n".join(f"error: {line}" for line in lines), file=sys.stderr)
        code = 2
    sys.exit(code)


def _run(invocation: Invocation, hardware: Hardware) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from rich.console import Console

    console = Console()
    with as_config_error():  # preparation only checks input
        prepared = _prepare(invocation, hardware, console)
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


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that was checked and may start."""

    config: RunConfig
    resume: bool
    prompts: LoadedPrompts
    store: CheckpointStore
    checkpoint: Checkpoint | None  # to resume from
    models: ModelDirectories
    directory: RunDirectory
    plan: str  # for a dry run
    changes: tuple[str, ...]  # in the configuration of a resumed run
    notices: tuple[str, ...]  # on the data, the precision and the time of a step
    reasons: tuple[str, ...]  # of choices that depend on the machine, for config.yaml
    speed: ProductSpeed | None  # of matrix products on this machine
    estimate: StepEstimate | None  # of a step's time
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """A configuration without mistakes, its problems, and the checkpoint to resume from."""

    directory: RunDirectory
    problems: LoadedProblems
    store: CheckpointStore
    checkpoint: Checkpoint | None


@dataclass(frozen=True, kw_only=True)
class _Models:
    """The models of a run, and the precisions in which they are computed."""

    directories: ModelDirectories
    dtypes: DtypeChoice


def _prepare(invocation: Invocation, hardware: Hardware, console: Console) -> Prepared | None:
    """Check everything that can be checked before Ray starts, without changing a file.

    Returns None where a resumed run is already complete.

    Raises:
        ValueError: mistakes, a line each; `as_config_error` turns it into a ConfigError.
    """
    checked = _check(invocation, hardware)
    if _is_complete(checked, invocation.config, console):
        return None

    models = _choose_models(invocation.config, hardware)
    prompts = _load_prompts(models, checked)
    return _assemble_prepared(invocation, hardware, checked, models, prompts)


def _check(invocation: Invocation, hardware: Hardware) -> _Checked:
    """Check configuration and data, and find the checkpoint that a resume continues from."""
    from rlsys.data.prompt_stream import load_problems
    from rlsys.rewards import reads_metadata
    from rlsys.run.checkpoints import CheckpointStore
    from rlsys.run.directory import RunDirectory
    from rlsys.run.preflight import config_mistakes
    from rlsys.run.resume import check_resumable

    config = invocation.config
    directory = RunDirectory.named_by(config)

    # Mistakes in the configuration and in the data are reported together.
    mistakes = Mistakes()
    mistakes.lines += config_mistakes(config, directory, hardware, resume=invocation.resume)
    metadata = reads_metadata(config.reward.functions)
    problems = mistakes.attempt("data.train", lambda: load_problems(config, metadata=metadata))
    mistakes.refuse()
    assert problems is not None, "data that cannot be read is a mistake"

    store = CheckpointStore(directory.checkpoints, keep=config.trainer.checkpoints.keep)
    checkpoint = store.latest() if invocation.resume else None
    if checkpoint:
        check_resumable(checkpoint, config)
    return _Checked(directory=directory, problems=problems, store=store, checkpoint=checkpoint)


def _is_complete(checked: _Checked, config: RunConfig, console: Console) -> bool:
    """Return whether a resumed run has nothing left to do, and say so on the console."""
    from rlsys.run.resume import already_complete

    checkpoint = checked.checkpoint
    evaluates = bool(checked.problems.evaluation)
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


def _choose_models(config: RunConfig, hardware: Hardware) -> _Models:
    """Find and check the models, and choose their precisions for this machine."""
    from rlsys.models import resolve_model
    from rlsys.run.compute_dtype import choose_dtypes
    from rlsys.run.model_checks import ModelDirectories, check_model

    policy = resolve_model(config.model.path)
    reference, critic = config.reference.path, config.critic.path
    directories = ModelDirectories(
        policy=policy,
        reference=resolve_model(reference) if reference else policy,
        critic=resolve_model(critic) if critic and config.critic.enabled else policy,
    )
    check_model(config, directories)
    return _Models(directories=directories, dtypes=choose_dtypes(config, hardware, policy))


def _load_prompts(models: _Models, checked: _Checked) -> LoadedPrompts:
    """Tokenize the prompts, at the position of the checkpoint if there is one."""
    from rlsys.data.prompt_stream import load_prompts
    from rlsys.models.loading import load_tokenizer
    from rlsys.run.resume import prompt_state

    config = models.dtypes.config
    trust = config.model.trust_remote_code
    tokenizer = load_tokenizer(models.directories.policy, trust_remote_code=trust)
    prompts = load_prompts(config, tokenizer, checked.problems)
    if checked.checkpoint:
        prompts.train.load_state(prompt_state(checked.checkpoint))  # refuses other problems
    return prompts


def _assemble_prepared(
    invocation: Invocation,
    hardware: Hardware,
    checked: _Checked,
    models: _Models,
    prompts: LoadedPrompts,
) -> Prepared:
    """Put the checked parts together, with the texts that the user will see."""
    from rlsys.models.loading import parameter_count
    from rlsys.run.config_warnings import config_warnings, reward_notices
    from rlsys.run.ineffective_options import ineffective_options
    from rlsys.run.plan import describe_plan
    from rlsys.run.step_time import describe_estimate, estimate_step

    config, problems = models.dtypes.config, checked.problems
    estimate = estimate_step(
        config,
        hardware,
        parameters=parameter_count(models.directories.policy),
        prompt_tokens=prompts.train.mean_tokens,
        speed=models.dtypes.speed,
    )
    plan = describe_plan(config, hardware, problems, models.directories, checked.directory)
    notices = [
        *models.dtypes.reasons,
        describe_estimate(estimate, config),
        f"data: {problems.describe()}",
        *prompts.notices,
    ]
    if config.run.note:
        notices.insert(0, config.run.note)
    return Prepared(
        config=config,
        resume=invocation.resume,
        prompts=prompts,
        store=checked.store,
        checkpoint=checked.checkpoint,
        models=models.directories,
        directory=checked.directory,
        plan=f"{dump_yaml(config)}\n{plan}",
        changes=_changes(invocation, checked.checkpoint, config),
        notices=tuple(notices),
        reasons=models.dtypes.reasons,
        speed=models.dtypes.speed,
        estimate=estimate,
        warnings=(
            *models.dtypes.warnings,
            *config_warnings(config),
            *reward_notices(config, problems),
            *ineffective_options(config, invocation.explicit, hardware),
        ),
    )


def _changes(
    invocation: Invocation, checkpoint: Checkpoint | None, config: RunConfig
) -> tuple[str, ...]:
    """Return the changes of a resumed run, since its checkpoint or else since its start."""
    from rlsys.run.resume import changes, differences

    if checkpoint:
        return tuple(differences(checkpoint, config))
    if invocation.resume:
        return tuple(changes(invocation.saved or {}, config))
    return ()


def _claim(prepared: Prepared) -> Prepared:
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
    """Start the actors, train, and return the exit code.

    A resume changes no file before the loop starts.
    """
    from rlsys.run.observers.console import print_summary
    from rlsys.run.observers.metrics_log import read_metrics
    from rlsys.run.observers.run_status import StatusWriter
    from workers.cluster import Cluster
    from workers.local_ray import interrupt_on_sigterm
    from workers.reward_worker import RewardOutput

    began = time.monotonic()
    config, directory = prepared.config, prepared.directory
    interrupt_on_sigterm()
    console.print(
        f"{config.recipe}: {config.model.path}, starting Ray and the actors ...", highlight=False
    )
    status = StatusWriter(directory, held=prepared.resume)
    # Not in a thread, although it blocks: Ray sets its signal handlers in the main thread only.
    cluster = Cluster.connect(config)
    reward_output = RewardOutput()

    try:
        workers = await _start_workers(prepared, cluster, console)
        reward_output.follow(cluster.actors["reward-0"])
        loop, session = _assemble(prepared, workers, status, console)
        if prepared.checkpoint:
            await session.restore(prepared.checkpoint)
        if prepared.resume:
            directory.create(config, prepared.reasons)
        log.end_hold()
        _stop_on_signals(session.request_stop, console)
        outcome = await loop.run()
    except ConfigError:
        raise
    except Exception as error:
        status.fail(f"{type(error).__name__}: {error}")
        log.end_hold()
        _report_failure(error, directory, console)
        return 1
    finally:
        try:
            await reward_output.finish()
        finally:
            cluster.shutdown()

    print_summary(console, read_metrics(directory.metrics), directory, time.monotonic() - began)
    return 0 if outcome == "finished" else 130


async def _start_workers(prepared: Prepared, cluster: Cluster, console: Console) -> Workers:
    """Start all actors, and print their notes for the user."""
    from recipes.wiring import probe_tokens, start_workers

    return await start_workers(
        cluster,
        prepared.config,
        prepared.models,
        probe_tokens(prepared.config, prepared.prompts, prepared.models.policy),
        notify=lambda note: console.print(note, highlight=False, markup=False),
    )


def _assemble(
    prepared: Prepared, workers: Workers, status: StatusWriter, console: Console
) -> tuple[SynchronousLoop, Session]:
    """Build the loop and its session: observers, evaluation and checkpoints."""
    from rlsys.driver.evaluation import Evaluator
    from rlsys.driver.sampling import Sampler
    from rlsys.driver.session import Session
    from rlsys.driver.synchronous_loop import SynchronousLoop
    from rlsys.run.observers.console import Progress
    from rlsys.run.observers.html_report import ReportWriter
    from rlsys.run.observers.metrics_log import MetricsLog
    from rlsys.run.step_time import StepTimeWatch, likely_causes

    config, prompts, directory = prepared.config, prepared.prompts, prepared.directory
    progress = Progress(console, live=config.run.progress)
    sampler = Sampler(config, workers.generator, workers.scorer, notify=progress.notice)
    evaluator = None
    if len(prompts.evaluation):
        evaluator = Evaluator(config, prompts.evaluation, sampler)

    metrics = MetricsLog(directory)
    slowness = StepTimeWatch(
        prepared.estimate,
        lambda: likely_causes(config, detect_hardware(), prepared.speed),
        progress.notice,
    )
    observers = [metrics, status, progress, ReportWriter(directory), slowness]
    session = Session(config, prepared.store, observers, evaluator)
    session.register("metrics_position", metrics)
    loop = SynchronousLoop(config, workers, prompts.train, sampler, session, directory.rollouts)
    return loop, session


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
