"""The reward worker: scores responses in a pool of processes, while generation goes on."""

from __future__ import annotations

import asyncio
import os
import resource
from collections import Counter
from typing import Any

import numpy as np

from rlsys.config import RunConfig
from rlsys.data.batches import RewardBatch, RolloutBatch
from rlsys.driver.metrics import Metric, maximum, total
from rlsys.driver.ports import Handle
from rlsys.rewards.pool import RewardPool

COUNTED_FAILURES = {"timeout": "timeouts", "crash": "crashes", "error": "errors"}
COUNTED_REASONS = ("correct", "wrong", "no_answer", "too_long", "too_large", "unparsable")  # of the math verifier


class RewardWorker:
    """Ray actor (async: many parts are scored at once, all through one pool)."""

    def __init__(self, config: RunConfig) -> None:
        self._functions = config.reward.functions
        self._pool = RewardPool(config.reward, config.plugins)
        self._pool.warm_up()
        self._reasons: Counter[str] = Counter()

    async def score(self, rollouts: RolloutBatch) -> RewardBatch:
        """Rewards of one part, in its order."""
        truths = dict(zip(rollouts.prompts.group_ids.tolist(), (p.ground_truth for p in rollouts.prompts.prompts), strict=True))
        futures = [
            asyncio.wrap_future(self._pool.submit(text, truths[int(group)], int(tokens)))
            for text, group, tokens in zip(rollouts.response_texts, rollouts.group_ids, rollouts.response_lengths, strict=True)
        ]
        scores = await asyncio.gather(*futures)
        self._reasons.update(score.reason for score in scores)
        components = np.asarray([score.components for score in scores], dtype=np.float32).reshape(len(scores), len(self._functions))
        weights = np.asarray([function.weight for function in self._functions], dtype=np.float32)
        return RewardBatch(
            batch_id=rollouts.batch_id,
            rewards=components @ weights,
            accuracies=components[:, 0].clip(0, 1),
            components={function.name: components[:, i] for i, function in enumerate(self._functions)},
            reasons=tuple(score.reason for score in scores),
            extracted_answers=tuple(score.answer for score in scores),
        )

    async def metrics(self) -> dict[str, Metric]:
        """Failures and verdict reasons since the last call, and peak memory."""
        reasons, self._reasons = self._reasons, Counter()
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024**2
        counts = {f"reward/{name}": total(reasons[reason]) for reason, name in COUNTED_FAILURES.items()}
        if self._functions[0].name == "math":
            counts |= {f"reward/reasons/{reason}": total(reasons[reason]) for reason in COUNTED_REASONS}
        return counts | {"memory/reward": maximum(peak)}

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
