"""Processes of policy ranks that are one group after another: starting one takes longer than what most tests do with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import ray

from rlsys.config import RunConfig
from rlsys.models import resolve_model
from workers.training.policy import PolicyWorker
from workers.training.rank_group import PolicyGroup


class PolicyRank(PolicyWorker):
    """A policy worker that can be made anew in its process, once it has left its group."""

    def __init__(self) -> None: ...  # it is nothing before `become`

    def become(self, config: RunConfig, model_directory: str, rank: int, world_size: int) -> None:
        """A worker as just started: the one before leaves nothing in it."""
        vars(self).clear()
        super().__init__(config, model_directory, rank, world_size)


class RankProcesses:
    """As many processes as the largest group so far."""

    def __init__(self) -> None:
        self._actors: list[Any] = []

    @asynccontextmanager
    async def group(self, config: RunConfig) -> AsyncIterator[PolicyGroup]:
        """A policy group of `config.policy.ranks` new workers on the tiny model; one at a time."""
        ranks, remote_class = config.policy.ranks, ray.remote(PolicyRank)
        self._actors += [
            remote_class.options(num_cpus=0).remote() for _ in range(len(self._actors), ranks)
        ]
        actors, model = self._actors[:ranks], str(resolve_model("tiny"))
        try:
            await asyncio.gather(
                *(
                    actor.become.remote(config, model, rank, ranks)
                    for rank, actor in enumerate(actors)
                )
            )
            group = PolicyGroup(actors)
            await group.setup()
            yield group
            await asyncio.gather(*(actor.shutdown.remote() for actor in actors))
        except BaseException:
            self.kill()  # a rank may wait for ever for one that failed
            raise

    def kill(self) -> None:
        """End the processes; the next group starts new ones."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()
