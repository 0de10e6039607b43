"""The command of an evaluation: everything from the command line to the tables of results.

    command line -> checks -> Ray -> for each model: engine -> responses -> results

torch, Ray and other slow imports come after the command line was checked, so they are inside of the
functions.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from recipes.prepared_run import machines_of
from recipes.run_command import exit_with_code_of
from recipes.training import keep_logs
from rlsys.config import ConfigError, RunConfig
from rlsys.config.command_line import Invocation, dump_yaml, parse
from rlsys.config.errors import Mistakes, as_config_error
from rlsys.config.evaluation_run import EvaluationRunConfig
from rlsys.config.hardware import Hardware, detect_hardware
from rlsys.run.run_log import log_to
from rlsys.run.shown_text import shown

if TYPE_CHECKING:
    from rich.console import Console

    from rlsys.data.evaluation_problems import EvaluationProblems, EvaluationPrompts
    from rlsys.data.response_files import ScoredResponses
    from rlsys.driver.faults import FaultLog
    from rlsys.driver.ports import RewardScorer
    from rlsys.driver.response_collection import ResponseCollector
    from rlsys.run.evaluated_model import EvaluatedModel
    from rlsys.run.evaluation_directory import EvaluationDirectory
    from rlsys.run.evaluation_summary import EvaluationResults
    from rlsys.run.observers.evaluation_console import EvaluationProgress
    from rlsys.run.observers.evaluation_report import ReportedModel
    from workers.cluster import Cluster

EvaluationRecipe = Callable[[Hardware], EvaluationRunConfig]


def run_evaluation(recipe: EvaluationRecipe, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run an evaluation as a command, and exit.

    The codes are 0 done, 2 invalid input, 130 interrupted, 1 failed.
    """
    hardware = detect_hardware()

    def run() -> int:
        invocation = parse(recipe(hardware), sys.argv[1:] if arguments is None else arguments)
        return _run(invocation, hardware)

    exit_with_code_of(run, continued="what was sampled")


def _run(invocation: Invocation[EvaluationRunConfig], hardware: Hardware) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from rlsys.run.observers.plain_console import PlainConsole

    console = PlainConsole()
    with as_config_error():  # preparation only checks input
        prepared = _prepare(invocation, hardware)
    if invocation.dry_run:
        print(shown(f"{dump_yaml(prepared.config)}\n{_plan(prepared, hardware)}"))
        if prepared.config.cluster.joined_address:
            print(shown(f"places (nothing was started):\n{_places(prepared)}"))
        _print_start(prepared, console)
        return 0

    prepared = _claim(prepared)
    log_to(prepared.directory.log, held=False)
    _print_start(prepared, console)
    try:
        return asyncio.run(_evaluate(prepared, console))
    except ConfigError:  # refused by a worker at set-up: leave no trace of the run
        if not prepared.resume:
            prepared.directory.discard()
        raise


@dataclass(frozen=True, kw_only=True)
class PreparedModel:
    """A model that was checked, with its prompts and what its responses depend on."""

    model: EvaluatedModel
    sampling_run: RunConfig  # for its engine and the reward worker
    prompts: EvaluationPrompts
    parameters: int
    origin: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An evaluation that was checked and may start."""

    config: EvaluationRunConfig
    resume: bool
    directory: EvaluationDirectory
    problems: EvaluationProblems
    models: tuple[PreparedModel, ...]
    reasons: tuple[str, ...]  # of the precision, for config.yaml
    warnings: tuple[str, ...]


def _prepare(invocation: Invocation[EvaluationRunConfig], hardware: Hardware) -> Prepared:
    """Check everything that can be checked before Ray starts, without changing a file.

    Raises:
        ValueError: mistakes, a line each; `as_config_error` turns it into a ConfigError.
    """
    from rlsys.data.evaluation_problems import load_evaluation_problems
    from rlsys.run.evaluation_checks import evaluation_mistakes, ineffective_evaluation_options
    from rlsys.run.evaluation_directory import EvaluationDirectory
    from rlsys.run.evaluation_summary import check_breakdown

    config = invocation.config
    directory = EvaluationDirectory.named_by(config)
    mistakes = Mistakes()
    mistakes.lines += evaluation_mistakes(config, directory, hardware, resume=invocation.resume)
    problems = mistakes.attempt("data.eval", lambda: load_evaluation_problems(config))
    mistakes.refuse()
    assert problems is not None, "data that cannot be read is a mistake"
    check_breakdown(config, problems.problems)

    config, reasons, slow = _with_dtype(config, hardware)
    models = tuple(
        _prepare_model(config, field, path, problems) for field, path in config.model_paths
    )
    prepared = Prepared(
        config=config,
        resume=invocation.resume,
        directory=directory,
        problems=problems,
        models=models,
        reasons=reasons,
        warnings=(
            *slow,
            *ineffective_evaluation_options(config, invocation.explicit, hardware),
        ),
    )
    if invocation.resume:
        _check_origins(prepared)
    return prepared


def _with_dtype(
    config: EvaluationRunConfig, hardware: Hardware
) -> tuple[EvaluationRunConfig, tuple[str, ...], tuple[str, ...]]:
    """Choose the precision for this machine, the same for both models; with reasons, warnings."""
    from rlsys.config.command_line import evolve
    from rlsys.run.compute_dtype import choose_dtypes
    from rlsys.run.evaluated_model import resolve_evaluated

    field, path = config.model_paths[0]
    directory = resolve_evaluated(path, field).directory
    sampling_run = config.sampling_run()
    machines = machines_of(sampling_run, directory)
    choice = choose_dtypes(sampling_run, hardware, directory, machines=machines)
    chosen = evolve(config, {"generation.dtype": choice.config.generation.dtype})
    return chosen, choice.reasons, choice.warnings


def _prepare_model(
    config: EvaluationRunConfig, field: str, path: str, problems: EvaluationProblems
) -> PreparedModel:
    """Find and check one model, and tokenize the prompts for it."""
    from rlsys.data.evaluation_problems import evaluation_prompts
    from rlsys.models.loading import load_tokenizer, parameter_count
    from rlsys.run.evaluated_model import model_fingerprint, resolve_evaluated
    from rlsys.run.evaluation_checks import check_evaluated_model

    model = resolve_evaluated(path, field)
    sampling_run = check_evaluated_model(config, model)
    trust = config.model.trust_remote_code
    tokenizer = load_tokenizer(model.directory, trust_remote_code=trust)
    prompts = evaluation_prompts(config, problems.problems, tokenizer)
    generation = config.generation
    sampling = generation.model_dump(
        mode="json",
        include={"samples_per_prompt", "temperature", "top_p", "top_k", "min_tokens"}
        | {"max_tokens", "stop", "engine", "dtype"},
    )
    origin = {
        "step": model.step,
        "model": model_fingerprint(model.directory),
        "prompts": prompts.digest,
        **sampling,
        "reward.functions": [f.model_dump(mode="json") for f in config.reward.functions],
        "reward.on_failure": config.reward.on_failure,
        "evaluation.seed": config.evaluation.seed,
        "evaluation.prompts_per_part": config.evaluation.prompts_per_part,
    }
    return PreparedModel(
        model=model,
        sampling_run=sampling_run,
        prompts=prompts,
        parameters=parameter_count(model.directory),
        origin=origin,
    )


def _check_origins(prepared: Prepared) -> None:
    """Refuse to resume with models or settings other than those of the responses so far."""
    from rlsys.run.evaluation_checks import check_origin

    mistakes = Mistakes()
    for one in prepared.models:
        found = prepared.directory.responses_of(one.model.field).origin()
        mistakes.attempt(
            one.model.field, lambda one=one, found=found: check_origin(found, one.origin, one.model)
        )
    mistakes.refuse()


def _plan(prepared: Prepared, hardware: Hardware) -> str:
    """Describe what an evaluation would start. Nothing is started."""
    config = prepared.config
    generation = config.generation
    samples = generation.samples_per_prompt
    greedy = "greedy" if generation.temperature == 0 else f"temperature {generation.temperature:g}"
    rows = {
        "machine": f"{hardware.cpus} CPUs, {hardware.memory_gib:.0f} GiB, {hardware.gpus} GPUs",
        "ray": config.cluster.joined_address or "started on this machine",
    }
    bytes_each = 2 if generation.dtype == "bfloat16" else 4
    for one in prepared.models:
        weights = one.parameters * bytes_each / 1024**3
        rows[one.model.field] = (
            f"{one.model.name}: {one.parameters / 1e6:.1f} M parameters, {weights:.2f} GiB weights "
            f"({generation.dtype}); {len(one.prompts.prompts)} prompts x {samples} = "
            f"{len(one.prompts.prompts) * samples} responses"
        )
    rows |= {
        "generation": f"{generation.workers} x {generation.engine}, {greedy}, at most "
        f"{generation.max_tokens} tokens",
        "rewards": ", ".join(function.name for function in config.reward.functions),
        "data": f"{len(prepared.problems.problems)} problems ({prepared.problems.origin}), "
        f"template {config.data.template}",
        "run": f"into {prepared.directory.path}",
    }
    return "\n".join(f"{name:<13}{text}" for name, text in rows.items())


def _places(prepared: Prepared) -> str:
    """Join the cluster, find the place of every actor, and give all places back."""
    from workers.cluster import Cluster

    run = prepared.models[0].sampling_run
    cluster = Cluster.connect(run, roles=("generation",))
    try:
        return cluster.places({"reward": run.reward.workers})
    finally:
        cluster.shutdown()


def _claim(prepared: Prepared) -> Prepared:
    """Create the directory of a new evaluation; that of a resumed one gets the new fields."""
    directory = prepared.directory if prepared.resume else prepared.directory.claim()
    directory.create(prepared.config, prepared.reasons)
    return replace(prepared, directory=directory)


def _print_start(prepared: Prepared, console: Console) -> None:
    """Print the notices and the warnings, and write them to the log where there is one."""
    note = prepared.config.run.note
    notices = [
        *([note] if note else []),
        *prepared.reasons,
        f"data: {len(prepared.problems.problems)} problems ({prepared.problems.origin})",
        *prepared.problems.notices,
        *dict.fromkeys(notice for one in prepared.models for notice in one.prompts.notices),
    ]
    for line in notices:
        _print(console, line)
    for warning in prepared.warnings:
        _print(console, f"warning: {warning}", style="yellow")


def _print(console: Console, line: str, style: str | None = None) -> None:
    logging.getLogger(__name__).info("%s", line)
    console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


async def _evaluate(prepared: Prepared, console: Console) -> int:
    """Start the workers, sample with each model, report, and return the exit code."""
    from rlsys.driver.faults import FaultLog
    from rlsys.driver.response_collection import CollectionEvents, ResponseCollector
    from rlsys.run.observers.evaluation_console import EvaluationProgress
    from workers.cluster import Cluster
    from workers.local_ray import interrupt_on_sigterm
    from workers.reward_worker import RewardOutput

    began = time.monotonic()
    config = prepared.config
    progress = EvaluationProgress(console, live=config.run.progress)
    faults = FaultLog()
    faults.listen(lambda fault: progress.notice(fault.line()))
    finished = _with_place(faults, config.evaluation.prompts_per_part, progress.add)
    events = CollectionEvents(kept=progress.keep, finished=finished, notice=progress.notice)
    collector = ResponseCollector(config, events)
    pending = [one for one in prepared.models if not _is_complete(prepared, collector, one)]
    if not pending:
        _print(console, "all responses were sampled before; nothing is started")
        _report(prepared, console, complete=True, seconds=time.monotonic() - began)
        return 0

    interrupt_on_sigterm()
    names = " and ".join(one.model.name for one in pending)
    _print(console, f"{config.recipe}: {names}, starting Ray and the actors ...")
    # Not in a thread, although it blocks: Ray sets its signal handlers in the main thread only.
    cluster = Cluster.connect(prepared.models[0].sampling_run, roles=("generation",))
    cluster.faults = faults
    output = RewardOutput()
    failure: Exception | None = None
    complete = False
    try:
        scorer = await _start_rewards(cluster, prepared, output)
        _stop_on_signals(collector.request_stop, console)
        for one in pending:
            complete = await _sample(prepared, one, cluster, scorer, collector, progress)
            if not complete:
                break
    except Exception as error:
        # What cannot start is refused. Of the next model that is no reason to lose the one before.
        if isinstance(error, ConfigError) and not prepared.directory.has_responses:
            raise
        failure, complete = error, False
    finally:
        try:
            await output.finish()
            if not isinstance(sys.exception(), ConfigError):  # a refusal changes no file
                keep_logs(prepared.directory, console)
        finally:
            cluster.shutdown()

    _report(prepared, console, complete=complete, seconds=time.monotonic() - began)
    if failure is not None:
        return _report_failure(failure, prepared.directory, console)
    return 0 if complete else 130


def _with_place(
    faults: FaultLog, prompts_per_part: int, add: Callable[[ScoredResponses], None]
) -> Callable[[ScoredResponses], None]:
    """Return `add`, which also tells `faults` the number of parts that are done.

    So deaths that lie far apart are not taken for a crash at the same place.
    """
    answered = itertools.count(1)

    def finished(group: ScoredResponses) -> None:
        add(group)
        faults.enter(next(answered) // prompts_per_part, "")

    return finished


def _is_complete(prepared: Prepared, collector: ResponseCollector, one: PreparedModel) -> bool:
    """Return whether a model has answered every prompt."""
    files = prepared.directory.responses_of(one.model.field)
    return collector.is_complete(one.prompts.prompts, files)


async def _start_rewards(cluster: Cluster, prepared: Prepared, output: Any) -> RewardScorer:
    """Start the reward worker, which scores the responses of all models."""
    from recipes.wiring import spawn_reward_workers
    from workers.reward_worker import RewardWorkerClient

    actors = spawn_reward_workers(cluster, prepared.models[0].sampling_run)
    await cluster.wait_until_ready()
    output.follow(actors)
    return RewardWorkerClient(actors)


async def _sample(
    prepared: Prepared,
    one: PreparedModel,
    cluster: Cluster,
    scorer: RewardScorer,
    collector: ResponseCollector,
    progress: EvaluationProgress,
) -> bool:
    """Start the engines of one model, sample, stop them; return whether all is complete."""
    from recipes.wiring import spawn_engines
    from workers.generation.group import GenerationGroup

    if collector.is_stopped:
        return False
    files = prepared.directory.responses_of(one.model.field)
    files.create(one.origin)
    run = one.sampling_run
    engines = spawn_engines(cluster, run, one.model.directory)
    await cluster.wait_until_ready()
    progress.start(one.model.name, len(one.prompts.prompts))
    try:
        return await collector.collect(GenerationGroup(engines), scorer, one.prompts.prompts, files)
    finally:
        progress.stop()
        cluster.stop("generation")


def _report(prepared: Prepared, console: Console, *, complete: bool, seconds: float) -> None:
    """Write the results and the page, and print the tables, of what is complete so far."""
    from rlsys.run.directory import write_whole
    from rlsys.run.observers.evaluation_console import print_results
    from rlsys.run.observers.evaluation_report import write_evaluation_report

    directory = prepared.directory
    models = _reported_models(prepared)
    if not models:
        _print(console, "no prompt is complete yet")
        _print(console, f"continue with --run.directory {directory.path} --resume")
        return
    if not complete:
        _print(console, "incomplete: the results are those of the prompts so far", style="yellow")

    with console.status("computing the results ..."):  # answers are compared for majority votes
        results = _results(prepared, models, complete=complete)
    text = json.dumps(results.as_json(), indent=1, ensure_ascii=False, default=str)
    write_whole(directory.results, text)
    write_evaluation_report(prepared.config, results, models, directory)
    print_results(console, results, directory, seconds)
    if not complete:
        _print(console, f"continue with --run.directory {directory.path} --resume")


def _reported_models(prepared: Prepared) -> list[ReportedModel]:
    """Return the models that have responses in the files."""
    from rlsys.evaluation.responses import COLUMNS, COMPONENT, ModelResponses
    from rlsys.run.evaluation_summary import AnsweredModel
    from rlsys.run.observers.evaluation_report import TEXT_COLUMNS, ReportedModel

    def chosen(names: Sequence[str]) -> list[str]:
        wanted = {*COLUMNS, *TEXT_COLUMNS}
        return [name for name in names if name in wanted or name.startswith(COMPONENT)]

    models = []
    for one in prepared.models:
        table = prepared.directory.responses_of(one.model.field).read(chosen)
        if table is None:
            continue
        answered = AnsweredModel(
            model=one.model,
            prompts_total=len(one.prompts.prompts),
            dropped=one.prompts.dropped,
            responses=ModelResponses.of(table),
        )
        models.append(ReportedModel(answered=answered, texts=table.select(list(TEXT_COLUMNS))))
    return models


def _results(
    prepared: Prepared, models: Sequence[ReportedModel], *, complete: bool
) -> EvaluationResults:
    """Return the results of the responses in the files."""
    from rlsys.evaluation.overlap import find_overlap
    from rlsys.run.evaluation_summary import summarize

    problems = prepared.problems
    overlap = None
    if problems.train is not None:
        options = prepared.config.evaluation
        overlap = find_overlap(
            problems.problems,
            problems.train,
            options.overlap_ngram,
            fraction=options.overlap_fraction,
        )
    return summarize(
        prepared.config,
        [one.answered for one in models],
        problems.problems,
        origin=problems.origin,
        complete=complete,
        overlap=overlap,
        notices=problems.notices,
    )


def _report_failure(error: Exception, directory: EvaluationDirectory, console: Console) -> int:
    """Log the traceback, print the error and how to continue, and return the exit code."""
    logging.getLogger(__name__).error("the evaluation failed", exc_info=error)
    message = str(error).strip().splitlines()
    shown = message[-1] if message else type(error).__name__
    _print(console, f"the evaluation failed: {shown}", style="red")
    _print(
        console,
        f"details in {directory.log}, output of the actors in {directory.logs}. Continue with "
        f"--run.directory {directory.path} --resume",
    )
    return 1


def _stop_on_signals(request_stop: Callable[[], None], console: Console) -> None:
    """Stop and report at the first Ctrl-C or SIGTERM, and stop at once at the second."""
    loop = asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        _print(console, "stopping; the prompts that are complete are reported")
        request_stop()
        loop.remove_signal_handler(number)
        signal.signal(number, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
