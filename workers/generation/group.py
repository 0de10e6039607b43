"""The generation group: prompts out to the workers, parts back as they finish."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any

from rlsys.data.batches import PromptBatch, SamplingParameters
from rlsys.driver.ports import RolloutPart
from rlsys.metrics import Metric, combine


class GenerationGroup:
    """Implements `ports.Generator` over actor handles of `GenerationWorker`."""

    def __init__(self, workers: Sequence[Any]) -> None:
        self._workers = workers

    async def generate(
        self, prompts: PromptBatch, sampling: SamplingParameters
    ) -> AsyncIterator[RolloutPart]:
        """Split the prompts evenly over the workers and yield each group as soon as its worker has it."""
        queue: asyncio.Queue[RolloutPart | BaseException | None] = asyncio.Queue()
        shares = _even_shares(len(prompts), len(self._workers))
        tasks = [
            asyncio.create_task(self._stream(worker, prompts, share, sampling, queue))
            for worker, share in zip(self._workers, shares, strict=True)
            if len(share)
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
            for task in tasks:
                task.cancel()

    async def _stream(
        self,
        worker: Any,
        prompts: PromptBatch,
        share: range,
        sampling: SamplingParameters,
        queue: asyncio.Queue[Any],
    ) -> None:
        part = PromptBatch(
            batch_id=prompts.batch_id,
            prompts=prompts.prompts[share.start : share.stop],
            group_ids=prompts.group_ids[share.start : share.stop],
        )
        try:
            stream = worker.generate.options(num_returns="streaming").remote(
                part, share.start, sampling
            )
            while (head := await anext(stream, None)) is not None:
                index, tokens = await head
                rollouts = await anext(stream)
                await queue.put(
                    RolloutPart(prompt_index=index, num_response_tokens=tokens, rollouts=rollouts)
                )
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    async def metrics(self) -> dict[str, Metric]:
        """Peak memory over the workers."""
        return combine(await asyncio.gather(*(worker.metrics.remote() for worker in self._workers)))


def _even_shares(count: int, workers: int) -> list[range]:
    """Consecutive ranges whose sizes differ by at most one."""
    bounds = [count * i // workers for i in range(workers + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]
