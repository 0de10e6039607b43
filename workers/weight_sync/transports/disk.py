"""Weights through files on storage that all nodes share.

<directory>/rlsys_owner                     token of the process that writes here
<directory>/weights_000012_0001/            complete: it has got its name last
    bucket_00000.safetensors
<directory>/weights_000013_0002.partial/    being written; never read
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlsys.config.sync import OWNER_FILE
from rlsys.models.weights import (
    Bucket,
    StoredWeights,
    WeightEntry,
    WeightManifest,
    unpack_weights,
)

PARTIAL = ".partial"


class DiskTransport:
    """The `WeightTransport` whose parts are paths of files.

    The first write deletes the weights that an earlier run has left in the directory.
    """

    def __init__(self, directory: str) -> None:
        self._directory = Path(directory).absolute()
        self._token = secrets.token_hex(8)
        self._written = 0

    def write(
        self, version: int, buckets: Iterator[Bucket], *, keep: Collection[StoredWeights]
    ) -> StoredWeights:
        """See `WeightTransport`.

        Raises:
            ValueError: the directory holds files of others, or another run writes to it.
            OSError: the directory cannot be written to.
        """
        self._claim()
        self._delete_all_but({Path(stored.parts[0]).parent.name for stored in keep})

        self._written += 1
        complete = self._directory / f"weights_{version:06d}_{self._written:04d}"
        partial = complete.with_name(complete.name + PARTIAL)
        partial.mkdir()
        entries, names = [], []
        for number, bucket in enumerate(buckets):
            names.append(f"bucket_{number:05d}.safetensors")
            entries.append(bucket.entries)
            _write(bucket, partial / names[-1])
            del bucket  # before the next one is built

        _sync(partial)
        partial.rename(complete)
        _sync(self._directory)
        manifest = WeightManifest(version=version, buckets=tuple(entries))
        return StoredWeights(manifest, [str(complete / name) for name in names])

    def read(self, stored: StoredWeights) -> Iterator[tuple[str, Tensor]]:
        """See `WeightTransport`."""
        files = zip(stored.parts, stored.manifest.buckets, strict=True)
        yield from unpack_weights(stored.manifest, (_arrays_of(*file) for file in files))

    def _claim(self) -> None:
        """Make the directory this run's own at the first write, and see later that it still is."""
        owner = self._directory / OWNER_FILE
        if not self._written:
            self._directory.mkdir(parents=True, exist_ok=True)
            # What is not from rlsys must not be deleted.
            if not owner.is_file() and any(self._directory.iterdir()):
                raise ValueError(
                    f"sync.directory: {self._directory} holds other files. Give it a directory of "
                    "its own."
                )
            owner.write_text(self._token)
        elif not owner.is_file() or owner.read_text() != self._token:
            raise ValueError(
                f"sync.directory: another run writes to {self._directory}. Give each run its own."
            )

    def _delete_all_but(self, names: Collection[str]) -> None:
        for version in self._directory.glob("weights_*"):
            if version.name not in names:
                shutil.rmtree(version)


def _write(bucket: Bucket, path: Path) -> None:
    """Write the tensors of a bucket to a file of safetensors, and the file to the disk."""
    tensors = {
        entry.name: _typed(array, entry)
        for entry, array in zip(bucket.entries, bucket.arrays, strict=True)
    }
    save_file(tensors, path)
    _sync(path)


def _typed(array: NDArray[np.uint8], entry: WeightEntry) -> Tensor:
    return torch.from_numpy(array).view(getattr(torch, entry.dtype)).reshape(entry.shape)


def _arrays_of(path: str, entries: Iterable[WeightEntry]) -> Sequence[NDArray[np.uint8]]:
    """Return the bytes of a file's tensors, mapped into memory.

    Raises:
        ValueError: the file is not there, or is another one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
            return [
                file.get_tensor(entry.name).reshape(-1).view(torch.uint8).numpy()
                for entry in entries
                if entry.name in found
            ]
    except FileNotFoundError as error:
        raise ValueError(
            f"sync.directory: {path} is not on this machine. Choose a directory on storage that "
            "all nodes with generation workers share."
        ) from error


def _sync(path: Path) -> None:
    """Wait until a file or the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
