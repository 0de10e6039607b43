"""Memory of types of GPUs.

The figures are the `memory.total` that nvidia-smi reports, rounded down to half a GiB. They were
copied from published reports; none was read from a GPU by this project.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlsys.config.errors import ConfigError

GIB = 1024**3


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One type of GPU."""

    name: str
    memory_gib: float

    @property
    def memory(self) -> int:
        """Its memory, in bytes."""
        return int(self.memory_gib * GIB)


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="b200", memory_gib=178.0),
        Gpu(name="h200", memory_gib=140.0),
        Gpu(name="h100", memory_gib=79.5),
        Gpu(name="a100-80", memory_gib=79.5),
        Gpu(name="a100-40", memory_gib=39.5),
        Gpu(name="l40s", memory_gib=44.5),
        Gpu(name="rtx4090", memory_gib=23.5),
        Gpu(name="l4", memory_gib=22.0),
    )
}


def gpu_called(name: str) -> Gpu:
    """Return a type of GPU by its name, or one of `GiB` memory for a number such as "48".

    Raises:
        ConfigError: no such type, and no positive number.
    """
    known = GPUS.get(name.lower())
    if known is not None:
        return known
    try:
        memory = float(name)
    except ValueError:
        memory = 0.0
    if not 0 < memory < 1e6:
        raise ConfigError(
            f"--gpu: {name!r} is none of {', '.join(GPUS)}. Give one of them, or the memory of a "
            "GPU in GiB."
        )
    return Gpu(name=f"{memory:g} GiB", memory_gib=memory)
