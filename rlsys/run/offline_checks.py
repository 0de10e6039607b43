"""Checks, plan and time estimate of a run on examples, before Ray starts.

What concerns the model, the engine, the rewards and the machine is checked as in an RL run, on
`OfflineRunConfig.online`, and reported under the names of this configuration.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlsys.config import ConfigError
from rlsys.config.command_line import evolve
from rlsys.config.errors import Mistakes
from rlsys.config.hardware import Hardware
from rlsys.config.offline import (
    OfflineRunConfig,
    ProcessRewardModelRunConfig,
    RewardModelRunConfig,
    named_as_here,
    offline_contradictions,
)
from rlsys.data.example_stream import LoadedExamples, SourcedExamples
from rlsys.models.loading import context_length, parameter_count
from rlsys.models.value_models import ValueLayout, check_layout_to_train
from rlsys.rewards import ground_truth_notices, refuse_rewards_of_training
from rlsys.run.compute_dtype import Machine, ProductSpeed, choose_dtypes
from rlsys.run.config_warnings import config_warnings
from rlsys.run.directory import RunDirectory
from rlsys.run.ineffective_options import ineffective_options
from rlsys.run.model_checks import ModelDirectories, check_model
from rlsys.run.plan import OWN_REFERENCE, describe_places, describe_sync
from rlsys.run.preflight import config_mistakes
from rlsys.run.role_memory import rough_memory
from rlsys.run.step_time import StepEstimate

# Sections and fields that only an evaluation by sampling reads.
SAMPLING_OPTIONS = (
    "generation.",
    "sync.",
    "reward.",
    "trainer.evaluation.samples_per_prompt",
    "trainer.evaluation.temperature",
    "trainer.evaluation.pass_at",
)
# How a model with a head for values is saved, by the kind of run that trains it.
LAYOUTS: Mapping[type[OfflineRunConfig], ValueLayout] = {
    RewardModelRunConfig: "sequence",
    ProcessRewardModelRunConfig: "token",
}


def offline_mistakes(
    config: OfflineRunConfig, directory: RunDirectory, hardware: Hardware, *, resume: bool
) -> list[str]:
    """Return the mistakes in a configuration, a line each; see `config_mistakes`."""
    online = config.online()
    mistakes = Mistakes()
    mistakes.lines += config_mistakes(online, directory, hardware, resume=resume)
    mistakes.attempt(
        "reward.functions",
        lambda: refuse_rewards_of_training(online.reward.functions, "a run on examples"),
    )
    lines = [named_as_here(line, config) for line in mistakes.lines]
    return list(dict.fromkeys([*lines, *offline_contradictions(config)]))


def check_offline_model(
    config: OfflineRunConfig, directory: Path, reference_directory: Path
) -> None:
    """Refuse models that the run cannot train, sample from or compare.

    Raises:
        ConfigError: see `check_model`; a head of another layout than the one that is trained; too
            few positions for a prompt and a response.
    """
    layout = LAYOUTS.get(type(config))
    try:
        directories = ModelDirectories(
            policy=directory, reference=reference_directory, critic=directory
        )
        check_model(config.online(), directories, trains_values=layout is not None)
    except ConfigError as error:
        raise ConfigError(named_as_here(str(error), config)) from error
    if layout is not None:
        try:
            check_layout_to_train(directory, layout)
        except ValueError as error:
            raise ConfigError(f"model.path: {config.model.path!r}: {error}") from error

    prompt, response = config.data.max_prompt_tokens, config.data.max_response_tokens
    limit = context_length(directory)
    if limit is not None and prompt + response > limit:
        raise ConfigError(
            f"data.max_response_tokens: data.max_prompt_tokens {prompt} + data.max_response_tokens "
            f"{response} exceed the model's {limit} positions. Lower one of them."
        )


@dataclass(frozen=True, kw_only=True)
class OfflineDtypes:
    """A configuration without `auto`; see `DtypeChoice`."""

    config: OfflineRunConfig
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    speed: ProductSpeed | None


def choose_offline_dtypes(
    config: OfflineRunConfig,
    hardware: Hardware,
    directory: Path,
    machines: Sequence[Machine] = (),
) -> OfflineDtypes:
    """Return the configuration with each precision that is `auto` resolved for this machine.

    Args:
        machines: see `choose_dtypes`.
    """
    choice = choose_dtypes(config.online(), hardware, directory, machines=machines)
    trained = config.trained_field
    chosen = {f"{trained}.compute_dtype": choice.config.policy.compute_dtype}
    if config.samples:
        chosen["generation.dtype"] = choice.config.generation.dtype
    return OfflineDtypes(
        config=evolve(config, chosen),
        reasons=tuple(named_as_here(reason, config) for reason in choice.reasons),
        warnings=tuple(named_as_here(warning, config) for warning in choice.warnings),
        speed=choice.speed,
    )


def estimate_offline_step(
    config: OfflineRunConfig,
    hardware: Hardware,
    *,
    parameters: int,
    example_tokens: float,
    speed: ProductSpeed | None,
) -> StepEstimate | None:
    """Estimate the time of a step, or return None where `speed` does not apply.

    A forward pass takes 2 operations for each parameter and token; with the backward pass it is 6.
    """
    if speed is None or config.cluster.joined_address is not None:
        return None
    tokens = config.trainer.examples_per_step * example_tokens
    passes = 6 + (2 if config.reference_role() is not None else 0)
    cores = 1e9 * hardware.cpus
    seconds = passes * parameters * tokens / (cores * speed.of(config.trained.compute_dtype))
    return StepEstimate(training_s=seconds, sampling_s=0.0)


def describe_offline_plan(
    config: OfflineRunConfig,
    hardware: Hardware,
    examples: SourcedExamples,
    model_directory: Path,
    directory: RunDirectory,
) -> str:
    """Describe what a run would start, with a rough estimate of its memory; see `describe_plan`."""
    parameters = parameter_count(model_directory)
    trained = config.trained
    gpu = f" + {trained.gpus_per_rank:g} GPU" if hardware.gpus else ""
    rows = {
        "machine": f"{hardware.cpus} CPUs, {hardware.memory_gib:.0f} GiB, {hardware.gpus} GPUs",
        "ray": config.cluster.joined_address or "started on this machine",
        "model": f"{config.model.path}: {parameters / 1e6:.1f} M parameters",
        config.trained_field: (
            f"{trained.ranks} x {trained.backend}, {trained.cpus_per_rank} CPU{gpu} each; "
            f"{rough_memory(trained, config, model_directory)}"
        ),
    }
    reference = config.reference_role()
    if reference is not None:
        rows["reference"] = f"{reference.ranks} ranks beside the policy"
        if config.online().is_own_reference:
            rows["reference"] = OWN_REFERENCE
    rows |= {
        "data": f"{examples.describe()}, template {config.data.template}",
        "step": f"{config.trainer.examples_per_step} examples, one optimizer step",
        "evaluation": _evaluation(config, examples),
        **_weight_sync(config, examples, parameters),
        "run": describe_places(config, directory),
    }
    width = max(map(len, rows)) + 2
    return "\n".join(f"{name:<{width}}{text}" for name, text in rows.items())


def _evaluation(config: OfflineRunConfig, examples: SourcedExamples) -> str:
    every = config.trainer.evaluation.every
    if not examples.held_out or not every:
        return "none"
    text = f"loss of {len(examples.held_out)} held-out examples"
    if config.samples and config.trainer.evaluation.problems:
        generation = getattr(config, "generation")  # noqa: B009  (not of every subclass)
        text += (
            f", answers to at most {config.trainer.evaluation.problems} of them by "
            f"{generation.workers} x {generation.engine}"
        )
    return f"{text}; every {every} steps"


def _weight_sync(
    config: OfflineRunConfig, examples: SourcedExamples, parameters: int
) -> dict[str, str]:
    """Return the row about the transfer of weights, of a run whose evaluation samples."""
    trainer = config.trainer
    evaluates = bool(examples.held_out) and trainer.evaluation.every > 0
    if not (evaluates and config.samples and trainer.evaluation.problems):
        return {}
    return {"weight sync": describe_sync(config.online(), parameters)}


def offline_notices(config: OfflineRunConfig, loaded: LoadedExamples) -> Iterator[str]:
    """Yield remarks on the data, for the user."""
    yield from loaded.notices
    size = config.trainer.examples_per_step
    if size > len(loaded.train):
        yield (
            f"trainer.examples_per_step: WARNING: {size} is more than the {len(loaded.train)} "
            "training examples, so each step holds the same example several times. Lower it"
        )
    wants_answers = config.samples and config.trainer.evaluation.problems > 0
    if loaded.held_out is not None and wants_answers and not len(loaded.problems):
        yield (
            "trainer.evaluation: no held-out example has a known answer (data.columns.answer), so "
            "the evaluation computes the loss only"
        )


def offline_warnings(
    config: OfflineRunConfig,
    explicit: Collection[str],
    hardware: Hardware,
    loaded: LoadedExamples,
) -> Iterator[str]:
    """Yield warnings about options that have no effect or may not be intended."""
    online = config.online()
    prefix = f"{config.trained_field}."
    names = frozenset(
        f"policy.{name.removeprefix(prefix)}" if name.startswith(prefix) else name
        for name in explicit
    )
    shared = [*config_warnings(online), *ineffective_options(online, names, hardware)]
    yield from (named_as_here(line, config) for line in shared)
    if not len(loaded.problems):
        yield from _unused_sampling(explicit)
    elif config.samples:
        answers = {"data.eval": [prompt.ground_truth for prompt in loaded.problems.prompts]}
        yield from ground_truth_notices(getattr(config, "reward").functions, answers)  # noqa: B009


def _unused_sampling(explicit: Iterable[str]) -> Iterator[str]:
    unused = sorted(name for name in explicit if name.startswith(SAMPLING_OPTIONS))
    if unused:
        yield f"{', '.join(unused)}: no effect, since nothing is sampled in this run."
