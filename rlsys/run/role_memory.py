"""The memory of the ranks of a run, as its plan shows it: by `rlsys.plan`, or as a rough sum."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from rlsys.config import ConfigError, LoraConfig, RootConfig, RunConfig, TrainableRoleConfig
from rlsys.config.hardware import Hardware
from rlsys.models.adapters import adapter_parameters
from rlsys.plan import formulas
from rlsys.plan.gpus import GIB, Gpu
from rlsys.plan.run_memory import Machine, RolePlan, plan_run
from rlsys.plan.shapes import ModelShape, shape_of_model
from rlsys.run.model_checks import ModelDirectories

BLOCK = re.compile(r".*?\.\d+\.")  # model.layers.0. of model.layers.0.mlp.down_proj.weight


def planned_memory(
    config: RunConfig, hardware: Hardware, directories: ModelDirectories
) -> Mapping[str, str]:
    """Return the peaks of each role as text, by `python -m rlsys.plan`.

    Empty where its formulas do not cover a model or an option of the run.
    """
    found = {
        config.reference.path: directories.reference,
        config.critic.path: directories.critic,
    }

    def shape_of(path: str) -> ModelShape:
        # A path that is none of these is that of the reward model.
        return shape_of_model(str(found.get(path, directories.reward_model)))

    gpu = Gpu(name="here", memory_gib=hardware.gpu_memory_gib) if hardware.gpus else None
    try:
        machine = Machine(gpu=gpu, gpus=hardware.gpus)
        memory = plan_run(config, machine, shape_of_model(str(directories.policy)), shape_of)
    except ConfigError:
        return {}
    return {role.role: _peaks(role, on_gpu=gpu is not None) for role in memory.roles}


def _peaks(role: RolePlan, *, on_gpu: bool) -> str:
    sizes = {
        peak.phase: peak.device.device_bytes if on_gpu else peak.host.host_bytes
        for peak in role.peaks
    }
    phases = ", ".join(f"{phase} {size / GIB:.2f}" for phase, size in sizes.items())
    place = "of its GPU" if on_gpu else "of memory"
    return f"GiB {place} at the peak of each phase: {phases}"


def rough_memory(role: TrainableRoleConfig, config: RootConfig, directory: Path) -> str:
    """Describe the memory of one rank of a trained model by its parameters, without activations."""
    shapes, lora = _shapes(directory), config.model.lora
    text = _rank_memory(role, lora, directory, shapes)
    if not config.trainer.checkpoints.asynchronous:
        return text
    copy_gib = checkpoint_copy_bytes(role, lora, directory, shapes) / GIB
    return f"{text}; {copy_gib:.2f} GiB of host memory for the copy that checkpoints are made of"


def checkpoint_copy_bytes(
    role: TrainableRoleConfig,
    lora: LoraConfig,
    directory: Path,
    shapes: Mapping[str, Sequence[int]],
) -> float:
    """Return the bytes of a rank's copy with `trainer.checkpoints.asynchronous`.

    Masters (4 bytes) and moments (8) are those of the rank; the first has all adapters.
    """
    if lora.rank:
        return adapter_parameters(directory, lora) * (4 + 8 / role.ranks)
    parameters = sum(map(math.prod, shapes.values()))
    return (4 * parameters + 8 * trained_parameters(shapes, role.frozen)) / role.ranks


def _rank_memory(
    role: TrainableRoleConfig,
    lora: LoraConfig,
    directory: Path,
    shapes: Mapping[str, Sequence[int]],
) -> str:
    parameters = sum(map(math.prod, shapes.values()))
    if lora.rank:
        stored = 2 if role.compute_dtype == "bfloat16" else 4  # bytes per parameter
        adapters = adapter_parameters(directory, lora)
        rank_gib = (parameters * stored + adapters * 16) / role.ranks / GIB
        return (
            f"{rank_gib:.2f} GiB weights ({role.compute_dtype}), with adapters of rank {lora.rank} "
            f"({adapters / 1e6:.2f} M parameters), their gradients and Adam, and activations"
        )
    rank_gib = training_bytes(role, shapes) / GIB
    kept = ""
    if role.frozen:
        kept = f" of the {trained_parameters(shapes, role.frozen) / 1e6:.1f} M trained parameters"
    return (
        f"{rank_gib:.2f} GiB weights, gradients and Adam{kept} ({role.compute_dtype}), "
        "and activations"
    )


def training_bytes(role: TrainableRoleConfig, shapes: Mapping[str, Sequence[int]]) -> float:
    """Return the bytes of weights, gradients and moments of one rank of a trained model.

    Masters and gradients are float32 (4 bytes each), Adam has two moments (8). FSDP2 gathers a
    block at a time, beside what is in no block; DeepSpeed has a copy in the compute dtype.

    Args:
        shapes: of the weights, by their names.
    """
    parameters, ranks = sum(map(math.prod, shapes.values())), role.ranks
    copy = 2 if role.compute_dtype == "bfloat16" else 4
    if role.backend == "fsdp2":
        trained = trained_parameters(shapes, role.frozen)
        sharded = formulas.masters(parameters, ranks)
        sharded += formulas.gradients(trained, ranks) + formulas.moments(trained, ranks)
        return sharded + copy * _unsharded_parameters(shapes, ranks)

    stage = role.deepspeed.zero_stage
    gradients = 4 / ranks if stage >= 2 else 4
    weights = copy / ranks if stage == 3 else copy
    return parameters * (12 / ranks + gradients + weights)


def trained_parameters(shapes: Mapping[str, Sequence[int]], frozen: Sequence[str]) -> int:
    """Return the parameters that match no pattern.

    A weight that is called otherwise in the file than in transformers counts as trained.
    """
    return sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if not any(fnmatchcase(name, pattern) for pattern in frozen)
    )


def _unsharded_parameters(shapes: Mapping[str, Sequence[int]], ranks: int) -> int:
    """Return the parameters outside of the blocks, and those of the largest block.

    On several ranks a block has a flat buffer beside it.
    """
    units: dict[str, int] = {}
    for name, shape in shapes.items():
        found = BLOCK.match(name)
        unit = found.group() if found else ""
        units[unit] = units.get(unit, 0) + math.prod(shape)
    outside = units.pop("", 0)
    return outside + max(units.values(), default=0) * (1 if ranks == 1 else 2)


def _shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes in the safetensors headers; no weights are read."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (a safetensors handle is not a dict)
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
    return shapes
