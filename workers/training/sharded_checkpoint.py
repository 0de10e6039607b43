"""Checkpoints that all ranks write together, and any number of ranks reads; of any backend.

A backend says which weights there are and gathers one of them, and which pieces of the optimizer's
state this rank has. No rank holds more than its part and one weight (of some mixtures of experts:
the weights of one block).

    model-00001-of-00002.safetensors, ...    weights in Hugging Face layout; each rank writes the
    model.safetensors.index.json             files of its part of the model
    optimizer-00001-of-00002.shard, ...      each rank's pieces of the optimizer's state
    optimizer_shards.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

from rlsys.models import sharded_state, weight_files
from rlsys.models.checkpoint_names import to_checkpoint
from rlsys.models.export_units import (
    ExportUnit,
    ReadRange,
    check_weights,
    export_units,
    readers,
)
from rlsys.models.sharded_state import Piece, PlacedPiece, ShardedState
from rlsys.models.tensor_files import TensorFacts, TensorFileWriter
from rlsys.models.weight_files import FILE_BYTES, FORMAT, WeightFiles
from workers.training.former_optimizer_files import FormerOptimizerFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ResultT = TypeVar("ResultT")


class StateSource(Protocol):
    """Tensors of an optimizer's state, of which parts can be read."""

    @property
    def tensors(self) -> Mapping[str, TensorFacts]: ...

    def read(self, name: str, start: int, stop: int) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class WeightPlan:
    """Which rank writes which weights into which files; the same on all ranks."""

    units: Sequence[ExportUnit]
    owners: Sequence[int]  # the rank that writes each unit
    files: Sequence[Sequence[TensorFacts]]
    writers: Sequence[int]  # the rank that writes each file

    @staticmethod
    def of(units: Sequence[ExportUnit], *, ranks: int, file_bytes: int) -> WeightPlan:
        """Give each rank a part of the units of about the same size, in their order."""
        total = max(1, sum(unit.num_bytes for unit in units))
        owners, before = [], 0
        for unit in units:
            middle = before + unit.num_bytes / 2
            owners.append(min(ranks - 1, int(ranks * middle / total)))
            before += unit.num_bytes

        files: list[Sequence[TensorFacts]] = []
        writers: list[int] = []
        for rank in range(ranks):
            own = [unit for unit, owner in zip(units, owners, strict=True) if owner == rank]
            parts = weight_files.divided([one for unit in own for one in unit.exported], file_bytes)
            files += parts
            writers += [rank] * len(parts)
        return WeightPlan(units=units, owners=owners, files=files, writers=writers)


class RankFiles:
    """What one rank writes, at once. It goes on with the other ranks where its disk fails.

    An error while the others wait in a collective operation would leave them waiting:

        files = RankFiles(path)
        files.write(lambda: ...)                # anything that writes
        save_weights(..., files)                # collective
        save_optimizer(..., files)              # collective
        files.finish()                          # raises the first error

    `BackgroundFiles` writes the same later. So what `write` gets must depend on nothing that
    training changes: tensors go through `kept`, and other state is read before.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rank = dist.get_rank()
        self.ranks = dist.get_world_size()
        self._error: Exception | None = None

    def attempt(self, work: Callable[[], ResultT]) -> ResultT | None:
        """Return the result of `work`; None from the first call on that has failed."""
        if self._error is not None:
            return None
        try:
            return work()
        except Exception as error:  # `finish` raises it
            self._error = error
            return None

    def kept(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor that has these values when `write` uses it; `name` is its own."""
        return tensor

    def write(self, write: Callable[[], object]) -> None:
        """Call `write`, which writes files; in the order of the calls."""
        self.attempt(write)

    def finish(self) -> None:
        """Raise the first error."""
        if self._error is not None:
            raise self._error


def save_weights(
    model: PreTrainedModel,
    weights: Sequence[TensorFacts],
    gather: Callable[[str, bool], Tensor | None],
    files: RankFiles,
    *,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write the weights of a model, in the names and shapes of its checkpoint; collective.

    Args:
        weights: of the whole model, the same on all ranks.
        gather: returns a whole weight by its name, on the CPU, where its second argument is True,
            and None elsewhere; collective, and called in the same order on all ranks.
    """
    units = export_units(model, weights)
    plan = WeightPlan.of(units, ranks=files.ranks, file_bytes=file_bytes)
    writers = _WeightWriters(files.path)
    files.write(lambda: writers.open(plan, files.rank))

    for unit, owner in zip(plan.units, plan.owners, strict=True):
        found = [(one.name, gather(one.name, owner == files.rank)) for one in unit.weights]
        gathered = {name: tensor for name, tensor in found if tensor is not None}
        del found
        if gathered:
            files.attempt(partial(_write_unit, model, unit, gathered, writers, files))

    files.write(writers.close)
    if files.rank == 0:
        files.write(lambda: weight_files.write_index(files.path, plan.files))


class _WeightWriters:
    """The open files of weights of one rank."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._by_tensor: dict[str, TensorFileWriter] = {}

    def open(self, plan: WeightPlan, rank: int) -> None:
        """Open the files that this rank writes."""
        names = weight_files.file_names(len(plan.files))
        for name, tensors, writer in zip(names, plan.files, plan.writers, strict=True):
            if writer == rank:
                file = TensorFileWriter(self._path / name, tensors, FORMAT)
                self._by_tensor |= dict.fromkeys((facts.name for facts in tensors), file)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, by its name in the checkpoint."""
        self._by_tensor[name].write(name, tensor)

    def close(self) -> None:
        """Close the files, in which every tensor has been written."""
        for writer in dict.fromkeys(self._by_tensor.values()):
            writer.close()


def _write_unit(
    model: PreTrainedModel,
    unit: ExportUnit,
    weights: Mapping[str, Tensor],
    writers: _WeightWriters,
    files: RankFiles,
) -> None:
    if unit.only_renamed:
        written = {unit.exported[0].name: weights[unit.weights[0].name]}
    else:
        written = to_checkpoint(model, weights)
    for name, tensor in written.items():
        kept = files.kept(f"weight/{name}", tensor)
        files.write(partial(writers.write, name, kept))


def load_weights(
    model: PreTrainedModel, weights: Sequence[TensorFacts], path: Path
) -> Iterator[tuple[str, ReadRange]]:
    """Yield for each weight of the model its name, and how to read a part of it.

    Raises:
        ValueError: files are missing or damaged, or are of another model.
    """
    files = WeightFiles.of(path)
    units = export_units(model, weights)
    check_weights(units, files)
    for unit in units:
        yield from readers(model, unit, files).items()


def save_optimizer(pieces: Iterable[Piece], files: RankFiles) -> None:
    """Write this rank's pieces of the optimizer's state; collective."""
    own = files.attempt(lambda: _kept_pieces(pieces, files)) or []
    placed = sharded_state.places(own, rank=files.rank, ranks=files.ranks)
    places: list[list[PlacedPiece] | None] = [None] * files.ranks
    dist.all_gather_object(places, placed)

    files.write(
        lambda: sharded_state.write_shard(files.path, own, rank=files.rank, ranks=files.ranks)
    )
    if files.rank == 0:
        # A rank that has failed raises, so that no checkpoint comes of this index.
        found = [place for of_rank in places for place in of_rank or ()]
        files.write(lambda: sharded_state.write_index(files.path, found))


def _kept_pieces(pieces: Iterable[Piece], files: RankFiles) -> list[Piece]:
    return [
        replace(piece, values=files.kept(f"optimizer/{piece.name}", piece.values))
        for piece in pieces
    ]


def optimizer_state(path: Path, parameters: Sequence[TensorFacts]) -> StateSource:
    """Return the optimizer's state in a checkpoint.

    Args:
        parameters: all that are trained, whole, in their order.

    Raises:
        ValueError: files are missing or damaged, or are of another model.
    """
    if FormerOptimizerFiles.are_in(path):
        source: StateSource = FormerOptimizerFiles(path, parameters)
    else:
        source = ShardedState.of(path)

    shapes = {facts.name: facts.shape for facts in parameters}
    for name, facts in source.tensors.items():
        parameter = name.partition("/")[2]
        if facts.shape and facts.shape != shapes.get(parameter):
            raise ValueError(
                f"checkpoint: {path} has optimizer state {name} of shape {facts.shape}, so it "
                "belongs to another model. Resume with the model that it was written with."
            )
    return source
