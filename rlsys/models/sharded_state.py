"""Tensors of a training state in pieces: each rank writes its own, any number of ranks reads them.

    optimizer-00001-of-00002.shard    what the first rank has, in the format of safetensors
    optimizer-00002-of-00002.shard
    optimizer_shards.json             the shape of each tensor, and where its pieces are

A piece is a range [start, stop) of a tensor's elements in row-major order. Shards of FSDP2 (rows)
and partitions of DeepSpeed (of the flattened parameter) both are such ranges, so that nothing here
knows of either. The name of a tensor is its kind, a slash, and the name of the parameter in the
model: exp_avg/model.norm.weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlsys.models.tensor_files import DTYPE_NAMES, DTYPES, TensorFacts, TensorFile, TensorFileWriter

INDEX = "optimizer_shards.json"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a tensor that one rank has."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int  # of the first element, in row-major order
    values: Tensor  # in any shape; its elements are consecutive ones of the whole tensor


@dataclass(frozen=True, kw_only=True)
class PlacedPiece:
    """Where a piece was written."""

    name: str
    dtype: str  # as in safetensors
    shape: tuple[int, ...]
    start: int
    stop: int
    file: str


def shard_name(rank: int, ranks: int) -> str:
    """Return the name of the file of a rank."""
    return f"optimizer-{rank + 1:05d}-of-{ranks:05d}.shard"


def places(pieces: Sequence[Piece], *, rank: int, ranks: int) -> list[PlacedPiece]:
    """Return where `write_shard` writes the pieces of a rank, for `write_index`."""
    return [
        PlacedPiece(
            name=piece.name,
            dtype=DTYPE_NAMES[piece.values.dtype],
            shape=piece.shape,
            start=piece.start,
            stop=piece.start + piece.values.numel(),
            file=shard_name(rank, ranks),
        )
        for piece in pieces
        if piece.values.numel()
    ]


def write_shard(directory: Path, pieces: Sequence[Piece], *, rank: int, ranks: int) -> None:
    """Write the pieces of one rank.

    Raises:
        OSError: the file cannot be written.
    """
    pieces = [piece for piece in pieces if piece.values.numel()]
    facts = [TensorFacts.of(piece.name, piece.values) for piece in pieces]
    with TensorFileWriter(directory / shard_name(rank, ranks), facts, {}) as file:
        for piece in pieces:
            file.write(piece.name, piece.values)


def write_index(directory: Path, places: Iterable[PlacedPiece]) -> None:
    """Write the index of the pieces of all ranks; one rank does it."""
    tensors: dict[str, dict[str, object]] = {}
    pieces: dict[str, list[list[object]]] = {}
    for place in places:
        tensors.setdefault(place.name, {"dtype": place.dtype, "shape": list(place.shape)})
        pieces.setdefault(place.name, []).append([place.start, place.stop, place.file])
    content = {name: {**tensors[name], "pieces": sorted(pieces[name])} for name in tensors}
    (directory / INDEX).write_text(json.dumps({"tensors": content}))


@dataclass(frozen=True, kw_only=True)
class ShardedState:
    """The tensors of a directory; values are read when asked for."""

    directory: Path
    tensors: Mapping[str, TensorFacts]
    pieces: Mapping[str, Sequence[tuple[int, int, str]]]  # start, stop, file
    files: Mapping[str, TensorFile]

    @staticmethod
    def of(directory: Path) -> ShardedState:
        """Read the index, and the headers of all files that it names.

        Raises:
            ValueError: the index or a file is missing or damaged.
        """
        index = directory / INDEX
        try:
            content = json.loads(index.read_text())["tensors"]
            tensors = {
                name: TensorFacts(
                    name=name, dtype=DTYPES[entry["dtype"]], shape=tuple(map(int, entry["shape"]))
                )
                for name, entry in content.items()
            }
            pieces = {
                name: sorted((int(start), int(stop), str(file)) for start, stop, file in found)
                for name, found in ((name, entry["pieces"]) for name, entry in content.items())
            }
        except FileNotFoundError as error:
            raise ValueError(f"{directory}: {INDEX} is missing. {_REMEDY}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: it is not readable as the JSON of an index") from error

        names = sorted({file for found in pieces.values() for _, _, file in found})
        for name in names:
            if Path(name).name != name or not (directory / name).is_file():
                raise ValueError(f"{directory}: {name} is missing, which {INDEX} names. {_REMEDY}")
        files = {name: TensorFile.open(directory / name) for name in names}
        return ShardedState(directory=directory, tensors=tensors, pieces=pieces, files=files)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return [stop - start] elements of a tensor, from as many files as have some of them.

        Raises:
            ValueError: no file has some of the elements.
        """
        facts = self.tensors[name]
        assert 0 <= start <= stop <= math.prod(facts.shape)
        values = torch.empty(stop - start, dtype=facts.dtype)
        known = start  # elements before it are in `values`
        for first, last, file in self.pieces[name]:
            begin, end = max(known, first), min(stop, last)
            if begin != known or begin >= end:
                continue
            source = self.files[file]
            held = source.tensors.get(name)
            if held is None or held.dtype != facts.dtype or held.numel != last - first:
                raise ValueError(f"{source.path}: it has not the piece of {name} that {INDEX} says")
            values[begin - start : end - start] = source.read(name, begin - first, end - first)
            known = end
        if known != stop:
            raise ValueError(
                f"{self.directory}: no file has elements {known} to {stop} of {name}. {_REMEDY}"
            )
        return values


_REMEDY = "Use another copy of the checkpoint, or the one before it."
