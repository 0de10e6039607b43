"""Sampling of all responses of an evaluation, part by part, into files.

    prompts of a part ---> generation group ---group by group---> reward worker ---> Parquet

Unlike in training the driver opens the records, a part at a time: it writes them where it writes
the results, and no other node of a cluster may have that disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from rlsys.config.evaluation_run import EvaluationRunConfig
from rlsys.data.batches import PromptBatch, SamplingParameters
from rlsys.data.response_files import ResponseFiles, ScoredResponses
from rlsys.driver.ports import Generator, RewardScorer, RolloutPart
from rlsys.driver.sampling import batch_seed, sampling_parameters
from rlsys.run.reward_failures import RewardFailureWatch


@dataclass(frozen=True, kw_only=True)
class CollectionEvents:
    """What a collector reports while it works."""

    kept: Callable[[int], None]  # prompts of a part that an earlier run has sampled
    finished: Callable[[ScoredResponses], None]  # a prompt that was sampled now
    notice: Callable[[str], None]  # a text for the user


class ResponseCollector:
    """The sampling of one or more models on the same engine settings and rewards."""

    def __init__(self, config: EvaluationRunConfig, events: CollectionEvents) -> None:
        self._config = config
        self._sampling_run = config.sampling_run()
        self._events = events
        self._watch = RewardFailureWatch(events.notice)
        self._stopped = asyncio.Event()

    def request_stop(self) -> None:
        """End the collection; the prompts that are complete so far are written."""
        self._stopped.set()

    @property
    def is_stopped(self) -> bool:
        return self._stopped.is_set()

    def is_complete(self, prompts: PromptBatch, files: ResponseFiles) -> bool:
        """Return whether the files hold the responses to all prompts."""
        parts = self._parts(prompts)
        return all(files.prompts_in(part) == len(own) for part, own in enumerate(parts))

    def _parts(self, prompts: PromptBatch) -> list[PromptBatch]:
        size = self._config.evaluation.prompts_per_part
        starts = range(0, len(prompts), size)
        return [_slice(prompts, start, start + size, part) for part, start in enumerate(starts)]

    async def collect(
        self, generator: Generator, scorer: RewardScorer, prompts: PromptBatch, files: ResponseFiles
    ) -> bool:
        """Sample every part that is not complete in `files`; return whether all are now.

        The seed of a part depends on evaluation.seed and its number alone, so that an evaluation
        that is resumed samples what an uninterrupted one does.

        Raises:
            RewardFailureError: a reward function failed on more than half of the first part.
        """
        for part, own in enumerate(self._parts(prompts)):
            if files.prompts_in(part) == len(own):
                self._events.kept(len(own))
                continue
            if self._stopped.is_set():
                return False
            groups = await self._sample(generator, scorer, own, self._sampling(part))
            if groups:
                files.write(part, groups)
            if len(groups) < len(own):
                return False
            self._watch.check([group.rewards for group in groups], "evaluation")
        return True

    def _sampling(self, part: int) -> SamplingParameters:
        generation = self._config.generation
        return sampling_parameters(
            self._sampling_run,
            samples=generation.samples_per_prompt,
            temperature=generation.temperature,
            seed=batch_seed(self._config.evaluation.seed, part),
        )

    async def _sample(
        self,
        generator: Generator,
        scorer: RewardScorer,
        prompts: PromptBatch,
        sampling: SamplingParameters,
    ) -> list[ScoredResponses]:
        """Return the groups of one part: all of them, or after a stop those that are complete."""
        groups: list[ScoredResponses] = []

        async def open_records(part: RolloutPart) -> None:
            rewards = scorer.score(part.rollouts)
            group = ScoredResponses(rollouts=await part.rollouts, rewards=await rewards)
            groups.append(group)
            self._events.finished(group)

        async def sample() -> None:
            async with asyncio.TaskGroup() as tasks:
                async for part in generator.generate(prompts, sampling):
                    tasks.create_task(open_records(part))

        sampling_task = asyncio.create_task(sample())
        stop = asyncio.create_task(self._stopped.wait())
        await asyncio.wait({sampling_task, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not sampling_task.done():
            sampling_task.cancel()
            with suppress(asyncio.CancelledError):
                await sampling_task
            return groups
        await _result(sampling_task)
        return groups


async def _result(task: asyncio.Task[None]) -> None:
    """Wait for a task; where several of its parts failed, raise the first error alone."""
    try:
        await task
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


def _slice(prompts: PromptBatch, start: int, end: int, part: int) -> PromptBatch:
    return PromptBatch(
        batch_id=part,
        prompts=prompts.prompts[start:end],
        group_ids=prompts.group_ids[start:end],
    )
