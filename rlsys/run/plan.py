"""The plan of a run: the actors that it would start, and roughly how much memory they need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlsys.config import LoraConfig, RootConfig, RunConfig, TrainableRoleConfig
from rlsys.config.hardware import Hardware
from rlsys.data.prompt_stream import LoadedProblems
from rlsys.data.text_stream import SourcedTexts
from rlsys.models.adapters import adapter_parameters
from rlsys.models.loading import parameter_count
from rlsys.rewards import pool_functions, reward_model_role, with_token_limit
from rlsys.run.directory import RunDirectory
from rlsys.run.model_checks import ModelDirectories
from rlsys.run.required_inputs import estimator_parameters

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
    """Describe what a run would start, with a rough estimate of its memory. Nothing is started.

    Memory of a rank of the policy or the critic: see `training_memory`. Memory of an engine: its
    weights and the KV cache. Activations are not included; they grow with policy.microbatch_tokens,
    or with ptx.max_tokens where a text is longer than that.
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
    return {
        "machine": f"{hardware.cpus} CPUs, {hardware.memory_gib:.0f} GiB, {hardware.gpus} GPUs",
        "ray": config.cluster.joined_address or "started on this machine",
        "model": f"{config.model.path}: {parameters / 1e6:.1f} M parameters",
        "generation": _generation(config, hardware, parameters),
        "weight sync": describe_sync(config, parameters),
        "policy": _policy(config, hardware, directories.policy),
        "reference": _reference(config),
        "critic": _critic(config, directories.critic),
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


def _policy(config: RunConfig, hardware: Hardware, directory: Path) -> str:
    policy = config.policy
    gpu = f" + {policy.gpus_per_rank:g} GPU" if hardware.gpus else ""
    return (
        f"{policy.ranks} x {policy.backend}, {policy.cpus_per_rank} CPU{gpu} each; "
        f"{training_memory(policy, config, directory)}"
    )


def training_memory(role: TrainableRoleConfig, config: RootConfig, directory: Path) -> str:
    """Describe the memory of one rank of a trained model; see `describe_plan`."""
    text = _rank_memory(role, config.model.lora, directory)
    if not config.trainer.checkpoints.asynchronous:
        return text
    copy_gib = checkpoint_copy_bytes(role, config.model.lora, directory) / 1024**3
    return f"{text}; {copy_gib:.2f} GiB of host memory for the copy that checkpoints are made of"


def checkpoint_copy_bytes(role: TrainableRoleConfig, lora: LoraConfig, directory: Path) -> float:
    """Return the bytes of a rank's copy with `trainer.checkpoints.asynchronous`.

    Masters (4 bytes) and moments (8) are those of the rank; the first has all adapters.
    """
    if lora.rank:
        return adapter_parameters(directory, lora) * (4 + 8 / role.ranks)
    return parameter_count(directory) * 12 / role.ranks


def _rank_memory(role: TrainableRoleConfig, lora: LoraConfig, directory: Path) -> str:
    parameters = parameter_count(directory)
    if lora.rank:
        stored = 2 if role.compute_dtype == "bfloat16" else 4  # bytes per parameter
        adapters = adapter_parameters(directory, lora)
        rank_gib = (parameters * stored + adapters * 16) / role.ranks / 1024**3
        return (
            f"{rank_gib:.2f} GiB weights ({role.compute_dtype}), with adapters of rank {lora.rank} "
            f"({adapters / 1e6:.2f} M parameters), their gradients and Adam, and activations"
        )
    rank_gib = parameters * training_bytes(role) / 1024**3
    return f"{rank_gib:.2f} GiB weights, gradients and Adam ({role.compute_dtype}), and activations"


def training_bytes(role: TrainableRoleConfig) -> float:
    """Return the bytes per parameter that one rank of a trained model needs.

    Masters and gradients are float32 (4 bytes each), Adam has two moments (8). The copy in the
    compute dtype is counted whole, since FSDP2 gathers it; DeepSpeed has one in float32 as well.
    """
    copy = 2 if role.compute_dtype == "bfloat16" else 4
    if role.backend == "fsdp2":
        return 16 / role.ranks + (copy if copy == 2 else 0)

    stage = role.deepspeed.zero_stage
    gradients = 4 / role.ranks if stage >= 2 else 4
    weights = copy / role.ranks if stage == 3 else copy
    return 12 / role.ranks + gradients + weights


def _critic(config: RunConfig, directory: Path) -> str:
    if not config.critic.enabled:
        return "none (critic.enabled is false)"
    role = config.critic_role()
    memory = training_memory(role, config, directory)
    return f"{role.ranks} ranks beside the policy; {memory}"


def _reference(config: RunConfig) -> str:
    if config.algorithm.kl.coefficient == 0:
        return "none (algorithm.kl.coefficient is 0)"
    if config.is_own_reference:
        return OWN_REFERENCE
    return f"{config.reference_role().ranks} ranks beside the policy"


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
