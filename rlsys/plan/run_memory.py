"""The memory of a whole run: all roles on the GPUs and hosts that they share.

A process never gives memory of a GPU back to the others, since torch's allocator keeps what it has
freed and nothing empties it. So what counts on a GPU is the sum over its processes of their own
peaks, not the largest sum of one phase.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlsys.config.errors import ConfigError
from rlsys.plan import formulas
from rlsys.plan.gpus import GIB, Gpu
from rlsys.plan.roles import (
    CHECKPOINT_COPY,
    Peak,
    RankSettings,
    checkpoint_moments,
    forward_moments,
    frozen_weights,
    resting,
    setup_moments,
    sync_moments,
    update_moments,
    with_checkpoint_copy,
)
from rlsys.plan.shapes import ModelShape

if TYPE_CHECKING:
    from rlsys.config import ModelRoleConfig, RunConfig, TrainableRoleConfig

# Resident memory of a rank process on a CPU once a tiny model has run: 534 MiB, measured with
# benchmarks/memory_plan.py.
PROCESS_BYTES = 0.53 * GIB
# Of each process on a GPU: CUDA context, NCCL, libraries. An assumption; never measured.
CONTEXT_BYTES = 0.75 * GIB
# Bytes of a token in the object store: id, mask, and four float32 numbers.
BATCH_TOKEN_BYTES = 4 + 1 + 4 * 4
# Sequences of the engine need room besides weights and cache: activations of one step of the
# engine. An assumption; vLLM measures its own at start.
ENGINE_WORKING_BYTES = 2 * GIB

PHASES = ("set-up", "generate", "log-probs", "update", "sync", "checkpoint")
CPU_KERNELS = {"auto": "shared_prefix", "sdpa": "shared_prefix"}
# auto is flash_attention_2 where it is installed; sdpa needs more, so the plan counts that.
GPU_KERNELS = {"auto": "sdpa", "sdpa": "sdpa", "flash_attention_2": "flash"}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a run would be."""

    gpu: Gpu | None  # None: CPUs
    gpus: int
    gpus_per_node: int = 8

    def __post_init__(self) -> None:
        if self.gpu is not None and self.gpus < 1:
            raise ConfigError(f"--gpus: {self.gpus} is not above 0. Give the number of GPUs.")
        if self.gpus_per_node < 1:
            raise ConfigError(f"--gpus-per-node: {self.gpus_per_node} is not above 0.")


@dataclass(frozen=True, kw_only=True)
class RolePlan:
    """The peaks of rank 0 of a role, by phase; the other ranks need no more."""

    role: str
    ranks: int
    parameters: int
    tokens: int  # of a pack
    peaks: tuple[Peak, ...]

    @property
    def device_bytes(self) -> float:
        """What the process takes of its GPU."""
        return max(peak.device.device_bytes for peak in self.peaks) + CONTEXT_BYTES

    @property
    def set_up_bytes(self) -> float:
        """What loading and checking the model take of its GPU."""
        (set_up,) = (peak for peak in self.peaks if peak.phase == "set-up")
        return set_up.device.device_bytes


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """One generation worker."""

    workers: int
    gpus: int  # of each worker
    weights: float  # bytes on each GPU, or in host memory
    cache_of_all: float  # bytes of the KV cache of all its sequences at full length, on each GPU
    reserved: float  # bytes that it takes of each GPU, or of host memory
    sequences: int  # of a step, for each worker
    at_once: float  # sequences of full length that fit beside the weights


@dataclass(frozen=True, kw_only=True)
class RunMemory:
    """The memory of a run, and what does not fit."""

    machine: Machine
    roles: tuple[RolePlan, ...]
    engine: EnginePlan
    shared: bool  # engines and ranks share GPUs
    training_gpu: float  # bytes of the fullest GPU of the ranks; 0 on CPUs
    engine_gpu: float
    node: Mapping[str, float]  # bytes of the host of rank 0, by phase
    object_store: float  # bytes, on each node that has an engine or rank 0
    problems: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.problems


def plan_run(
    config: RunConfig,
    machine: Machine,
    shape: ModelShape,
    shape_of: Callable[[str], ModelShape],
    *,
    margin: float = 0.0,
) -> RunMemory:
    """Return the memory of a run.

    Args:
        shape: that of model.path.
        shape_of: returns the shape of another model by its path.
        margin: fraction of each GPU that has to stay free.

    Raises:
        ConfigError: the configuration has an option that the formulas do not cover.
    """
    refuse_uncovered(config, machine)
    roles = tuple(_roles(config, machine, shape, shape_of))
    engine = engine_plan(config, machine, shape)
    generation, policy = config.generation, config.policy
    shared = machine.gpu is not None and generation.gpus_per_worker + policy.gpus_per_rank <= 1

    training_gpu = sum(role.device_bytes for role in roles) if machine.gpu else 0.0
    engine_gpu = engine.reserved if machine.gpu else 0.0
    if shared:
        training_gpu = engine_gpu = training_gpu + engine_gpu
    memory = RunMemory(
        machine=machine,
        roles=roles,
        engine=engine,
        shared=shared,
        training_gpu=training_gpu,
        engine_gpu=engine_gpu,
        node=_host_of_node(machine, roles, engine),
        object_store=object_store_bytes(config, machine, shape),
        problems=(),
    )
    problems = tuple(_problems(config, memory, margin))
    return RunMemory(**{**vars(memory), "problems": problems})


def object_store_bytes(config: RunConfig, machine: Machine, shape: ModelShape) -> float:
    """Return what Ray's object store holds at once: versions of the weights, and batches.

    v (e P + 21 N),    N tokens of all sequences of a step at full length, v versions: 1, and with
    asynchronous training one more for each step of `trainer.max_staleness`, as long as workers
    have not installed them. Of the transport disk, without e P.
    """
    generation = config.generation
    length = config.data.max_prompt_tokens + generation.max_tokens
    tokens = config.trainer.prompts_per_step * generation.samples_per_prompt * length
    weights = engine_bytes(config, machine) * shape.parameters()
    if config.sync.chosen_transport == "disk":
        weights = 0
    versions = 1 + config.trainer.max_staleness
    return versions * float(weights + BATCH_TOKEN_BYTES * tokens)


def refuse_uncovered(config: RunConfig, machine: Machine) -> None:
    """Refuse options whose memory no formula counts.

    Raises:
        ConfigError: a line for each.
    """
    kernels = GPU_KERNELS if machine.gpu else CPU_KERNELS
    place = "GPUs" if machine.gpu else "CPUs"
    lines = []
    if config.model.attention not in kernels:
        lines.append(
            f"model.attention: the plan does not cover {config.model.attention!r} on {place}. "
            f"Choose {' or '.join(kernels)}."
        )
    if config.policy.packing is False:
        lines.append(
            "policy.packing: the plan does not cover false, where the logits of all positions "
            "exist at once. Choose auto."
        )
    if config.algorithm.kl.coefficient and config.algorithm.kl.estimator == "exact":
        lines.append(
            "algorithm.kl.kind: the plan does not cover 'exact', which keeps hidden states and "
            "the LM head of the reference. Choose another kind."
        )
    if config.algorithm.advantage.recompute:
        lines.append(
            "algorithm.advantage.recompute: the plan does not cover true, which adds an estimator "
            "to the update. Choose false."
        )
    if config.policy.backend != "fsdp2":
        lines.append(
            f"policy.backend: the plan does not cover {config.policy.backend!r}, which shards and "
            "gathers otherwise. Choose fsdp2; --dry-run of a recipe has a rough sum for it."
        )
    if config.model.lora.rank:
        lines.append(
            f"model.lora.rank: the plan does not cover {config.model.lora.rank}: with adapters the "
            "base has no gradients and no moments. Set it to 0; --dry-run of a recipe has a rough "
            "sum for it."
        )
    frozen = {"policy": config.policy.frozen, "critic": config.critic.frozen}
    lines += [
        f"{role}.frozen: the plan does not cover frozen parameters, which have no gradients and no "
        "moments. Leave it empty for an upper bound."
        for role, patterns in frozen.items()
        if patterns
    ]
    if config.diagnostics.gradient:
        lines.append(
            "diagnostics.gradient: the plan does not cover true, which keeps gradients of its own. "
            "Choose false."
        )
    if lines:
        raise ConfigError("\n".join(lines))


def compute_bytes(dtype: str, machine: Machine) -> int:
    """Return the bytes of a number; auto is bfloat16 on GPUs, and float32 on CPUs."""
    if dtype == "auto":
        return 2 if machine.gpu else 4
    return {"float32": 4, "bfloat16": 2}[dtype]


def engine_bytes(config: RunConfig, machine: Machine) -> int:
    """Return the bytes of a number of the engine's weights and cache."""
    return compute_bytes(config.generation.dtype, machine)


def rank_settings(
    config: RunConfig,
    role: ModelRoleConfig | TrainableRoleConfig,
    machine: Machine,
    *,
    value_head: bool = False,
) -> RankSettings:
    """Return the sizes on which the memory of a role's ranks depends.

    A pack has `microbatch_tokens` tokens, more where one sequence is longer, and fewer where a
    whole step is shorter. All of them may be tokens of responses.
    """
    generation, prompt = config.generation, config.data.max_prompt_tokens
    group = prompt + generation.samples_per_prompt * generation.max_tokens
    if not role.shared_prefix_packing:
        group = prompt + generation.max_tokens
    longest = max(prompt + generation.max_tokens, config.longest_text)
    copies = 1 if role.shared_prefix_packing else generation.samples_per_prompt
    step = config.trainer.prompts_per_step * copies * group
    tokens = max(longest, min(role.microbatch_tokens, step))

    kernels = GPU_KERNELS if machine.gpu else CPU_KERNELS
    return RankSettings(
        ranks=role.ranks,
        compute_bytes=compute_bytes(role.compute_dtype, machine),
        tokens=tokens,
        response_tokens=tokens,
        chunk_tokens=role.logit_chunk_tokens,
        kernel=kernels[config.model.attention],
        group_tokens=min(group, tokens),
        gradient_checkpointing=getattr(role, "gradient_checkpointing", False),
        offload=getattr(role, "offload_optimizer", False) and machine.gpu is not None,
        several_packs=step > tokens,
        entropy_bonus=config.algorithm.entropy.bonus > 0,
        value_head=value_head,
        on_gpu=machine.gpu is not None,
        checkpoint_copy=config.trainer.checkpoints.asynchronous,
    )


def _roles(
    config: RunConfig,
    machine: Machine,
    shape: ModelShape,
    shape_of: Callable[[str], ModelShape],
) -> Iterator[RolePlan]:
    from rlsys.rewards import reward_model_of, reward_model_role

    def of(path: str | None) -> ModelShape:
        return shape if path is None else shape_of(path)

    policy = rank_settings(config, config.policy, machine)
    sync = sync_moments(
        shape,
        policy,
        engine_bytes=engine_bytes(config, machine),
        bucket_bytes=config.sync.bucket_bytes,
    )
    yield _trained("policy", shape, policy, {"sync": sync})
    if config.algorithm.kl.coefficient:
        reference = rank_settings(config, config.reference_role(), machine)
        yield _frozen("reference", of(config.reference.path), reference)
    if config.critic.enabled:
        critic = rank_settings(config, config.critic_role(), machine, value_head=True)
        yield _trained("critic", of(config.critic.path), critic, {})
    function = reward_model_of(config.reward.functions)
    if function is not None:
        role = rank_settings(config, reward_model_role(config), machine, value_head=True)
        yield _frozen("reward model", of(function.parameters.get("path")), role)


def _trained(
    role: str, shape: ModelShape, settings: RankSettings, further: Mapping[str, tuple]
) -> RolePlan:
    trained = {
        "log-probs": forward_moments(shape, settings, resting(shape, settings)),
        "update": update_moments(shape, settings),
        **further,
        "checkpoint": checkpoint_moments(shape, settings),
    }
    copied = {
        name: with_checkpoint_copy(shape, settings, moments) for name, moments in trained.items()
    }
    return _role(role, shape, settings, {"set-up": setup_moments(shape, settings), **copied})


def _frozen(role: str, shape: ModelShape, settings: RankSettings) -> RolePlan:
    weights = frozen_weights(shape, settings)
    phases = {
        "set-up": setup_moments(shape, settings, frozen=True),
        "log-probs": forward_moments(shape, settings, weights),
    }
    return _role(role, shape, settings, phases)


def _role(
    role: str, shape: ModelShape, settings: RankSettings, phases: Mapping[str, tuple]
) -> RolePlan:
    return RolePlan(
        role=role,
        ranks=settings.ranks,
        parameters=shape.parameters(value_head=settings.value_head),
        tokens=settings.tokens,
        peaks=tuple(Peak.of(name, moments) for name, moments in phases.items()),
    )


def engine_plan(config: RunConfig, machine: Machine, shape: ModelShape) -> EnginePlan:
    """Return the memory of a generation worker."""
    generation = config.generation
    size = engine_bytes(config, machine)
    length = config.data.max_prompt_tokens + generation.max_tokens
    sequences = config.trainer.prompts_per_step * generation.samples_per_prompt
    of_worker = -(-sequences // generation.workers)
    parallel = generation.tensor_parallel if machine.gpu else 1

    weights = size * shape.parameters() / parallel
    each = formulas.kv_cache(shape, length, size, parallel)
    if machine.gpu:
        reserved = generation.gpu_memory_utilization * machine.gpu.memory
        free = reserved - weights - ENGINE_WORKING_BYTES
    else:
        free = generation.kv_cache_gib * GIB
        reserved = weights + free + PROCESS_BYTES
    if generation.engine == "transformers":  # it has no limit: all sequences are in the cache
        free = each * of_worker
        reserved = weights + free + (CONTEXT_BYTES if machine.gpu else PROCESS_BYTES)
    return EnginePlan(
        workers=generation.workers,
        gpus=parallel if machine.gpu else 0,
        weights=weights,
        cache_of_all=each * of_worker,
        reserved=reserved,
        sequences=of_worker,
        at_once=max(free, 0.0) / each,
    )


# What only one rank of a group has at a time.
OF_FIRST_RANK = ("gathered weight", "bucket")
SHARED_BY_RANKS = ("mapped files",)


def _host_of_node(
    machine: Machine, roles: tuple[RolePlan, ...], engine: EnginePlan
) -> dict[str, float]:
    """Return the host memory of rank 0's node by phase, its processes included.

    All ranks are on one node as far as it has GPUs; the engines of a run on CPUs are there too.
    """
    found = {}
    for phase in PHASES:
        total = 0.0 if machine.gpu else engine.workers * engine.reserved
        for role in roles:
            ranks = min(role.ranks, machine.gpus_per_node) if machine.gpu else role.ranks
            total += ranks * PROCESS_BYTES + _host_of_role(role, phase, ranks)
        found[phase] = total
    return found


def _host_of_role(role: RolePlan, phase: str, ranks: int) -> float:
    """Return the host memory of a role's ranks on one node in a phase."""
    peak = next((peak for peak in role.peaks if peak.phase == phase), None)
    if peak is None:  # it rests
        forward = next(peak for peak in role.peaks if peak.phase == "log-probs")
        held = ("masters", "moments", "weights", CHECKPOINT_COPY)
        return ranks * sum(forward.host.host.get(name, 0.0) for name in held)
    once = OF_FIRST_RANK + SHARED_BY_RANKS
    return sum(size * (1 if name in once else ranks) for name, size in peak.host.host.items())


def _problems(config: RunConfig, memory: RunMemory, margin: float) -> Iterator[str]:
    machine, generation, policy = memory.machine, config.generation, config.policy
    if memory.object_store > config.cluster.object_store_gib * GIB:
        yield (
            f"cluster.object_store_gib: {config.cluster.object_store_gib:g} is less than the "
            f"{memory.object_store / GIB:.1f} GiB of a weight sync and a batch. Set it to at least "
            f"{memory.object_store / GIB + 0.5:.0f}."
        )
    if memory.engine.at_once < 1:
        field = "generation.gpu_memory_utilization" if machine.gpu else "generation.kv_cache_gib"
        yield (
            f"{field}: beside {memory.engine.weights / GIB:.1f} GiB of weights the cache has no "
            "room for one sequence of full length. Raise it, or generation.tensor_parallel, or "
            "lower generation.max_tokens."
        )
    if machine.gpu is None:
        return

    wanted = policy.ranks * policy.gpus_per_rank
    wanted += generation.workers * generation.tensor_parallel * generation.gpus_per_worker
    if wanted > machine.gpus:
        yield (
            f"--gpus: policy and generation reserve {wanted:g} GPUs, and there are {machine.gpus}. "
            "Lower policy.ranks or generation.workers, or share GPUs with policy.gpus_per_rank and "
            "generation.gpus_per_worker below 1."
        )
    limit = (1 - margin) * machine.gpu.memory
    set_up = sum(role.set_up_bytes + CONTEXT_BYTES for role in memory.roles) + (
        memory.engine.reserved if memory.shared else 0.0
    )
    if set_up > limit:
        yield (
            "set-up: a rank's GPU gets its shard in float32, and one block with the embeddings "
            f"and the head whole, {set_up / GIB:.1f} GiB with all that share it, and has "
            f"{machine.gpu.memory_gib:g}. Raise policy.ranks, or use a smaller model or a larger "
            "GPU."
        )
    elif memory.training_gpu > limit:
        yield (
            f"policy: the fullest GPU needs {memory.training_gpu / GIB:.1f} GiB and has "
            f"{machine.gpu.memory_gib:g}. Raise policy.ranks, set policy.gradient_checkpointing, "
            "lower policy.microbatch_tokens or policy.logit_chunk_tokens, or set "
            "policy.offload_optimizer."
        )
