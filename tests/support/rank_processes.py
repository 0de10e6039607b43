"""Processes of policy ranks that serve as one group after another.

Starting a process takes longer than what most tests do with it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import ray
from torch import Tensor

from rlsys.config import RunConfig
from rlsys.models import resolve_model
from rlsys.models.tensor_files import TensorFileWriter
from tests.support.former_checkpoints import rewrite_as_former
from workers.training.backends.fsdp2 import FSDP2Backend
from workers.training.policy import PolicyWorker
from workers.training.rank_group import PolicyGroup


class PolicyRank(PolicyWorker):
    """A policy worker that can start over in its process, once it has left its group."""

    def __init__(self) -> None: ...  # `become` initializes it

    def become(self, config: RunConfig, model_directory: str, rank: int, world_size: int) -> None:
        """Start over as a new worker, with nothing left of the one before."""
        vars(self).clear()
        super().__init__(config, model_directory, rank, world_size)

    def hold_files(self) -> None:
        """Let the thread that writes checkpoints wait before each tensor, until `release_files`."""
        released = self._released = threading.Event()
        write = TensorFileWriter.write

        def held(self: TensorFileWriter, name: str, tensor: Tensor) -> None:
            if threading.current_thread().name == "checkpoint":
                released.wait()
            write(self, name, tensor)

        self._write = write
        TensorFileWriter.write = held

    def release_files(self) -> None:
        """End `hold_files`."""
        self._released.set()
        TensorFileWriter.write = self._write

    def rewrite_as_former(self, directory: str) -> None:
        """Replace the files of `save` by those of an earlier version; collective."""
        assert isinstance(self.backend, FSDP2Backend)
        rewrite_as_former(self.backend, Path(directory), rank=self.rank)


class RankProcesses:
    """As many processes as the largest group so far."""

    def __init__(self) -> None:
        self._actors: list[Any] = []

    @asynccontextmanager
    async def group(self, config: RunConfig) -> AsyncIterator[PolicyGroup]:
        """Yield a group of `config.policy.ranks` new workers on the tiny model; one at a time."""
        ranks = config.policy.ranks
        remote_class = ray.remote(PolicyRank)
        while len(self._actors) < ranks:
            self._actors.append(remote_class.options(num_cpus=0).remote())

        actors = self._actors[:ranks]
        model = str(resolve_model("tiny"))
        try:
            starts = [
                actor.become.remote(config, model, rank, ranks) for rank, actor in enumerate(actors)
            ]
            await asyncio.gather(*starts)
            group = PolicyGroup(actors)
            await group.setup()
            yield group
            await asyncio.gather(*(actor.shutdown.remote() for actor in actors))
        except BaseException:
            self.kill()  # a rank may wait forever for one that failed
            raise

    def kill(self) -> None:
        """End the processes; the next group starts new ones."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()
