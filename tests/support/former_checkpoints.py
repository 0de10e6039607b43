"""Checkpoints as versions before December 2026 wrote them: one file of weights, one per rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlsys.models import sharded_state
from workers.training.backends.fsdp2 import FSDP2Backend


def rewrite_as_former(backend: FSDP2Backend, path: Path, *, rank: int) -> None:
    """Replace the files that the present `save` of `backend` has written to `path`; collective."""
    weights = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in backend.weights()
    }
    if rank == 0:
        for pattern in ("*.safetensors", "*.safetensors.index.json", "*.shard"):
            for file in path.glob(pattern):
                file.unlink()
        (path / sharded_state.INDEX).unlink()
        save_file(weights, path / "model.safetensors", {"format": "pt"})
    state = backend.optimizer.state
    shards = [
        {key: local(value) for key, value in state[parameter].items()}
        for parameter in backend.module.parameters()
    ]
    torch.save(shards, path / f"optimizer_rank{rank}.pt")


def local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
