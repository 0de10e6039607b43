"""Settings with which a run fits on some GPUs, in the order of what they cost in time.

Only settings that rlsys has are tried: full sharding over all ranks, gradient checkpointing,
offload of the optimizer, the sizes of packs and of chunks of logits, and tensor-parallel engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlsys.config import RunConfig
from rlsys.config.command_line import evolve
from rlsys.config.errors import ConfigError
from rlsys.plan.gpus import GIB
from rlsys.plan.run_memory import (
    Machine,
    RunMemory,
    engine_plan,
    object_store_bytes,
    plan_run,
)
from rlsys.plan.shapes import ModelShape

# The step that is planned for where no flag says otherwise: that of recipes.grpo_math on GPUs.
GPU_WORKLOAD: Mapping[str, Any] = {
    "data.max_prompt_tokens": 1024,
    "generation.samples_per_prompt": 8,
    "generation.max_tokens": 1024,
    "trainer.prompts_per_step": 128,
}

# A choice: the part of a GPU that a proposal leaves free, for what the formulas do not count.
MARGIN = 0.1
# An engine should hold so many sequences at once, or all that it gets.
ENOUGH_SEQUENCES = 16
PACKS = (32768, 16384, 8192, 4096, 2048, 1024)
CHUNKS = (2048, 1024, 512, 256)
# Gradient checkpointing and offload: each costs time, and the second more.
SAVINGS = ((False, False), (True, False), (True, True))


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A configuration that fits, or why none does."""

    machine: Machine
    changes: Mapping[str, Any]  # dotted fields, to be given as flags; empty: nothing fits
    memory: RunMemory | None
    reasons: tuple[str, ...]


def propose(
    config: RunConfig,
    machine: Machine,
    shape: ModelShape,
    shape_of: Callable[[str], ModelShape],
) -> Proposal:
    """Return the first candidate that fits with `MARGIN` to spare.

    Candidates share one GPU between engine and rank, or divide several: half of them train, else
    three quarters, else all but one engine.

    Raises:
        ConfigError: a machine without GPUs, or an option that the plan does not cover.
    """
    if machine.gpu is None:
        raise ConfigError("--propose: it needs a type of GPU. Add --gpu h100 or another.")

    best: RunMemory | None = None
    refused: ConfigError | None = None
    for changes in _candidates(config, machine, shape):
        memory = plan_run(_changed(config, changes), machine, shape, shape_of, margin=MARGIN)
        if memory.fits:
            try:
                evolve(config, changes)
            except ConfigError as error:  # such as more engines than prompts
                refused = error
                continue
            return Proposal(machine=machine, changes=changes, memory=memory, reasons=())
        if best is None or len(memory.problems) <= len(best.problems):
            best = memory

    reasons = best.problems if best is not None else ()
    if refused is not None:
        reasons = (*reasons, *str(refused).splitlines())
    return Proposal(
        machine=machine,
        changes={},
        memory=None,
        reasons=reasons or (_no_engine(machine, shape),),
    )


def _no_engine(machine: Machine, shape: ModelShape) -> str:
    return (
        f"generation: {machine.gpus} GPUs cannot hold an engine of {shape.parameters() / 1e9:.1f} "
        "B parameters beside a rank. Use more GPUs, or larger ones."
    )


def _candidates(config: RunConfig, machine: Machine, shape: ModelShape) -> Iterator[dict[str, Any]]:
    longest = config.data.max_prompt_tokens + config.generation.max_tokens
    packs = [tokens for tokens in PACKS if tokens >= longest] or [longest]
    for layout in _layouts(config, machine, shape):
        for checkpointing, offload in SAVINGS:
            for tokens in packs:
                for chunk in CHUNKS:
                    yield layout | {
                        "policy.gradient_checkpointing": checkpointing,
                        "policy.offload_optimizer": offload,
                        "policy.microbatch_tokens": tokens,
                        "policy.logit_chunk_tokens": chunk,
                        "cluster.object_store_gib": _store_gib(config, machine, shape),
                    }


def _store_gib(config: RunConfig, machine: Machine, shape: ModelShape) -> float:
    """Return a size of the object store for a sync and a batch, with a tenth to spare."""
    needed = 1.1 * object_store_bytes(config, machine, shape) / GIB + 1
    return max(config.cluster.object_store_gib, float(round(needed)))


def _layouts(config: RunConfig, machine: Machine, shape: ModelShape) -> Iterator[dict[str, Any]]:
    """Yield divisions of the GPUs among ranks and engines."""
    assert machine.gpu is not None
    if machine.gpus == 1:
        for part in (0.4, 0.3, 0.2):
            yield {
                "policy.ranks": 1,
                "policy.gpus_per_rank": 0.5,
                "generation.workers": 1,
                "generation.gpus_per_worker": 0.5,
                "generation.tensor_parallel": 1,
                "generation.gpu_memory_utilization": part,
            }
        return

    for ranks in dict.fromkeys((machine.gpus // 2, 3 * machine.gpus // 4, machine.gpus - 1)):
        for parallel in (1, 2, 4, 8):
            left = machine.gpus - ranks
            splits = shape.heads % parallel == 0 and parallel <= machine.gpus_per_node
            if parallel > left or not splits:
                continue
            layout = {
                "policy.ranks": ranks,
                "policy.gpus_per_rank": 1.0,
                "generation.workers": min(left // parallel, config.trainer.prompts_per_step),
                "generation.gpus_per_worker": 1.0,
                "generation.tensor_parallel": parallel,
                "generation.gpu_memory_utilization": 0.85,
            }
            if _has_room(_changed(config, layout), machine, shape):
                yield layout
                break  # a smaller engine is faster for each GPU


def _has_room(config: RunConfig, machine: Machine, shape: ModelShape) -> bool:
    engine = engine_plan(config, machine, shape)
    return engine.at_once >= min(ENOUGH_SEQUENCES, engine.sequences)


def _changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Return the configuration with some fields changed, unchecked: candidates are many."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, _, leaf = name.partition(".")
        sections.setdefault(section, {})[leaf] = value
    return config.model_copy(
        update={
            name: getattr(config, name).model_copy(update=values)
            for name, values in sections.items()
        }
    )
