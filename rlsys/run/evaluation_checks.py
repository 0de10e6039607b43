"""Checks of an evaluation before Ray starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from rlsys.config import ConfigError, RunConfig
from rlsys.config.command_line import flat
from rlsys.config.errors import Mistakes
from rlsys.config.evaluation_run import (
    EvaluationRunConfig,
    evaluation_contradictions,
    reads_files,
)
from rlsys.config.hardware import Hardware
from rlsys.data.prompt_templates import load_template
from rlsys.plugins import load_plugins
from rlsys.rewards import refuse_rewards_of_training
from rlsys.run.evaluated_model import EvaluatedModel, check_evaluated_path, named
from rlsys.run.evaluation_directory import EvaluationDirectory
from rlsys.run.ineffective_options import TABLE, Ineffective, Setting, without_effect
from rlsys.run.machine_checks import engine_mistakes, label_mistakes, memory_mistakes
from rlsys.run.model_checks import ModelDirectories, check_model
from rlsys.run.preflight import check_address, check_reward


def evaluation_mistakes(
    config: EvaluationRunConfig,
    directory: EvaluationDirectory,
    hardware: Hardware,
    *,
    resume: bool,
) -> list[str]:
    """Return the mistakes in a configuration, a line each, before any process is started.

    Raises:
        ValueError: a plug-in cannot be loaded, so that the names it registers are unknown.
    """
    load_plugins(config.plugins)
    mistakes = Mistakes()
    for field, check in _checks(config, directory, resume=resume):
        mistakes.attempt(field, check)
    mistakes.lines += evaluation_contradictions(config)
    if config.cluster.joined_address is None:
        sampling_run = config.sampling_run()
        mistakes.lines += engine_mistakes(sampling_run, hardware)
        mistakes.lines += memory_mistakes(sampling_run, hardware)
        mistakes.lines += label_mistakes(sampling_run)
        mistakes.lines += _places(config, hardware)
    return mistakes.lines


def _checks(
    config: EvaluationRunConfig, directory: EvaluationDirectory, *, resume: bool
) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "run.directory", lambda: directory.check(resume=resume)
    for field, path in config.model_paths:
        yield field, lambda field=field, path=path: check_evaluated_path(path, field)
    yield "data.template", lambda: load_template(config.data.template)
    yield "cluster.address", lambda: check_address(config.sampling_run())
    for function in config.reward.functions:
        yield (
            "reward.functions",
            lambda function=function: check_reward(function, config.generation.max_tokens),
        )
    yield (
        "reward.functions",
        lambda: refuse_rewards_of_training(config.reward.functions, "recipes.evaluate_math"),
    )


def _places(config: EvaluationRunConfig, hardware: Hardware) -> Iterator[str]:
    """Yield a mistake where Ray could not place all workers on this machine."""
    generation = config.generation
    cpus = generation.workers * generation.cpus_per_worker
    if cpus > hardware.cpus:
        yield (
            f"generation.workers: {generation.workers} workers need {cpus} CPUs, this machine has "
            f"{hardware.cpus}. Lower it or generation.cpus_per_worker, or join a larger cluster "
            "with cluster.address."
        )
    gpus = generation.workers * generation.gpus_per_worker * generation.tensor_parallel
    if hardware.gpus and gpus > hardware.gpus:
        yield (
            f"generation.workers: {generation.workers} workers need {gpus:g} GPUs, this machine "
            f"has {hardware.gpus}. Lower it, generation.gpus_per_worker or "
            "generation.tensor_parallel, or join a larger cluster with cluster.address."
        )


def check_evaluated_model(config: EvaluationRunConfig, model: EvaluatedModel) -> RunConfig:
    """Refuse a model that cannot be sampled with these settings; return its sampling run.

    Raises:
        ValueError: see `check_model`; the message names the field of the model.
    """
    sampling_run = config.sampling_run()
    section = sampling_run.model.model_copy(update={"path": model.path})
    sampling_run = sampling_run.model_copy(update={"model": section})
    directories = ModelDirectories.same(model.directory)
    named(model.field, lambda: check_model(sampling_run, directories))
    return sampling_run


# Entries of an origin that are hashes.
HASHED = {"model": "files of the model", "prompts": "prompts"}


def check_origin(
    found: Mapping[str, Any] | None, origin: Mapping[str, Any], model: EvaluatedModel
) -> None:
    """Refuse to add responses to others that depend on something else.

    Raises:
        ConfigError: what differs, with the remedy.
    """
    if found is None:
        return
    differing = [name for name in origin if found.get(name) != origin[name]]
    if not differing:
        return
    shown = "; ".join(
        f"other {HASHED[name]}"
        if name in HASHED
        else f"{name} {found.get(name)!r} -> {origin[name]!r}"
        for name in differing
    )
    raise ConfigError(
        f"{model.field}: the responses in run.directory were sampled with other settings "
        f"({shown}). Resume with the same ones, or start a new evaluation in another directory."
    )


# Rows about the engine and the cluster hold in every kind of run.
SHARED_ROWS = tuple(
    row for row in TABLE if any(o.startswith(("generation.", "cluster.")) for o in row.options)
)


def ineffective_evaluation_options(
    config: EvaluationRunConfig, explicit: Iterable[str], hardware: Hardware
) -> Iterator[str]:
    """Yield a warning for each option that was set on purpose and has no effect here."""
    setting = Setting(config=config.sampling_run(), hardware=hardware)
    values = flat(config.model_dump(mode="json"))
    rows = (*SHARED_ROWS, *_rows(config))
    yield from without_effect(rows, setting, values, explicit)


def _rows(config: EvaluationRunConfig) -> Iterator[Ineffective]:
    """Yield the options without an effect in this configuration."""
    data = config.data
    generates_train = data.train == "synthetic"
    generates_eval = data.eval in ("synthetic", "auto") and data.train in ("off", "synthetic")

    if config.generation.temperature == 0:
        because = "generation.temperature is 0, which takes the likeliest token"
        yield _row("generation.top_p", "generation.top_k", because=because)
    if data.train == "off":
        because = "data.train is off"
        yield _row("evaluation.overlap_ngram", "evaluation.overlap_fraction", because=because)
    if data.eval != "auto":
        yield _row("data.held_out", because="data.eval is not auto")
    elif generates_train:
        because = "data.train is synthetic, which generates its own held-out problems"
        yield _row("data.held_out", because=because)
    if not generates_eval:
        yield _row("data.synthetic.eval_size", because="data.eval is not generated")
    if not generates_train:
        yield _row("data.synthetic.train_size", because="data.train is not synthetic")
    if not (generates_eval or generates_train):
        yield _row("data.synthetic.", because="no problems are generated")
    if not reads_files(config):
        yield _row("data.columns.", "data.blank_rows", because="no file of problems is read")


def _row(*options: str, because: str) -> Ineffective:
    return Ineffective(options=options, condition=lambda _: True, reason=because)
