"""Weights through files: what is read is complete, and old versions are deleted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlsys.config import SyncConfig
from rlsys.models.weights import Bucket, buckets_of
from workers.weight_sync.transports import make_transport
from workers.weight_sync.transports.disk import DiskTransport


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (3, 5), "b": (7,), "c": (1, 1), "d": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def buckets(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Iterator[Bucket]:
    return buckets_of(tensors(seed).items(), dtype=dtype, bucket_bytes=40)


def versions(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("weights_*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_process_reads_what_was_written(dtype: torch.dtype, tmp_path: Path):
    stored = DiskTransport(str(tmp_path)).write(3, buckets(dtype=dtype), keep=())
    assert len(stored.parts) > 1
    settings = SyncConfig(transport="disk", directory=str(tmp_path))
    found = dict(make_transport(settings).read(stored))
    for name, tensor in tensors().items():
        assert torch.equal(found[name], tensor.to(dtype)), name


def test_parts_of_one_tensor_are_written_separately(tmp_path: Path):
    """The weights of experts are slices of one tensor in the trainer."""
    whole = torch.arange(12.0).reshape(3, 4)
    sent = {str(i): whole[i] for i in range(3)} | {"columns": whole[:, 1]}
    packed = buckets_of(sent.items(), dtype=torch.float32, bucket_bytes=2**20)
    stored = DiskTransport(str(tmp_path)).write(0, packed, keep=())
    found = dict(DiskTransport(str(tmp_path)).read(stored))
    assert all(torch.equal(found[name], tensor) for name, tensor in sent.items())


def test_only_the_newest_version_and_those_in_use_stay(tmp_path: Path):
    transport = DiskTransport(str(tmp_path))
    first = transport.write(0, buckets(0), keep=())
    transport.write(1, buckets(1), keep=(first,))
    assert versions(tmp_path) == ["weights_000000_0001", "weights_000001_0002"]
    third = transport.write(1, buckets(2), keep=(first,))  # the same version again
    assert versions(tmp_path) == ["weights_000000_0001", "weights_000001_0003"]
    assert torch.equal(dict(transport.read(first))["b"], tensors(0)["b"].bfloat16())
    assert torch.equal(dict(transport.read(third))["b"], tensors(2)["b"].bfloat16())


def test_a_version_that_was_not_finished_is_never_read(tmp_path: Path):
    def interrupted() -> Iterator[Bucket]:
        yield next(buckets())
        raise RuntimeError("the trainer stopped")

    transport = DiskTransport(str(tmp_path))
    with pytest.raises(RuntimeError, match="the trainer stopped"):
        transport.write(4, interrupted(), keep=())
    assert versions(tmp_path) == ["weights_000004_0001.partial"]
    transport.write(5, buckets(), keep=())
    assert versions(tmp_path) == ["weights_000005_0002"]


def test_a_damaged_missing_or_foreign_file_is_refused(tmp_path: Path):
    transport = DiskTransport(str(tmp_path))
    stored = transport.write(0, buckets(), keep=())
    first = Path(stored.parts[0])
    content = first.read_bytes()
    first.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"weights version 0: .* was damaged"):
        list(transport.read(stored))

    first.write_bytes(Path(stored.parts[1]).read_bytes())
    with pytest.raises(ValueError, match=r"weights version 0: a\.weight lies outside"):
        list(transport.read(stored))

    first.unlink()
    with pytest.raises(ValueError, match=r"^sync\.directory: .* is not on this machine"):
        list(transport.read(stored))


def test_files_of_others_are_not_touched(tmp_path: Path):
    (tmp_path / "weights_mine").mkdir()
    with pytest.raises(ValueError, match=r"^sync\.directory: .* holds other files"):
        DiskTransport(str(tmp_path)).write(0, buckets(), keep=())
    assert versions(tmp_path) == ["weights_mine"]


def test_a_later_run_takes_the_directory_over_and_the_earlier_one_ends(tmp_path: Path):
    earlier, later = DiskTransport(str(tmp_path)), DiskTransport(str(tmp_path))
    earlier.write(7, buckets(), keep=())
    later.write(0, buckets(), keep=())
    assert versions(tmp_path) == ["weights_000000_0001"]
    with pytest.raises(ValueError, match=r"^sync\.directory: another run writes to"):
        earlier.write(8, buckets(), keep=())
    assert versions(tmp_path) == ["weights_000000_0001"]
