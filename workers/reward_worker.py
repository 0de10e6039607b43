"""The reward worker: scores responses in a pool of processes, while generation goes on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import psutil
from ray.exceptions import RayError

from rlsys.config import RewardConfig, RunConfig
from rlsys.data.batches import RewardBatch, RewardFailure, RolloutBatch, StopReason
from rlsys.driver.ports import Handle
from rlsys.metrics import Metric, maximum, peak_memory_gib
from rlsys.plugins import load_plugins
from rlsys.rewards import RewardInput, with_token_limit
from rlsys.rewards.pool import RewardPool
from rlsys.rewards.scoring import FunctionFailure, Score

OUTPUT_EVERY_S = 1.0
LAST_OUTPUT_LIMIT_S = 5.0

logger = logging.getLogger(__name__)


class RewardWorker:
    """Ray actor (async: many parts are scored at once, all through one pool)."""

    def __init__(self, config: RunConfig) -> None:
        load_plugins(config.plugins)  # the functions may be theirs
        functions = with_token_limit(config.reward.functions, config.generation.max_tokens)
        self._config = config.reward.model_copy(update={"functions": functions})
        self._pool = RewardPool(self._config, config.plugins)
        self._pool.warm_up()

    async def score(self, rollouts: RolloutBatch) -> RewardBatch:
        """Rewards of one part, in its order."""
        futures = [
            asyncio.wrap_future(self._pool.submit(inputs)) for inputs in reward_inputs(rollouts)
        ]
        return reward_batch(rollouts.batch_id, self._config, await asyncio.gather(*futures))

    async def output(self) -> list[str]:
        """What reward functions printed since the last call, and what they failed on, line by line."""
        return self._pool.output.take()

    async def metrics(self) -> dict[str, Metric]:
        """Memory: this process's peak and what the pool holds now."""
        memory = peak_memory_gib()
        for process in self._pool.process_ids():
            with contextlib.suppress(psutil.Error):  # it may have been replaced meanwhile
                memory += psutil.Process(process).memory_info().rss / 1024**3
        return {"memory/reward": maximum(memory)}

    async def process_ids(self) -> list[int]:
        """This process first, then those of the pool."""
        return [os.getpid(), *self._pool.process_ids()]

    async def shutdown(self) -> None:
        """Kill the pool."""
        self._pool.shutdown()


def reward_inputs(rollouts: RolloutBatch) -> Iterator[RewardInput]:
    """Yield what reward functions may know of each response, as plain values that pickle fast."""
    prompts = dict(zip(rollouts.prompts.group_ids.tolist(), rollouts.prompts.prompts, strict=True))
    starts = rollouts.sequence_offsets[:-1] + rollouts.prompt_lengths
    lengths = rollouts.response_lengths
    for row, (text, group) in enumerate(
        zip(rollouts.response_texts, rollouts.group_ids.tolist(), strict=True)
    ):
        prompt = prompts[group]
        tokens = rollouts.token_ids[starts[row] : rollouts.sequence_offsets[row + 1]]
        yield RewardInput(
            completion=text,
            ground_truth=prompt.ground_truth,
            prompt=prompt.text,
            problem=prompt.problem,
            metadata=prompt.metadata,
            token_ids=array("i", tokens.tobytes()),  # no NumPy in the processes
            num_tokens=int(lengths[row]),
            truncated=bool(rollouts.stop_reasons[row] == StopReason.LENGTH),
        )


def reward_batch(batch_id: int, config: RewardConfig, scores: Sequence[Score]) -> RewardBatch:
    """The record of so many scores, in their order: the weighted sums, and what failed.

    reward = sum over functions of weight * score        a failed function's term is 0, or with `on_failure: drop` the reward is NaN
    """
    functions = config.functions
    components = np.asarray([score.components for score in scores], dtype=np.float64).reshape(
        len(scores), len(functions)
    )
    weights = np.asarray([function.weight for function in functions], dtype=np.float64)
    terms = components if config.on_failure == "drop" else np.nan_to_num(components, nan=0.0)
    return RewardBatch(
        batch_id=batch_id,
        rewards=(terms @ weights).astype(np.float32),
        accuracies=components[:, 0].clip(0, 1).astype(np.float32),
        components={
            function.name: components[:, i].astype(np.float32)
            for i, function in enumerate(functions)
        },
        reasons=tuple(score.reason for score in scores),
        extracted_answers=tuple(score.answer for score in scores),
        failures=_failures(config, scores),
    )


def _failures(config: RewardConfig, scores: Sequence[Score]) -> tuple[RewardFailure, ...]:
    """In the order of the responses; one traceback for each function, so that a batch that fails as a whole stays small."""
    failures: list[RewardFailure] = []
    shown: set[str] = set()
    for row, score in enumerate(scores):
        for function, outcome in zip(config.functions, score.outcomes, strict=True):
            if isinstance(outcome, FunctionFailure):
                failures.append(
                    RewardFailure(
                        row=row,
                        function=function.name,
                        kind=outcome.kind,
                        message=outcome.message,
                        traceback="" if function.name in shown else outcome.traceback,
                    )
                )
                shown.add(function.name)
    return tuple(failures)


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


class RewardOutput:
    """Writes what reward functions print to the log of this process, which is run.log, while a run goes on."""

    def __init__(self) -> None:
        self._actor: Any = None
        self._task: asyncio.Task[None] | None = None

    def follow(self, actor: Any) -> None:
        """Begin; `actor` is the reward worker."""
        self._actor = actor
        self._task = asyncio.create_task(self._write_for_ever())

    async def finish(self) -> None:
        """Write the last lines; to be called before the actor is killed."""
        if self._task is None:
            return
        self._task.cancel()
        with contextlib.suppress(RayError, TimeoutError):
            await asyncio.wait_for(self._write(), LAST_OUTPUT_LIMIT_S)

    async def _write_for_ever(self) -> None:
        with contextlib.suppress(RayError):  # the actor has died: the run says so
            while True:
                await self._write()
                await asyncio.sleep(OUTPUT_EVERY_S)

    async def _write(self) -> None:
        for line in await self._actor.output.remote():
            logger.info("%s", line)
