"""The generation group: engine, sampling, and the allowed mismatch of engine and trainer."""

from typing import Any

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from rlsys.config.engines import ENGINES
from rlsys.config.model import Dtype
from rlsys.config.node_label import NodeLabel
from rlsys.config.section import Section


class EngineConfig(Section):
    """Engine, and the resources of the generation workers; all that an evaluation needs."""

    engine: str = Field(
        default="vllm",
        description="Rollout engine: "
        + "; ".join(f"{name} ({traits.summary})" for name, traits in ENGINES.items())
        + ".",
    )
    workers: int = Field(
        default=1,
        ge=1,
        description="Number of generation workers (Ray actors, one engine each); the prompts of a "
        "step are divided among them.",
    )
    gpus_per_worker: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="GPUs that each worker reserves where the cluster has GPUs, times "
        "tensor_parallel. Set it below 1 to share a GPU with the policy.",
    )
    cpus_per_worker: int = Field(
        default=1,
        ge=0,
        description="CPU cores that each worker reserves. 0: none, for small machines, where "
        "generation and training take turns on the same cores.",
    )
    node_label: NodeLabel | None = Field(
        default=None,
        description="Place the workers only on nodes of a joined cluster with this label, as "
        "name=value (`ray start --labels name=value`). null: on any node.",
    )
    dtype: Dtype = Field(
        default="auto",
        description="Precision of the engine's weights and arithmetic. auto: bfloat16 where it is "
        "faster on this machine, or on all nodes of a joined cluster on which the workers may run "
        "(GPUs of compute capability 8.0 or higher; CPUs where a short measurement says so), else "
        "float32.",
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Nucleus sampling: sample from the likeliest tokens that together have this "
        "probability. 1: off. Log-probabilities are those of the full distribution.",
    )
    top_k: int = Field(
        default=0,
        ge=0,
        lt=2**31,
        description="Sample from the k likeliest tokens. 0: off. Log-probabilities are those of "
        "the full distribution.",
    )
    min_tokens: int = Field(
        default=0,
        ge=0,
        description="Shortest response, in tokens: before that, neither an end token nor a stop "
        "string ends it. 0: a response may consist of the end token only.",
    )
    max_tokens: int = Field(default=64, ge=1, description="Longest response, in tokens.")
    stop: tuple[str, ...] = Field(
        default=(),
        description="Stop strings. A stop string remains at the end of the response. It is ignored "
        "where it is complete within the first min_tokens tokens.",
    )
    max_model_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Context length of the engine, in tokens. null: data.max_prompt_tokens + "
        "generation.max_tokens.",
    )
    kv_cache_gib: float = Field(
        default=1.0, gt=0, description="KV cache of each worker on a CPU, in GiB."
    )
    gpu_memory_utilization: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Fraction of a GPU's memory for the engine (weights and KV cache).",
    )
    compile: bool = Field(
        default=False,
        description="Compile the model in vLLM: the start takes a minute or more longer, sampling "
        "is somewhat faster.",
    )
    tensor_parallel: int = Field(
        default=1, ge=1, description="GPUs over which each engine splits the model."
    )
    engine_arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="Further arguments of the engine, under its own names (vLLM: the fields of "
        "EngineArgs), such as max_num_seqs. Those that another field sets, and those that would "
        "change what is sampled, are refused.",
    )
    logprob_difference_tolerance: float | None = Field(
        default=None,
        ge=0,
        description="After each weight sync, engine and trainer compute the log-probabilities of "
        "some held-out prompts. The run stops if their mean absolute difference is above this. 0: "
        "no check. null: 0.01 where both compute in float32, else 0.15.",
    )
    probe_every: int = Field(
        default=1,
        ge=1,
        description="Make that check after every N-th weight sync only, from the first on, and "
        "after the restart of a worker. `time/sync_probe` is what it costs.",
    )

    @field_validator("engine")
    @classmethod
    def _known_engine(cls, value: str) -> str:
        if value not in ENGINES:
            known = " or ".join(map(repr, ENGINES))
            message = f"Input should be {known}"
            raise PydanticCustomError("engine", message)  # pyright: ignore[reportArgumentType]
        return value


class GenerationConfig(EngineConfig):
    """Engine, resources, and the sampling of training."""

    samples_per_prompt: int = Field(
        default=8,
        ge=1,
        le=16384,
        description="Responses sampled per prompt, the group size of GRPO; at most 16384, vLLM's "
        "limit.",
    )
    temperature: float = Field(
        default=1.0,
        ge=0.01,
        description="Sampling temperature, at least 0.01 (vLLM's lower limit). Log-probabilities "
        "are computed at this temperature too.",
    )
