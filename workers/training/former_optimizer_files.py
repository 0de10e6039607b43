"""Optimizer state of checkpoints up to December 2026: optimizer_rank0.pt, optimizer_rank1.pt, ...

Each file has, for each parameter in the order of the model, the rows of one rank of FSDP2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count, takewhile
from pathlib import Path

import torch
from torch import Tensor

from rlsys.models.tensor_files import TensorFacts


class FormerOptimizerFiles:
    """The optimizer's state in these files; any number of ranks may read it."""

    def __init__(self, directory: Path, parameters: Sequence[TensorFacts]) -> None:
        """Map the files of all ranks into memory.

        Raises:
            ValueError: files are missing, or are of another model.
        """
        self._directory = directory
        names = (_file(directory, rank) for rank in count())
        # A rank has its rows of every parameter, and the ranks follow each other.
        ranks = [
            torch.load(file, weights_only=True, mmap=True) for file in takewhile(Path.exists, names)
        ]
        self.tensors: dict[str, TensorFacts] = {}
        self._parts: dict[str, list[Tensor]] = {}
        for shards in ranks:
            self._check(parameters, shards)
        for position, parameter in enumerate(parameters):
            states = [shards[position] for shards in ranks]
            for kind in states[0]:
                parts = [state[kind] for state in states]
                self._add(f"{kind}/{parameter.name}", parameter, parts)

    @staticmethod
    def are_in(directory: Path) -> bool:
        """Return whether a checkpoint has such files."""
        return _file(directory, 0).exists()

    def _check(
        self, parameters: Sequence[TensorFacts], shards: Sequence[Mapping[str, Tensor]]
    ) -> None:
        if len(shards) != len(parameters):
            raise ValueError(
                f"checkpoint: {self._directory} has optimizer state of {len(shards)} parameters, "
                f"the model has {len(parameters)}. Resume with the model that it was written with."
            )

    def _add(self, name: str, parameter: TensorFacts, parts: Sequence[Tensor]) -> None:
        """Take the parts of one tensor; a single number is the same on all ranks."""
        if not parts[0].ndim:
            parts, shape = parts[:1], ()
        else:
            shape = parameter.shape
        numel = sum(part.numel() for part in parts)
        facts = TensorFacts(name=name, dtype=parts[0].dtype, shape=shape)
        if numel != facts.numel:
            raise ValueError(
                f"checkpoint: {self._directory} has {numel} elements of {name} instead of "
                f"{facts.numel}: a file optimizer_rank*.pt is missing, or it belongs to another "
                "model."
            )
        self.tensors[name] = facts
        self._parts[name] = [part.reshape(-1) for part in parts]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return [stop - start] elements of a tensor, in row-major order."""
        found, first = [], 0
        for part in self._parts[name]:
            begin, end = max(start - first, 0), min(stop - first, part.numel())
            if begin < end:
                found.append(part[begin:end])
            first += part.numel()
        return torch.cat(found) if found else self._parts[name][0][:0].clone()


def _file(directory: Path, rank: int) -> Path:
    return directory / f"optimizer_rank{rank}.pt"
