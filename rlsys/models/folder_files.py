"""The files of a directory as facts: names, sizes and hashes, by which copies are recognized."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CHUNK_BYTES = 64 * 1024**2


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """One file of a directory."""

    name: str  # relative to the directory, with slashes
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class FolderFacts:
    """Files of a directory, in the order of their names."""

    files: tuple[FileFacts, ...]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    @property
    def digest(self) -> str:
        """A short hash of all names and contents."""
        text = json.dumps([asdict(file) for file in self.files])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @classmethod
    def of(cls, directory: Path, files: Iterable[Path]) -> FolderFacts:
        """Read the facts of some files below a directory; hashes 1 GB in about a second."""
        return cls(files=tuple(_facts_of(directory, file) for file in sorted(files)))

    def are_in(self, directory: Path) -> bool:
        """Return whether a directory holds these files with the same contents."""
        paths = [(directory / file.name, file) for file in self.files]
        try:
            if any(path.stat().st_size != file.num_bytes for path, file in paths):
                return False  # without reading gigabytes
            return all(_sha256(path) == file.sha256 for path, file in paths)
        except OSError:
            return False


def _facts_of(directory: Path, file: Path) -> FileFacts:
    return FileFacts(
        name=file.relative_to(directory).as_posix(),
        num_bytes=file.stat().st_size,
        sha256=_sha256(file),
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def chunks_of(file: Path) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of a file in chunks; an empty file has none."""
    with file.open("rb") as stream:
        while block := stream.read(CHUNK_BYTES):
            yield np.frombuffer(block, dtype=np.uint8)


@contextmanager
def checked_writer(target: Path, facts: FileFacts) -> Iterator[Callable[[NDArray[np.uint8]], None]]:
    """Open a file, yield the function that appends a chunk to it, and check the file at the end.

    Raises:
        ValueError: the content is not that of `facts`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with target.open("wb") as stream:

        def append(chunk: NDArray[np.uint8]) -> None:
            digest.update(chunk.data)
            stream.write(chunk.data)

        yield append
    if digest.hexdigest() != facts.sha256:
        raise ValueError(f"{facts.name} was damaged on the way: its hash differs")


def all_files(directory: Path) -> Sequence[Path]:
    """Return the files of a directory, without those of its folders."""
    return sorted(path for path in directory.iterdir() if path.is_file())
