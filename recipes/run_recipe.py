"""From a recipe to a run: the only code that knows all parts.

    command line -> checks -> Ray -> actors -> loop -> summary

Heavy imports wait until the command line is known to be right.
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
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rlsys.config import ConfigError, RunConfig
from rlsys.config.command_line import HelpRequested, Invocation, dump_yaml, parse
from rlsys.config.errors import Mistakes, as_config_error
from rlsys.config.hardware import Hardware, detect_hardware
from rlsys.run.run_log import HeldLog, log_to

if TYPE_CHECKING:
    from rich.console import Console

    from rlsys.data.prompt_stream import LoadedPrompts
    from rlsys.driver.ports import Workers
    from rlsys.driver.session import Session
    from rlsys.driver.synchronous_loop import SynchronousLoop
    from rlsys.run.checkpoints import Checkpoint, CheckpointStore
    from rlsys.run.compute_dtype import ProductSpeed
    from rlsys.run.directory import RunDirectory
    from rlsys.run.observers.run_status import StatusWriter
    from rlsys.run.step_time import StepEstimate
    from workers.cluster import Cluster

Recipe = Callable[[Hardware], RunConfig]


def run_recipe(recipe: Recipe, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a recipe as a command: exit code 0 done, 2 bad input, 130 interrupted, 1 anything else."""
    hardware = detect_hardware()
    try:
        invocation = parse(recipe(hardware), sys.argv[1:] if arguments is None else arguments)
        code = _run(invocation, hardware)
    except HelpRequested as help_requested:
        print(help_requested)
        code = 0
    except KeyboardInterrupt:
        print(
            "interrupted; what was saved can be continued with --run.directory and --resume",
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
    with as_config_error():  # nothing but input is looked at
        prepared = _prepare(invocation, hardware, console)
    if prepared is None:
        return 0
    if invocation.dry_run:
        print(prepared.plan)
        _say(prepared, console)
        return 0
    prepared = _claim(prepared)
    log = log_to(prepared.directory.log, held=prepared.resume)
    _say(prepared, console)
    try:
        return asyncio.run(_train(prepared, log, console))
    except ConfigError:  # refused at set-up: as if it had never been started
        if not prepared.resume:
            prepared.directory.discard()
        raise


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that was checked, and may start."""

    config: RunConfig
    resume: bool
    prompts: LoadedPrompts
    store: CheckpointStore
    checkpoint: Checkpoint | None  # from which to go on
    model_directory: Path
    reference_directory: Path
    directory: RunDirectory
    plan: str  # what would be started, for a dry run
    changes: tuple[str, ...]  # of a resumed run's configuration
    notices: tuple[str, ...]  # of the data, the precision and the time of a step
    reasons: tuple[str, ...]  # of what the configuration left to the machine, for config.yaml
    speed: ProductSpeed | None  # of matrix products on this machine
    estimate: StepEstimate | None  # of a step's time
    warnings: tuple[str, ...]


def _prepare(invocation: Invocation, hardware: Hardware, console: Console) -> Prepared | None:
    """Check everything that can be known before Ray starts; no file is changed. None where a resumed run has nothing left to do.

    Raises:
        ValueError: what is wrong, a line each; `as_config_error` makes it a ConfigError.
    """
    from rlsys.data.prompt_stream import load_problems, load_prompts
    from rlsys.models import resolve_model
    from rlsys.models.loading import load_tokenizer, parameter_count
    from rlsys.rewards import reads_metadata
    from rlsys.run.checkpoints import CheckpointStore
    from rlsys.run.compute_dtype import choose_dtypes
    from rlsys.run.config_warnings import config_warnings, reward_notices
    from rlsys.run.directory import RunDirectory
    from rlsys.run.ineffective_options import ineffective_options
    from rlsys.run.model_checks import check_model
    from rlsys.run.plan import describe_plan
    from rlsys.run.preflight import config_mistakes
    from rlsys.run.resume import (
        already_complete,
        changes,
        check_resumable,
        differences,
        prompt_state,
    )
    from rlsys.run.step_time import describe_estimate, estimate_step

    config = invocation.config
    directory = RunDirectory.named_by(config)

    mistakes = Mistakes()
    mistakes.lines += config_mistakes(config, directory, hardware, resume=invocation.resume)
    metadata = reads_metadata(config.reward.functions)
    problems = mistakes.attempt("data.train", lambda: load_problems(config, metadata=metadata))
    mistakes.refuse()
    assert problems is not None, "what was not read is a mistake"

    store = CheckpointStore(directory.checkpoints, keep=config.trainer.checkpoints.keep)
    checkpoint = store.latest() if invocation.resume else None
    if checkpoint:
        check_resumable(checkpoint, config)
    evaluates = bool(problems.evaluation)
    if checkpoint and already_complete(checkpoint, config, evaluates=evaluates):
        console.print(
            f"already complete: {checkpoint.path} is that of step {checkpoint.step}, and "
            f"trainer.steps is {config.trainer.steps}. Nothing is started; a larger "
            "--trainer.steps goes on from there.",
            highlight=False,
            soft_wrap=True,
        )
        return None
    model_directory = resolve_model(config.model.path)
    reference = config.reference.path
    reference_directory = resolve_model(reference) if reference else model_directory
    check_model(config, model_directory, reference_directory)
    choice = choose_dtypes(config, hardware, model_directory)
    config = choice.config
    tokenizer = load_tokenizer(model_directory, trust_remote_code=config.model.trust_remote_code)
    prompts = load_prompts(config, tokenizer, problems)
    if checkpoint:
        prompts.train.load_state(prompt_state(checkpoint))  # refuses other data
    estimate = estimate_step(
        config,
        hardware,
        parameters=parameter_count(model_directory),
        prompt_tokens=prompts.train.mean_tokens,
        speed=choice.speed,
    )
    plan = describe_plan(config, hardware, problems, model_directory, directory)
    return Prepared(
        config=config,
        resume=invocation.resume,
        prompts=prompts,
        store=store,
        checkpoint=checkpoint,
        model_directory=model_directory,
        reference_directory=reference_directory,
        directory=directory,
        plan=f"{dump_yaml(config)}\n{plan}",
        changes=tuple(
            differences(checkpoint, config)
            if checkpoint
            else changes(invocation.saved or {}, config)
            if invocation.resume
            else ()
        ),
        notices=(
            *([config.run.note] if config.run.note else []),
            *choice.reasons,
            describe_estimate(estimate, config),
            f"data: {problems.describe()}",
            *prompts.notices,
        ),
        reasons=choice.reasons,
        speed=choice.speed,
        estimate=estimate,
        warnings=(
            *choice.warnings,
            *config_warnings(config),
            *reward_notices(config, problems),
            *ineffective_options(config, invocation.explicit, hardware),
        ),
    )


def _claim(prepared: Prepared) -> Prepared:
    """Make the directory of a new run; that of a resumed one stays as it is."""
    from rlsys.run.checkpoints import CheckpointStore

    if prepared.resume:
        return prepared
    directory = prepared.directory.claim()
    directory.create(prepared.config, prepared.reasons)
    keep = prepared.config.trainer.checkpoints.keep
    return replace(
        prepared, directory=directory, store=CheckpointStore(directory.checkpoints, keep=keep)
    )


def _say(prepared: Prepared, console: Console) -> None:
    """From where a run goes on and what is otherwise than before, and what should be looked at."""
    if prepared.resume:
        origin = (
            f"resuming from {prepared.checkpoint.path}"
            if prepared.checkpoint
            else "no complete checkpoint: starting from the beginning"
        )
        _print_lines(console, [origin, *(f"changed: {change}" for change in prepared.changes)])
    _print_lines(console, prepared.notices)
    _warn(prepared.warnings, console)


def _print_lines(console: Console, lines: Sequence[str]) -> None:
    """On the console, and in the run's log where there is one."""
    for line in lines:
        logging.getLogger(__name__).info("%s", line)
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _warn(warnings: Sequence[str], console: Console) -> None:
    """Show what is accepted but easily not meant, on the console and in the run's log."""
    for warning in warnings:
        logging.getLogger(__name__).info("warning: %s", warning)
        console.print(
            f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True
        )


async def _train(prepared: Prepared, log: HeldLog, console: Console) -> int:
    """Start everything and train. Until the loop runs, a resume changes no file."""
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
    # This blocks: Ray sets its signal handlers in the main thread only.
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
    """Start all actors, and print what the user should know of them."""
    from recipes.wiring import probe_tokens, start_workers

    return await start_workers(
        cluster,
        prepared.config,
        prepared.model_directory,
        prepared.reference_directory,
        probe_tokens(prepared.config, prepared.prompts, prepared.model_directory),
        tell=lambda note: console.print(note, highlight=False, markup=False),
    )


def _assemble(
    prepared: Prepared, workers: Workers, status: StatusWriter, console: Console
) -> tuple[SynchronousLoop, Session]:
    """Put the loop together, with everything that watches, evaluates and saves it."""
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
    evaluator = None  # data.eval is off
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
    """Log the traceback, update the report, and say what failed and how to continue."""
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
    """First Ctrl-C or SIGTERM: end after this step, saved. Second: leave at once."""
    loop = asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        console.print("stopping after this step; once more to leave at once", highlight=False)
        request_stop()
        loop.remove_signal_handler(number)
        signal.signal(number, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
