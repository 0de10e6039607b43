"""The weights of a checkpoint, in however many files."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor


def saved_weights(directory: Path) -> dict[str, Tensor]:
    """Return all weights of a model directory."""
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def contents(directory: Path) -> dict[str, bytes]:
    """Return the bytes of all files below a directory, by their names."""
    files = [file for file in sorted(directory.rglob("*")) if file.is_file()]
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}
