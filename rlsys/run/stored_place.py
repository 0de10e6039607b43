"""A folder in any file system that pyarrow.fs or fsspec opens, as far as a run needs one."""

from __future__ import annotations

import itertools
import json
import os
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from rlsys.config import ConfigError

BLOCK = 8 << 20  # bytes
BLOCKS_IN_FLIGHT = 8  # that may wait in memory for a slow store
PARTIAL = ".partial"
PROBE = ".probe-"
# Stores that show an object only when it was written whole, by the name of the file system in
# pyarrow or of its protocol in fsspec. Elsewhere a file is written beside its name and renamed.
WHOLE_OBJECTS = ("s3", "s3a", "gcs", "gs", "abfs", "abfss", "az", "oss")

# All that a store may raise: packages that fsspec calls have errors of their own.
StoreErrors = (Exception,)


class StoredPlace:
    """The place that `run.storage` names. Its methods may be called from several threads.

    Names of files are relative to the place, with slashes.
    """

    def __init__(self, files: pafs.FileSystem, path: str, *, shown: str) -> None:
        """Create a place; `shown` is what messages call it."""
        self._files = files
        self._path = path.rstrip("/")
        self.shown = shown
        self.is_local = isinstance(files, pafs.LocalFileSystem)
        self._writes_whole = _writes_whole(files)

    @classmethod
    def open(cls, uri: str) -> StoredPlace:
        """Return the place of a URI or directory. Nothing is read or written.

        Raises:
            ConfigError: no installed package opens such a URI.
        """
        shown = uri.partition("?")[0]
        if "://" not in uri:
            path = os.path.abspath(os.path.expanduser(uri))
            return cls(pafs.LocalFileSystem(), path, shown=shown)
        files, path = _opened(uri)
        return cls(files, path, shown=shown)

    @property
    def path(self) -> str:
        """The path within the file system."""
        return self._path

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Return the bytes of all files in a folder, by name; none where it does not exist."""
        base = self._at(folder) if folder else self._path
        selector = pafs.FileSelector(base, recursive=True, allow_not_found=True)
        found = {}
        for info in self._files.get_file_info(selector):
            if info.type == pafs.FileType.File:
                name = info.path.removeprefix(self._path).lstrip("/")
                found[name] = int(info.size or 0)
        return found

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file, or None where there is none."""
        if self._files.get_file_info(self._at(name)).type != pafs.FileType.File:
            return None
        with self._files.open_input_stream(self._at(name)) as stream:
            return stream.read()

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON file; None where it is absent or cut off."""
        content = self.read(name)
        with suppress(ValueError):
            return None if content is None else json.loads(content)
        return None

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        self._write(name, lambda stream: stream.write(content))

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a small file of JSON."""
        self.write(name, json.dumps(content, indent=1).encode())

    def upload(self, local: Path, name: str, between: Callable[[], None]) -> None:
        """Copy a local file; `between` is called after each block, and may raise to give up."""

        def copy(stream: pa.NativeFile) -> None:
            with local.open("rb") as source:
                for number in itertools.count(1):
                    block = source.read(BLOCK)
                    if not block:
                        return
                    stream.write(block)
                    if number % BLOCKS_IN_FLIGHT == 0:  # pyarrow would read a whole file ahead
                        stream.flush()
                    between()

        self._write(name, copy)

    def download(self, name: str, local: Path) -> None:
        """Copy a file to a local one, which is whole or absent."""
        local.parent.mkdir(parents=True, exist_ok=True)
        partial = local.with_name(local.name + PARTIAL)
        with self._files.open_input_stream(self._at(name)) as source, partial.open("wb") as target:
            while block := source.read(BLOCK):
                target.write(block)
        os.replace(partial, local)

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        if self._files.get_file_info(self._at(name)).type == pafs.FileType.File:
            self._files.delete_file(self._at(name))

    def delete_folder(self, folder: str) -> None:
        """Delete a folder and all in it, if it is there."""
        with suppress(FileNotFoundError):
            self._files.delete_dir(self._at(folder))

    def probe(self) -> None:
        """Write, read and delete a small file.

        Raises:
            OSError: one of these failed.
        """
        name, content = f"{PROBE}{uuid.uuid4().hex}", b"rlsys"
        existed = self._files.get_file_info(self._path).type != pafs.FileType.NotFound
        self.write(name, content)
        found = self.read(name)
        self.delete(name)
        if not (existed or self._writes_whole or self.sizes()):
            self._files.delete_dir(self._path)  # `write` has made it
        if found != content:
            raise OSError(f"a file was written, and read as {found!r}")

    def _write(self, name: str, fill: Callable[[pa.NativeFile], object]) -> None:
        """Write a file that appears whole, or is deleted where it could not be completed."""
        final = self._at(name)
        written = final if self._writes_whole else f"{final}{PARTIAL}"
        if not self._writes_whole:  # an object store has no folders
            self._files.create_dir(os.path.dirname(final), recursive=True)
        try:
            with self._files.open_output_stream(written) as stream:
                fill(stream)
        except BaseException:
            # Leaving the context has completed what is there, also in an object store.
            with suppress(*StoreErrors):
                self._files.delete_file(written)
            raise
        if written != final:
            self._files.move(written, final)

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"


def _opened(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the file system and path of a URI: by pyarrow where it knows the scheme, or fsspec."""
    scheme = urlsplit(uri).scheme
    try:
        return pafs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        if not str(error).startswith("Unrecognized filesystem type"):
            raise _cannot_open(scheme, error) from error

    import fsspec.core

    try:
        files, path = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise _cannot_open(scheme, error) from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(files)), path


def _cannot_open(scheme: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"run.storage: {scheme}:// cannot be opened ({first_line(error)}). Name a directory, or "
        "a URI that pyarrow.fs or an installed fsspec package opens, such as s3://bucket/runs/name."
    )


def _writes_whole(files: pafs.FileSystem) -> bool:
    if isinstance(files, pafs.PyFileSystem):
        protocol = getattr(getattr(files.handler, "fs", None), "protocol", ())
        names = (protocol,) if isinstance(protocol, str) else tuple(protocol)
        return any(name in WHOLE_OBJECTS for name in names)
    return files.type_name in WHOLE_OBJECTS


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; those of some stores have dozens."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
