"""The plan of a run: the actors that it would start, and roughly how much memory they need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlsys.config import RootConfig, RunConfig
from rlsys.config.hardware import Hardware
from rlsys.data.prompt_stream import LoadedProblems
from rlsys.data.text_stream import SourcedTexts
from rlsys.models.loading import parameter_count
from rlsys.rewards import pool_functions, reward_model_role, with_token_limit
from rlsys.run.directory import RunDirectory
from rlsys.run.model_checks import ModelDirectories
from rlsys.run.required_inputs import estimator_parameters
from rlsys.run.role_memory import planned_memory, rough_memory

OWN_REFERENCE = "the policy without its adapters (model.lora.rank)"


@dataclass(frozen=True, kw_only=True)
class PlannedData:
    """The data of a run."""

    problems: LoadedProblems
    texts: SourcedTexts


def describe_plan(
    config: RunConfig,
    hardware: Hardware,
    data: PlannedData,
    directories: ModelDirectories,
    directory: RunDirectory,
) -> str:
    """Describe what a run would start, with an estimate of its memory. Nothing is started.

    Memory of a rank: the peaks of `rlsys.plan`; where its formulas do not cover the run, those of
    policy and critic are rough sums without activations, which grow with policy.microbatch_tokens,
    or with ptx.max_tokens where a text is longer than that. Memory of an engine: its weights and
    the KV cache.
    """
    return as_table(plan_rows(config, hardware, data, directories, directory))


def as_table(rows: Mapping[str, str]) -> str:
    """Return the rows of a plan as text."""
    return "\n".join(f"{name:<13}{text}" for name, text in rows.items())


def plan_rows(
    config: RunConfig,
    hardware: Hardware,
    data: PlannedData,
    directories: ModelDirectories,
    directory: RunDirectory,
) -> dict[str, str]:
    """Return the rows of a plan by their names; see `describe_plan`."""
    parameters = parameter_count(directories.policy)
    planned = planned_memory(config, hardware, directories)
    return {
        "machine": f"{hardware.cpus} CPUs, {hardware.memory_gib:.0f} GiB, {hardware.gpus} GPUs",
        "ray": config.cluster.joined_address or "started on this machine",
        "model": f"{config.model.path}: {parameters / 1e6:.1f} M parameters",
        "generation": _generation(config, hardware, parameters),
        "weight sync": describe_sync(config, parameters),
        "policy": _policy(config, hardware, directories.policy, planned),
        "reference": _reference(config, planned),
        "critic": _critic(config, directories.critic, planned),
        "rewards": _rewards(config),
        "reward model": _reward_model(config, directories.reward_model),
        "advantages": _advantages(config),
        "data": f"{data.problems.describe()}, template {config.data.template}",
        "text": _text(config, data.texts),
        "step": _step(config),
        "run": describe_places(config, directory),
    }


def describe_places(config: RootConfig, directory: RunDirectory) -> str:
    """Return the row of a plan about what a run writes."""
    text = f"{config.trainer.steps} steps into {directory.path}"
    return f"{text}, stored in {config.run.storage}" if config.run.storage else text


def _generation(config: RunConfig, hardware: Hardware, parameters: int) -> str:
    generation = config.generation
    bytes_each = 2 if generation.dtype == "bfloat16" else 4
    weights_gib = parameters * bytes_each / 1024**3
    if hardware.gpus:
        gpu = f" + {generation.gpus_per_worker:g} GPU"
        cache = f"{generation.gpu_memory_utilization:.0%} of its GPU"
    else:
        gpu = ""
        cache = f"{generation.kv_cache_gib:g} GiB cache"
    return (
        f"{generation.workers} x {generation.engine}, {generation.cpus_per_worker} CPU{gpu} each; "
        f"{weights_gib:.2f} GiB weights ({generation.dtype}), {cache}"
    )


def describe_sync(config: RunConfig, parameters: int) -> str:
    """Return the row of a plan about the transfer of weights to the engines."""
    sync, generation = config.sync, config.generation
    place = sync.chosen_transport
    if place == "disk":
        place += f" ({sync.directory})"
    bytes_each = 2 if generation.dtype == "bfloat16" else 4
    size = parameters * bytes_each / 1024**3

    every = generation.probe_every
    probe = "each compared on a probe" if every == 1 else f"one in {every} compared on a probe"
    if generation.logprob_difference_tolerance == 0:
        probe = "not compared (generation.logprob_difference_tolerance is 0)"
    return f"{place}, {size:.2f} GiB in buckets of {sync.bucket_mb} MB; {probe}"


def _policy(
    config: RunConfig, hardware: Hardware, directory: Path, planned: Mapping[str, str]
) -> str:
    policy = config.policy
    memory = planned.get("policy") or rough_memory(policy, config, directory)
    gpu = f" + {policy.gpus_per_rank:g} GPU" if hardware.gpus else ""
    return f"{policy.ranks} x {policy.backend}, {policy.cpus_per_rank} CPU{gpu} each; {memory}"


def _critic(config: RunConfig, directory: Path, planned: Mapping[str, str]) -> str:
    if not config.critic.enabled:
        return "none (critic.enabled is false)"
    role = config.critic_role()
    memory = planned.get("critic") or rough_memory(role, config, directory)
    return f"{role.ranks} ranks beside the policy; {memory}"


def _reference(config: RunConfig, planned: Mapping[str, str]) -> str:
    if config.algorithm.kl.coefficient == 0:
        return "none (algorithm.kl.coefficient is 0)"
    if config.is_own_reference:
        return OWN_REFERENCE
    memory = f"; {planned['reference']}" if "reference" in planned else ""
    return f"{config.reference_role().ranks} ranks beside the policy{memory}"


def _rewards(config: RunConfig) -> str:
    functions = with_token_limit(
        pool_functions(config.reward.functions), config.generation.max_tokens
    )
    if not functions:
        return "no functions"
    names = [f"{function.name}{shown_parameters(function.parameters)}" for function in functions]
    workers = f"{config.reward.workers} workers of " if config.reward.workers > 1 else ""
    return f"{workers}{config.reward.processes} processes: {', '.join(names)}"


def _reward_model(config: RunConfig, directory: Path | None) -> str:
    if directory is None:
        return "none (no reward is a model)"
    role = reward_model_role(config)
    bytes_each = 2 if role.compute_dtype == "bfloat16" else 4
    weights_gib = parameter_count(directory) * bytes_each / role.ranks / 1024**3
    return (
        f"{role.ranks} ranks beside the policy; {weights_gib:.2f} GiB weights "
        f"({role.compute_dtype}), {directory}"
    )


def _advantages(config: RunConfig) -> str:
    algorithm = config.algorithm
    parameters = shown_parameters(estimator_parameters(config))
    return (
        f"{algorithm.advantage.name}{parameters}, "
        f"objective {algorithm.objective.ratio} x {algorithm.objective.weight}, "
        f"{algorithm.aggregation}"
    )


def _text(config: RunConfig, texts: SourcedTexts) -> str:
    ptx = config.ptx
    if not config.reads_text:
        return "none (ptx.coefficient is 0)"
    held_out = f"the loss of {len(texts.held_out)} held-out texts"
    if not config.evaluates_text:
        held_out = "no evaluation"
    if not ptx.trains:
        return f"none is trained on (ptx.coefficient is 0); {held_out}"
    return (
        f"{len(texts.train)} texts from {ptx.train}, {ptx.examples_per_step} a step of at most "
        f"{ptx.max_tokens} tokens, coefficient {ptx.coefficient:g}; {held_out}"
    )


def _step(config: RunConfig) -> str:
    policy, generation = config.policy, config.generation
    prompts, samples = config.trainer.prompts_per_step, generation.samples_per_prompt
    return (
        f"{prompts} prompts x {samples} samples = {prompts * samples} responses of at most "
        f"{generation.max_tokens} tokens; {policy.epochs * policy.num_mini_batches} optimizer steps"
    )


def shown_parameters(parameters: Mapping[str, object]) -> str:
    """Return " (a=1, b=2)" for keyword parameters, and "" where there are none."""
    pairs = ", ".join(f"{name}={value}" for name, value in parameters.items())
    return f" ({pairs})" if pairs else ""
