"""Transport of weights from the trainer to the engines: a manifest, and buckets of tensors.

A bucket is a sequence of NumPy byte arrays, one for each tensor. Ray's object store holds it with a
single copy, and every engine on a node reads the same memory.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

BLOCK_WORDS = 512  # words of 64 bits in a block of a checksum


@dataclass(frozen=True, kw_only=True)
class WeightEntry:
    """One tensor of a bucket."""

    name: str  # as in the Hugging Face state dict
    shape: tuple[int, ...]
    dtype: str  # "float32", "bfloat16", ...
    num_bytes: int
    checksum: int  # see `_checksum`


@dataclass(frozen=True, kw_only=True)
class WeightManifest:
    """All tensors of one version of the weights, bucket by bucket."""

    version: int
    buckets: tuple[tuple[WeightEntry, ...], ...]

    @property
    def entries(self) -> tuple[WeightEntry, ...]:
        """All tensors in the order in which they are read."""
        return tuple(entry for bucket in self.buckets for entry in bucket)

    @property
    def num_bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.entries)


class StoredWeights(NamedTuple):
    """One version of the weights where a transport has stored it."""

    manifest: WeightManifest
    parts: Sequence[Any]  # where each bucket is, in the transport's own terms


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Tensors that travel together."""

    entries: tuple[WeightEntry, ...]
    arrays: tuple[NDArray[np.uint8], ...]  # the bytes of each, which may be those of a live model


def buckets_of(
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    dtype: torch.dtype,
    bucket_bytes: int,
    kept: Collection[str] = (),
) -> Iterator[Bucket]:
    """Cast `tensors` to `dtype` and yield them in buckets of at most `bucket_bytes`.

    A tensor is never split; one that is larger has a bucket of its own. A tensor that has the dtype
    already is not copied, so a bucket must be copied or written before the model changes. If the
    caller drops a bucket before it asks for the next, only one is in memory.

    Args:
        kept: names of tensors that keep their own dtype.
    """
    entries: list[WeightEntry] = []
    arrays: list[NDArray[np.uint8]] = []
    size = 0
    for name, tensor in tensors:
        sent = tensor.dtype if name in kept else dtype
        num_bytes = tensor.numel() * sent.itemsize
        if entries and size + num_bytes > bucket_bytes:
            yield Bucket(entries=tuple(entries), arrays=tuple(arrays))
            entries, arrays, size = [], [], 0

        data = _bytes_of(tensor.detach().to(sent))
        entries.append(
            WeightEntry(
                name=name,
                shape=tuple(tensor.shape),
                dtype=str(sent).removeprefix("torch."),
                num_bytes=num_bytes,
                checksum=_checksum(data),
            )
        )
        arrays.append(data)
        size += num_bytes

    if entries:
        yield Bucket(entries=tuple(entries), arrays=tuple(arrays))


def pack_weights(
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    version: int,
    dtype: torch.dtype,
    bucket_bytes: int = 2**28,
) -> StoredWeights:
    """Return all buckets of `tensors` at once, in memory of this process."""
    buckets = list(buckets_of(tensors, dtype=dtype, bucket_bytes=bucket_bytes))
    manifest = WeightManifest(version=version, buckets=tuple(bucket.entries for bucket in buckets))
    return StoredWeights(manifest, [bucket.arrays for bucket in buckets])


def unpack_weights(
    manifest: WeightManifest, buckets: Iterable[Sequence[NDArray[np.uint8]]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a manifest, as views of the buckets: read them, never write.

    Each bucket is taken from `buckets` when the one before it has been read.

    Raises:
        ValueError: the buckets are not those of the manifest.
    """
    parts = iter(buckets)
    for entries in manifest.buckets:
        arrays = next(parts, ())
        for position, entry in enumerate(entries):
            yield entry.name, _checked(manifest.version, entry, arrays[position : position + 1])
        del arrays  # before the next bucket is fetched


def _checked(version: int, entry: WeightEntry, found: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
    """Return the tensor of an entry after a look at its bytes."""
    if not found or found[0].nbytes != entry.num_bytes:
        raise ValueError(
            f"weights version {version}: {entry.name} lies outside the buckets that came with the "
            "manifest"
        )
    if _checksum(found[0]) != entry.checksum:
        raise ValueError(
            f"weights version {version}: {entry.name} was damaged on the way (checksum differs)"
        )
    return _view(found[0]).view(getattr(torch, entry.dtype)).reshape(entry.shape)


def _bytes_of(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """Return the bytes of a tensor on the CPU; a contiguous one is not copied."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _view(data: NDArray[np.uint8]) -> torch.Tensor:
    """Return a tensor over memory that may be read-only.

    torch warns of that; a copy would avoid the warning at the cost of the memory.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(data)


def _checksum(data: NDArray[np.uint8]) -> int:
    """Return adler32 of the sums of the blocks of `data`, and of what is left.

    A block has 512 words of 64 bits, and its sum is modulo 2^64. So a changed word and exchanged
    blocks are seen, at the speed at which memory is read; adler32 of all bytes takes seven times as
    long.
    """
    whole = len(data) // (8 * BLOCK_WORDS) * (8 * BLOCK_WORDS)
    sums = data[:whole].view(np.uint64).reshape(-1, BLOCK_WORDS).sum(axis=1, dtype=np.uint64)
    return zlib.adler32(np.ascontiguousarray(data[whole:]).data, zlib.adler32(sums.data))
