"""A plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlsys.plan.gpus import GIB
from rlsys.plan.proposals import MARGIN, Proposal
from rlsys.plan.roles import Moment, Peak
from rlsys.plan.run_memory import CONTEXT_BYTES, RolePlan, RunMemory
from rlsys.plan.shapes import ModelShape

CHECKED_ON_CPU = (
    "checked: one policy rank on a CPU: set-up, update and log-probs on SmolLM2-135M by resident "
    "memory, update and log-probs of two small shapes by the allocator (docs/planning_memory.md)"
)
NEVER_CHECKED = (
    "never checked: sync and checkpoint; several ranks; reference, critic and reward model; "
    "engines and object store, which are counted by their tensors"
)
NEVER_ON_GPU = (
    "never checked: anything on a GPU. Its formulas are those of the CPU, with the masks and "
    "copies of its attention kernel; offload follows from the code, the sizes of GPUs are copied, "
    f"and the context of a process ({CONTEXT_BYTES / GIB:g} GiB) is an assumption"
)


def checks(memory_on_gpu: bool) -> list[str]:
    """Return what the figures of a plan have been checked on, and what never."""
    return [CHECKED_ON_CPU, NEVER_CHECKED, *([NEVER_ON_GPU] if memory_on_gpu else [])]


def gib(size: float) -> float:
    """Return bytes in GiB, with three digits after the point."""
    return round(size / GIB, 3)


def _parts(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: gib(size) for name, size in parts.items() if size}


def _moment_record(moment: Moment, place: str) -> dict[str, Any]:
    parts = moment.device if place == "gpu" else moment.host
    return {"gib": gib(sum(parts.values())), "at": moment.name, "parts_gib": _parts(parts)}


def _peak_record(peak: Peak) -> dict[str, Any]:
    return {
        "gpu": _moment_record(peak.device, "gpu"),
        "host": _moment_record(peak.host, "host"),
    }


def as_record(memory: RunMemory) -> dict[str, Any]:
    """Return the plan as JSON values; sizes are GiB."""
    machine, engine = memory.machine, memory.engine
    return {
        "fits": memory.fits,
        "problems": list(memory.problems),
        "gpu": machine.gpu.name if machine.gpu else None,
        "gpu_gib": machine.gpu.memory_gib if machine.gpu else None,
        "gpus": machine.gpus if machine.gpu else 0,
        "roles": {
            role.role: {
                "ranks": role.ranks,
                "parameters": role.parameters,
                "tokens_of_a_pack": role.tokens,
                "phases": {peak.phase: _peak_record(peak) for peak in role.peaks},
            }
            for role in memory.roles
        },
        "generation": {
            "workers": engine.workers,
            "gpus_per_worker": engine.gpus,
            "weights_gib": gib(engine.weights),
            "cache_of_all_gib": gib(engine.cache_of_all),
            "reserved_gib": gib(engine.reserved),
            "sequences_per_worker": engine.sequences,
            "sequences_at_once": round(engine.at_once, 1),
        },
        "fullest_gpu_of_ranks_gib": gib(memory.training_gpu),
        "gpu_of_engine_gib": gib(memory.engine_gpu),
        "shared_gpus": memory.shared,
        "host_of_first_node_gib": {phase: gib(size) for phase, size in memory.node.items()},
        "object_store_gib": gib(memory.object_store),
        "checked": checks(machine.gpu is not None),
    }


def as_text(memory: RunMemory, name: str, shape: ModelShape) -> str:
    """Return the plan as lines of text."""
    return "\n".join(_lines(memory, name, shape))


def _lines(memory: RunMemory, name: str, shape: ModelShape) -> Iterator[str]:
    machine, engine = memory.machine, memory.engine
    yield _model_line(name, shape)
    if machine.gpu:
        each = f"{machine.gpu.memory_gib:g} GiB each"
        yield f"machine      {machine.gpus} x {machine.gpu.name}, {each}"
    else:
        yield "machine      CPUs: everything is in host memory"
    for role in memory.roles:
        yield from _role_lines(role, on_gpu=machine.gpu is not None)

    split = f" over {engine.gpus} GPUs each" if engine.gpus > 1 else ""
    yield (
        f"generation   {engine.workers} x engine{split}: {gib(engine.weights):.2f} GiB weights, "
        f"{gib(engine.reserved):.2f} GiB in all; {min(engine.at_once, engine.sequences):.0f} of "
        f"{engine.sequences} sequences at once at full length (all: "
        f"{gib(engine.cache_of_all):.2f} GiB cache)"
    )
    if machine.gpu:
        beside = " with the engine beside it" if memory.shared else ""
        yield f"fullest GPU  {gib(memory.training_gpu):.2f} GiB of the ranks{beside}"
    hosts = ", ".join(f"{phase} {gib(size):.1f}" for phase, size in memory.node.items())
    yield f"host         of the first node, GiB: {hosts}"
    yield f"object store {gib(memory.object_store):.2f} GiB: weights for the engines, and batches"
    yield "fits         " + ("yes" if memory.fits else "NO")
    yield from (f"  {problem}" for problem in memory.problems)
    yield from checks(machine.gpu is not None)


def _model_line(name: str, shape: ModelShape) -> str:
    return (
        f"model        {name}: {shape.parameters() / 1e6:,.1f} M parameters, "
        f"{shape.layers} layers, hidden {shape.hidden}, vocabulary {shape.vocabulary}"
    )


def _role_lines(role: RolePlan, *, on_gpu: bool) -> Iterator[str]:
    yield (
        f"{role.role:<12} {role.ranks} ranks, packs of {role.tokens} tokens; GiB of rank 0 at the "
        "peak of each phase:"
    )
    for peak in role.peaks:
        if on_gpu:
            yield f"  {peak.phase:<11} GPU  {_moment_text(peak.device, peak.device.device)}"
        if not on_gpu or peak.host.host_bytes:
            yield f"  {peak.phase:<11} host {_moment_text(peak.host, peak.host.host)}"


def _moment_text(moment: Moment, parts: Mapping[str, float]) -> str:
    shown = sorted(parts.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {gib(size):.2f}" for name, size in shown if gib(size) >= 0.005)
    return f"{gib(sum(parts.values())):8.2f}  {moment.name}: {listed}"


def proposal_record(proposal: Proposal) -> dict[str, Any]:
    """Return the proposal as JSON values."""
    if proposal.memory is None:
        return {"fits": False, "problems": list(proposal.reasons), "flags": {}}
    return {"flags": dict(proposal.changes), "margin": MARGIN, **as_record(proposal.memory)}


def proposal_text(proposal: Proposal, name: str, shape: ModelShape) -> str:
    """Return the proposal as flags, with its plan; or why nothing fits."""
    if proposal.memory is None:
        lines = [_model_line(name, shape), "no settings of rlsys make it fit:"]
        return "\n".join([*lines, *(f"  {reason}" for reason in proposal.reasons)])
    flags = " ".join(
        f"--{field} {str(value).lower() if isinstance(value, bool) else value}"
        for field, value in proposal.changes.items()
    )
    plan = as_text(proposal.memory, name, shape)
    return f"proposal     {flags}\n             ({MARGIN:.0%} of each GPU stay free)\n{plan}"
