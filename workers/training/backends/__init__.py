"""Training backends: they distribute a model over ranks, and are found by name.

To add one: a module here with a function `build`, a row in `BUILDERS`, and its name in
`ModelRoleConfig.backend`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workers.training.backends.backend import ModelBackend
from workers.training.packed_model import PackedModel

if TYPE_CHECKING:
    from rlsys.config import ModelRoleConfig

# A module is imported only where it is used: each has dependencies of its own.
BUILDERS: Mapping[str, str] = {
    "fsdp2": "workers.training.backends.fsdp2",
    "deepspeed": "workers.training.backends.deepspeed",
}


def build_backend(
    module: PackedModel, settings: ModelRoleConfig, device: torch.device, directory: Path
) -> ModelBackend[Any]:
    """Distribute `module`, which was loaded from `directory`, over all ranks; collective."""
    build: Callable[..., ModelBackend[Any]] = import_module(BUILDERS[settings.backend]).build
    return build(module, settings, device, directory)
