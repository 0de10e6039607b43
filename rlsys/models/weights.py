"""Transport of weights from the trainer to the engines: a manifest and flat byte shards.

The shards are NumPy byte arrays, so that Ray's object store can hold them and every engine on a
node reads the same memory.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

DEFAULT_SHARD_BYTES = 256 * 1024**2


@dataclass(frozen=True, kw_only=True)
class WeightEntry:
    """The place of one tensor in the shards."""

    name: str  # as in the Hugging Face state dict
    shape: tuple[int, ...]
    dtype: str  # "float32", "bfloat16", ...
    shard: int
    offset: int  # bytes
    num_bytes: int
    checksum: int  # adler32 of the bytes


@dataclass(frozen=True, kw_only=True)
class WeightManifest:
    """All tensors of one version of the weights."""

    version: int
    entries: tuple[WeightEntry, ...]

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries)


def pack_weights(
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    version: int,
    dtype: torch.dtype,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> tuple[WeightManifest, list[NDArray[np.uint8]]]:
    """Cast `tensors` to `dtype` and put them into shards of about `shard_bytes`.

    A tensor is never split.
    """
    entries: list[WeightEntry] = []
    shards: list[NDArray[np.uint8]] = []
    buffer = np.empty(0, dtype=np.uint8)
    size = 0

    def close_shard() -> None:
        nonlocal size
        if size:
            shards.append(buffer[:size])
        size = 0

    for name, tensor in tensors:
        num_bytes = tensor.numel() * dtype.itemsize
        if size + num_bytes > len(buffer):
            close_shard()
            # Memory that is not written to is not taken from the machine.
            buffer = np.empty(max(num_bytes, shard_bytes), dtype=np.uint8)

        # Cast and copied in one pass.
        place = buffer[size : size + num_bytes]
        torch.from_numpy(place).view(dtype).copy_(tensor.detach().reshape(-1))
        entries.append(
            WeightEntry(
                name=name,
                shape=tuple(tensor.shape),
                dtype=str(dtype).removeprefix("torch."),
                shard=len(shards),
                offset=size,
                num_bytes=num_bytes,
                checksum=_checksum(place),
            )
        )
        size += num_bytes

    close_shard()
    return WeightManifest(version=version, entries=tuple(entries)), shards


def unpack_weights(
    manifest: WeightManifest, shards: Sequence[NDArray[np.uint8]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a manifest, as views of the shards: read them, never write.

    Raises:
        ValueError: the shards are not those of the manifest.
    """
    for entry in manifest.entries:
        end = entry.offset + entry.num_bytes
        if entry.shard >= len(shards) or end > shards[entry.shard].nbytes:
            raise ValueError(
                f"weights version {manifest.version}: {entry.name} lies outside the shards that "
                "came with the manifest"
            )

        data = shards[entry.shard][entry.offset : end]
        if _checksum(data) != entry.checksum:
            raise ValueError(
                f"weights version {manifest.version}: {entry.name} was damaged on the way "
                "(checksum differs)"
            )

        tensor = _view(data)
        yield entry.name, tensor.view(getattr(torch, entry.dtype)).reshape(entry.shape)


def _view(data: NDArray[np.uint8]) -> torch.Tensor:
    """Return a tensor over memory that may be read-only.

    torch warns of that; a copy would avoid the warning at the cost of the memory.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(data)


def _checksum(data: NDArray[np.uint8]) -> int:
    return zlib.adler32(data.data)
