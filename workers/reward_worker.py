"""The reward worker: scores responses in a pool of processes, while generation goes on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
from typing import Any

import numpy as np
import psutil

from rlsys.config import RunConfig
from rlsys.data.batches import RewardBatch, RolloutBatch
from rlsys.driver.metrics import Metric, maximum
from rlsys.driver.ports import Handle
from rlsys.rewards.pool import RewardPool


class RewardWorker:
    """Ray actor (async: many parts are scored at once, all through one pool)."""

    def __init__(self, config: RunConfig) -> None:
        self._functions = config.reward.functions
        self._pool = RewardPool(config.reward, config.plugins)
        self._pool.warm_up()

    async def score(self, rollouts: RolloutBatch) -> RewardBatch:
        """Rewards of one part, in its order."""
        truths = dict(
            zip(
                rollouts.prompts.group_ids.tolist(),
                (p.ground_truth for p in rollouts.prompts.prompts),
                strict=True,
            )
        )
        futures = [
            asyncio.wrap_future(self._pool.submit(text, truths[int(group)], int(tokens)))
            for text, group, tokens in zip(
                rollouts.response_texts, rollouts.group_ids, rollouts.response_lengths, strict=True
            )
        ]
        scores = await asyncio.gather(*futures)
        components = np.asarray([score.components for score in scores], dtype=np.float32).reshape(
            len(scores), len(self._functions)
        )
        weights = np.asarray([function.weight for function in self._functions], dtype=np.float32)
        return RewardBatch(
            batch_id=rollouts.batch_id,
            rewards=components @ weights,
            accuracies=components[:, 0].clip(0, 1),
            components={
                function.name: components[:, i] for i, function in enumerate(self._functions)
            },
            reasons=tuple(score.reason for score in scores),
            extracted_answers=tuple(score.answer for score in scores),
        )

    async def metrics(self) -> dict[str, Metric]:
        """Memory: this process's peak and what the pool holds now."""
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        for process in self._pool.process_ids():
            with contextlib.suppress(psutil.Error):  # it may have been replaced meanwhile
                memory += psutil.Process(process).memory_info().rss
        return {"memory/reward": maximum(memory / 1024**3)}

    async def process_ids(self) -> list[int]:
        """This process first, then those of the pool."""
        return [os.getpid(), *self._pool.process_ids()]

    async def shutdown(self) -> None:
        """Kill the pool."""
        self._pool.shutdown()


class RewardWorkerClient:
    """Implements `ports.RewardScorer` over the actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def score(self, rollouts: Handle[RolloutBatch]) -> Handle[RewardBatch]:
        """See `ports.RewardScorer`."""
        return self._actor.score.remote(rollouts)

    async def metrics(self) -> dict[str, Metric]:
        """See `ports.RewardScorer`."""
        return await self._actor.metrics.remote()
