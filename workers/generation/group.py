"""The generation group: it spreads prompts over workers and returns parts as they finish."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any

from rlsys.data.batches import PromptBatch, SamplingParameters
from rlsys.driver.ports import RolloutPart
from rlsys.metrics import Metric, combine


class GenerationGroup:
    """The `ports.Generator` over actor handles of `GenerationWorker`."""

    def __init__(self, workers: Sequence[Any]) -> None:
        self._workers = workers

    async def generate(
        self, prompts: PromptBatch, sampling: SamplingParameters
    ) -> AsyncIterator[RolloutPart]:
        """Split the prompts evenly over the workers and yield each group when it is finished."""
        # A worker's task puts its parts into the queue, then None, or an error.
        queue: asyncio.Queue[RolloutPart | BaseException | None] = asyncio.Queue()
        ranges = _even_ranges(len(prompts), len(self._workers))
        tasks = [
            asyncio.create_task(self._stream(worker, prompts, indices, sampling, queue))
            for worker, indices in zip(self._workers, ranges, strict=True)
            if len(indices)
        ]

        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if isinstance(item, RolloutPart):
                    yield item
                elif item is None:
                    running -= 1
                else:
                    raise item
        finally:
            # The driver may stop early, and an error of one worker ends all streams.
            for task in tasks:
                task.cancel()

    async def _stream(
        self,
        worker: Any,
        prompts: PromptBatch,
        indices: range,
        sampling: SamplingParameters,
        queue: asyncio.Queue[Any],
    ) -> None:
        """Generate the prompts `indices` on one worker and put the parts into the queue."""
        own = PromptBatch(
            batch_id=prompts.batch_id,
            prompts=prompts.prompts[indices.start : indices.stop],
            group_ids=prompts.group_ids[indices.start : indices.stop],
        )
        try:
            stream = worker.generate.options(num_returns="streaming").remote(
                own, indices.start, sampling
            )
            # The items alternate: a small one that is fetched, and a reference that is passed on.
            async for head in stream:
                index, tokens = await head
                rollouts = await anext(stream)
                part = RolloutPart(
                    prompt_index=index, num_response_tokens=tokens, rollouts=rollouts
                )
                await queue.put(part)
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    async def metrics(self) -> dict[str, Metric]:
        """Return the peak memory over the workers."""
        return combine(await asyncio.gather(*(worker.metrics.remote() for worker in self._workers)))


def _even_ranges(count: int, workers: int) -> list[range]:
    """Return consecutive ranges whose sizes differ by at most one."""
    bounds = [count * i // workers for i in range(workers + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]
