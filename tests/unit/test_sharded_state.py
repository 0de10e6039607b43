"""Optimizer state in shards of any number of ranks, of FSDP2 or of flattened partitions."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rlsys.models.sharded_state import INDEX, Piece, ShardedState, places, write_index, write_shard
from rlsys.models.tensor_files import TensorFacts
from workers.training.former_optimizer_files import FormerOptimizerFiles

SHAPES = {"exp_avg/a": (5, 3), "exp_avg_sq/a": (5, 3), "exp_avg/norm": (2,), "step/a": ()}


def whole() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def write(directory: Path, ranks: int, *, rows: bool) -> None:
    """Write `whole()` as ranks of FSDP2 do (rows), or as partitions of the flattened tensors."""
    found = []
    for rank in range(ranks):
        pieces = []
        for name, tensor in whole().items():
            row = int(np.prod(tensor.shape[1:])) if rows and tensor.ndim else 1
            size = row * -(-tensor.numel() // (row * ranks))
            start = min(rank * size, tensor.numel())
            values = tensor.reshape(-1)[start : start + size]
            pieces.append(Piece(name=name, shape=tuple(tensor.shape), start=start, values=values))
        write_shard(directory, pieces, rank=rank, ranks=ranks)
        found += places(pieces, rank=rank, ranks=ranks)
    write_index(directory, found)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("rows", [True, False])
def test_any_range_is_read_whoever_wrote_it(rows: bool, ranks: int, tmp_path: Path):
    write(tmp_path, ranks, rows=rows)
    state = ShardedState.of(tmp_path)
    assert {name: facts.shape for name, facts in state.tensors.items()} == SHAPES
    for name, tensor in whole().items():
        flat = tensor.reshape(-1)
        for start in range(len(flat) + 1):
            for stop in range(start, len(flat) + 1):
                assert torch.equal(state.read(name, start, stop), flat[start:stop])


def lose_a_shard(directory: Path) -> None:
    (directory / "optimizer-00002-of-00003.shard").unlink()


def truncate_a_shard(directory: Path) -> None:
    shard = directory / "optimizer-00002-of-00003.shard"
    shard.write_bytes(shard.read_bytes()[:-4])


def exchange_shards(directory: Path) -> None:
    first = directory / "optimizer-00001-of-00003.shard"
    last = directory / "optimizer-00003-of-00003.shard"
    last.write_bytes(first.read_bytes())


def lose_a_piece(directory: Path) -> None:
    content = json.loads((directory / INDEX).read_text())
    del content["tensors"]["exp_avg/a"]["pieces"][1]
    (directory / INDEX).write_text(json.dumps(content))


DAMAGES: dict[Callable[[Path], object], str] = {
    lose_a_shard: r"optimizer-00002-of-00003\.shard is missing, .* the one before it",
    truncate_a_shard: "tensors beyond its end",
    exchange_shards: "it has not the piece of exp_avg/a",
    lose_a_piece: "no file has elements 6 to 15 of exp_avg/a",
    lambda directory: (directory / INDEX).unlink(): f"{INDEX} is missing",
    lambda directory: (directory / INDEX).write_bytes(b"\x80\x04"): "not readable as the JSON",
    lambda directory: (directory / INDEX).write_text("{}"): "not readable as the JSON",
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.items())
def test_damage_is_named(damage: Callable[[Path], object], message: str, tmp_path: Path):
    write(tmp_path, 3, rows=True)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        ShardedState.of(tmp_path).read("exp_avg/a", 0, 15)


def test_files_of_earlier_versions_are_read_on_any_number_of_ranks(tmp_path: Path):
    """Three ranks with 2, 2 and 1 of five rows, and with 1, 1 and 0 of two."""
    state, rows = whole(), ((slice(0, 2), slice(0, 1)), (slice(2, 4), slice(1, 2)))
    for rank, (of_a, of_norm) in enumerate((*rows, (slice(4, 5), slice(2, 2)))):
        shards = [
            {
                "step": state["step/a"],
                "exp_avg": state["exp_avg/a"][of_a],
                "exp_avg_sq": state["exp_avg_sq/a"][of_a],
            },
            {"exp_avg": state["exp_avg/norm"][of_norm]},
        ]
        torch.save(shards, tmp_path / f"optimizer_rank{rank}.pt")

    parameters = [TensorFacts.of("a", torch.zeros(5, 3)), TensorFacts.of("norm", torch.zeros(2))]
    assert FormerOptimizerFiles.are_in(tmp_path)
    files = FormerOptimizerFiles(tmp_path, parameters)
    assert {name: facts.shape for name, facts in files.tensors.items()} == SHAPES
    for name, tensor in state.items():
        flat = tensor.reshape(-1)
        for start in range(len(flat) + 1):
            for stop in range(start, len(flat) + 1):
                assert torch.equal(files.read(name, start, stop), flat[start:stop])

    with pytest.raises(ValueError, match=r"state of 2 parameters, the model has 1\."):
        FormerOptimizerFiles(tmp_path, parameters[:1])
    (tmp_path / "optimizer_rank2.pt").unlink()
    message = r"12 elements of step/a|12 elements of exp_avg/a instead of 15: a file optimizer_rank"
    with pytest.raises(ValueError, match=message):
        FormerOptimizerFiles(tmp_path, parameters)
