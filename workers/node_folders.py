"""Directories of the driver on other nodes, and of other nodes on the driver.

    deliver    driver -> nodes   a model, or a checkpoint to resume from
    collect    node -> driver    what a rank has written for a checkpoint

A node is first asked whether it has the same files: under the same path, where nodes share a file
system, in its model cache, or in its copy of the hub. What a node lacks goes once through Ray's
object store, and is checked by hash there.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayTaskError

from rlsys.config import ConfigError
from rlsys.models.catalogue import cache_directory
from rlsys.models.folder_files import FileFacts, FolderFacts, checked_writer, chunks_of
from workers.placement import call_on_nodes, driver_node

logger = logging.getLogger(__name__)

RECEIVED = "received"  # folder of the model cache
PREFIX = "rlsys-files-"  # of temporary folders


class NodeFolders:
    """The places of the driver's directories on the nodes of the cluster."""

    def __init__(self) -> None:
        self._places: dict[tuple[Path, str], str] = {}

    def on(self, directory: Path, node: str) -> str:
        """Return the path at which a node has a directory that was delivered, or that it shares.

        On the driver's node that is the directory itself.
        """
        return self._places.get((directory, node), str(directory))

    def deliver(
        self, directory: Path, files: Sequence[Path], nodes: Collection[str], *, keep: bool = True
    ) -> None:
        """Give some files of a directory to nodes; those that have them already get nothing.

        Args:
            keep: put them into the model cache of the node, where a later run finds them.

        Raises:
            ConfigError: a node cannot store them.
        """
        own = driver_node()
        wanted = sorted({node for node in nodes if node != own} - self._known(directory))
        if not wanted:
            return

        facts = FolderFacts.of(directory, files)
        found = call_on_nodes(wanted, _find, str(directory), facts)
        lacking = [node for node, place in found.items() if place is None]
        if lacking:
            found |= _send(directory, facts, lacking, keep=keep)
        self._places |= {(directory, node): str(place) for node, place in found.items()}

    def _known(self, directory: Path) -> set[str]:
        return {node for known, node in self._places if known == directory}


def _send(
    directory: Path, facts: FolderFacts, nodes: Sequence[str], *, keep: bool
) -> dict[str, Any]:
    """Put files into the object store once, and let nodes write them; return their places."""
    logger.info(
        "%s: sending %.1f MiB to %d nodes", directory, facts.num_bytes / 1024**2, len(nodes)
    )
    refs = [[ray.put(chunk) for chunk in chunks_of(directory / file.name)] for file in facts.files]
    try:
        return call_on_nodes(nodes, _receive, directory.name, facts, refs, keep)
    except RayTaskError as error:
        reason = (str(error.cause).splitlines() or [""])[-1]
        raise ConfigError(
            f"{directory}: a node of the cluster could not store a copy ({reason}). Make room in "
            "its ~/.cache/rlsys (or RLSYS_CACHE), or put the directory on a file system that all "
            "nodes share."
        ) from error


# On the other node


def _find(directory: str, facts: FolderFacts) -> str | None:
    """Return the directory of this node that has the files, or None."""
    path, cache = Path(directory), cache_directory()
    for place in (path, cache / path.name, cache / RECEIVED / _received_name(path.name, facts)):
        if facts.are_in(place):
            return str(place)
    snapshot = _from_hub(path)
    return str(snapshot) if snapshot and facts.are_in(snapshot) else None


def _from_hub(directory: Path) -> Path | None:
    """Return this node's copy of a snapshot of the hub, fetched if need be; None: no such thing."""
    # .../models--owner--name/snapshots/<revision>
    repository = directory.parent.parent.name
    if directory.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    from huggingface_hub import snapshot_download

    name = repository.removeprefix("models--").replace("--", "/", 1)
    try:
        return Path(snapshot_download(name, revision=directory.name))
    except Exception as error:  # no network, no access: the driver sends its own
        logger.info("%s is not fetched from the hub here: %s", name, error)
        return None


def _received_name(name: str, facts: FolderFacts) -> str:
    readable = re.sub(r"[^\w.-]", "_", name)
    return f"{readable}-{facts.digest}"


def _receive(name: str, facts: FolderFacts, refs: Sequence[Sequence[Any]], keep: bool) -> str:
    """Write files from their chunks, and return their directory."""
    if not keep:
        target = Path(tempfile.mkdtemp(prefix=PREFIX))
        _write_all(target, facts, refs)
        return str(target)

    parent = cache_directory() / RECEIVED
    parent.mkdir(parents=True, exist_ok=True)
    target = parent / _received_name(name, facts)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
    try:
        _write_all(partial, facts, refs)
        shutil.rmtree(target, ignore_errors=True)  # damaged, or it would have been found
        try:
            partial.rename(target)
        except OSError:  # another run was faster
            if not facts.are_in(target):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return str(target)


def _write_all(target: Path, facts: FolderFacts, refs: Sequence[Sequence[Any]]) -> None:
    for file, chunks in zip(facts.files, refs, strict=True):
        with checked_writer(target / file.name, file) as append:
            for chunk in chunks:
                append(ray.get(chunk))


class OnSomeNode:
    """The part of an actor that exchanges files with the driver, which may be elsewhere."""

    _outbox: Path | None = None

    def node(self) -> str:
        """Return the id of this actor's node."""
        return ray.get_runtime_context().get_node_id()

    def sees(self, file: str) -> bool:
        """Return whether a file of the driver exists on this node, under the same path."""
        return Path(file).exists()

    def forget(self, place: str) -> None:
        """Delete what `deliver` with `keep` false has written on this node, and nothing else."""
        if Path(place).name.startswith(PREFIX):
            shutil.rmtree(place, ignore_errors=True)

    def open_outbox(self) -> str:
        """Make a temporary folder, and return its path; the driver collects what lies in it."""
        self._outbox = Path(tempfile.mkdtemp(prefix=PREFIX))
        return str(self._outbox)

    def outbox_contents(self) -> FolderFacts:
        """Return the files of the temporary folder."""
        assert self._outbox is not None, "open_outbox comes first"
        files = [path for path in self._outbox.rglob("*") if path.is_file()]
        return FolderFacts.of(self._outbox, files)

    def outbox_chunks(self, name: str) -> Iterator[NDArray[np.uint8]]:
        """Yield the chunks of one file, as a streaming generator of Ray."""
        assert self._outbox is not None, "open_outbox comes first"
        yield from chunks_of(self._outbox / name)

    def close_outbox(self) -> None:
        """Delete the temporary folder."""
        if self._outbox is not None:
            shutil.rmtree(self._outbox, ignore_errors=True)
        self._outbox = None


async def collect(actor: Any, directory: Path) -> None:
    """Write the files in the outbox of an `OnSomeNode` into a directory of the driver."""
    facts: FolderFacts = await actor.outbox_contents.remote()
    for file in facts.files:
        await _collect_file(actor, file, directory / file.name)


async def _collect_file(actor: Any, facts: FileFacts, target: Path) -> None:
    # The rank waits until a chunk was taken, so that the object store holds a few of them.
    stream = actor.outbox_chunks.options(
        num_returns="streaming", _generator_backpressure_num_objects=2
    ).remote(facts.name)
    with checked_writer(target, facts) as append:
        async for chunk in stream:
            append(await chunk)
