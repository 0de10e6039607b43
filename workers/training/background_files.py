"""Checkpoints that a thread of the rank writes while training goes on.

    the pause      collective: each rank copies what it will write into host memory
    the thread     writes the files from these copies; nothing in it is collective

The files are those of `RankFiles`, byte for byte: both get the same calls.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from workers.training.sharded_checkpoint import RankFiles


class HostMemory:
    """Tensors in host memory; each checkpoint of a rank overwrites those of the one before."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def kept(self, name: str, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor, which is valid until the next call with this name."""
        held = self._tensors.get(name)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            self._tensors[name] = held
        # It waits for the GPU, so that an optimizer step after it changes nothing here.
        return held.copy_(tensor.detach())


class BackgroundFiles(RankFiles):
    """What one rank writes from `start` on, in a thread."""

    def __init__(self, path: Path, memory: HostMemory) -> None:
        """Take the memory of the copies, which nothing else may use until the thread has ended."""
        super().__init__(path)
        self._memory = memory
        self._writes: list[Callable[[], object]] = []
        self._seconds: float | None = None  # None: the thread has not ended
        # A rank that is told to end does not wait for a file of which no checkpoint will come.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)

    def kept(self, name: str, tensor: Tensor) -> Tensor:
        """See `RankFiles`."""
        return self._memory.kept(name, tensor)

    def write(self, write: Callable[[], object]) -> None:
        """See `RankFiles`; the thread calls it."""
        self._writes.append(write)

    def start(self) -> None:
        """Start the thread, or raise the first error of the copies."""
        self.finish()
        self._thread.start()

    def _run(self) -> None:
        began = time.perf_counter()
        for write in self._writes:
            self.attempt(write)
        self._writes.clear()
        self._seconds = time.perf_counter() - began

    def seconds(self) -> float | None:
        """Return how long the thread has written; None while it does.

        Raises:
            Exception: the first error of the thread, once it has ended.
        """
        seconds = self._seconds
        if seconds is not None:
            self.finish()
        return seconds

    def wait(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()
