"""The generation group: engine, sampling, and how far engine and trainer may disagree."""

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from rlsys.config.engines import ENGINES
from rlsys.config.model import Dtype
from rlsys.config.section import Section


class GenerationConfig(Section):
    engine: str = Field(
        default="vllm",
        description="Rollout engine: "
        + "; ".join(f"{name} ({traits.summary})" for name, traits in ENGINES.items())
        + ".",
    )
    workers: int = Field(
        default=1, ge=1, description="Generation workers (actors); prompts are balanced over them."
    )
    gpus_per_worker: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="GPUs each worker reserves when the cluster has GPUs, for each of tensor_parallel; below 1 to share a GPU with "
        "the policy.",
    )
    cpus_per_worker: int = Field(
        default=1,
        ge=0,
        description="CPU cores that each worker reserves. 0: none, since generation and training take turns on small machines.",
    )
    dtype: Dtype = Field(
        default="auto",
        description="Precision of the engine's weights and arithmetic. auto: bfloat16 where the driver's machine "
        "computes faster in it (GPUs from compute capability 8.0 on; CPUs by a short measurement), else float32.",
    )
    samples_per_prompt: int = Field(
        default=8,
        ge=1,
        le=16384,
        description="Responses sampled for each prompt: the group of GRPO. At most 16384, as many as vLLM takes.",
    )
    temperature: float = Field(
        default=1.0,
        ge=0.01,
        description="Sampling temperature, at least 0.01 (vLLM samples at no lower one); log-probabilities are taken at it as well.",
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Nucleus sampling. 1: off. Log-probabilities stay those of the untruncated distribution.",
    )
    top_k: int = Field(
        default=0,
        ge=0,
        lt=2**31,
        description="Sample among the k likeliest tokens. 0: off. Log-probabilities stay those of the untruncated distribution.",
    )
    min_tokens: int = Field(
        default=0,
        ge=0,
        description="How many tokens are sampled before an end token or a stop string may end the response. 0: it may end at once, and then consists "
        "of the end token alone.",
    )
    max_tokens: int = Field(default=64, ge=1, description="Longest response, in tokens.")
    stop: tuple[str, ...] = Field(
        default=(),
        description="Strings that end a response; they stay in it, and its text ends with them. One that is complete within the first min_tokens "
        "tokens ends nothing.",
    )
    max_model_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Context length of the engine. null: max_prompt_tokens + max_tokens.",
    )
    kv_cache_gib: float = Field(
        default=1.0, gt=0, description="Memory of the KV cache of one worker on a CPU, in GiB."
    )
    gpu_memory_utilization: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Share of a GPU's memory for the engine (weights and KV cache).",
    )
    compile: bool = Field(
        default=False,
        description="Let vLLM compile the model: a minute or more to start, then somewhat faster.",
    )
    tensor_parallel: int = Field(
        default=1, ge=1, description="GPUs over which one engine splits its model."
    )
    logprob_difference_tolerance: float | None = Field(
        default=None,
        ge=0,
        description="After each weight sync, the largest allowed mean absolute difference in log-probability between engine and "
        "trainer on a probe. A larger gap stops the run. 0: do not probe. null: 0.01 where both compute in float32, else 0.15.",
    )

    @field_validator("engine")
    @classmethod
    def _known_engine(cls, value: str) -> str:
        if value not in ENGINES:
            known = " or ".join(map(repr, ENGINES))
            raise PydanticCustomError("engine", f"Input should be {known}")  # pyright: ignore[reportArgumentType]
        return value
