"""The generation group: it spreads prompts over workers and returns parts as they finish."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from rlsys.data.batches import PromptBatch, SamplingParameters
from rlsys.driver.ports import GenerationSlot, RolloutPart, VersionedPart, WorkerDiedError
from rlsys.metrics import Metric, combine
from workers.supervision import ActorPool, SupervisedActor, as_pool, is_death


class GenerationGroup:
    """The `ports.Generator` over supervised actors of `GenerationWorker`.

    Where a worker dies, the prompts that it has not answered go to the others, or wait for the
    first that is ready again. A response depends on the seed, the prompt and its position in the
    batch (`RolloutEngine`), so with the same weights it is the same from any worker.
    """

    def __init__(self, workers: ActorPool | Sequence[SupervisedActor | Any]) -> None:
        self._pool = as_pool(workers)

    async def generate(
        self, prompts: PromptBatch, sampling: SamplingParameters
    ) -> AsyncIterator[RolloutPart]:
        """Split the prompts evenly over the workers and yield each group when it is finished."""
        work = _OpenWork(prompts, self._pool.num_ready or len(self._pool))
        tasks = [
            asyncio.create_task(self._serve(worker, work, sampling))
            for worker in self._pool.members
        ]
        try:
            async for part in work.finished_parts():
                yield part
        finally:
            # The driver may stop early, and an error of one worker ends all streams.
            for task in tasks:
                task.cancel()

    async def _serve(
        self, worker: SupervisedActor, work: _OpenWork, sampling: SamplingParameters
    ) -> None:
        """Let one worker take pieces of the work until all of it is done."""
        try:
            while True:
                actor = await worker.ready()
                positions = await work.take()
                try:
                    await self._stream(actor, work, positions, sampling)
                except Exception as error:
                    if not is_death(error):
                        raise
                    others = sum(one.is_ready for one in self._pool.members if one is not worker)
                    left = work.give_back(positions, pieces=max(1, others))
                    worker.died(actor, error, _next_steps(left, others))
        except Exception as error:
            work.fail(error)

    async def _stream(
        self,
        actor: Any,
        work: _OpenWork,
        positions: Sequence[int],
        sampling: SamplingParameters,
    ) -> None:
        """Generate the prompts at `positions` on one worker."""
        stream = actor.generate.options(num_returns="streaming").remote(
            work.prompts_at(positions), positions, sampling, self._pool.version
        )
        async for part in _parts(stream):
            work.finish(part)
        work.check_finished(positions)

    def slots(self) -> list[GenerationSlot]:
        """Return the workers one by one, for a driver that gives out the groups itself."""
        return [WorkerSlot(worker, self._pool) for worker in self._pool.members]

    async def metrics(self) -> dict[str, Metric]:
        """Return the peak memory over the workers that are not restarting."""
        return combine([report for _, report in await self._pool.ask("metrics")])


class WorkerSlot:
    """The `ports.GenerationSlot` of one supervised actor."""

    def __init__(self, worker: SupervisedActor, pool: ActorPool) -> None:
        self._worker = worker
        self._pool = pool

    @property
    def is_ready(self) -> bool:
        """See `ports.GenerationSlot`."""
        return self._worker.is_ready

    async def ready(self) -> None:
        """See `ports.GenerationSlot`."""
        await self._worker.ready()

    async def generate(
        self, prompts: PromptBatch, positions: Sequence[int], sampling: SamplingParameters
    ) -> AsyncIterator[VersionedPart]:
        """See `ports.GenerationSlot`."""
        actor = await self._worker.ready()
        # The actor takes calls in their order, so it has these weights when it comes to this one.
        version = self._pool.version
        assert version is not None, "weights are published before anything is sampled"
        stream = actor.generate.options(num_returns="streaming").remote(
            prompts, positions, sampling, version
        )
        try:
            async for part in _parts(stream):
                yield VersionedPart(part=part, weight_version=version)
        except Exception as error:
            if not is_death(error):
                raise
            action = "its unfinished prompts go to the next free worker, and it is restarted"
            self._worker.died(actor, error, action)
            raise WorkerDiedError(f"{self._worker.name} died") from error


async def _parts(stream: Any) -> AsyncIterator[RolloutPart]:
    """Yield the parts of a stream of a generation worker."""
    # The items alternate: a reference that is passed on, and a small one that is fetched.
    async for rollouts in stream:
        try:
            head = await anext(stream)
        except StopAsyncIteration:
            await rollouts  # the last item of a stream that failed is its error
            raise
        position, tokens = await head
        yield RolloutPart(prompt_index=position, num_response_tokens=tokens, rollouts=rollouts)


class _OpenWork:
    """The prompts of one batch that have no response yet."""

    def __init__(self, prompts: PromptBatch, pieces: int) -> None:
        self._prompts = prompts
        self._open = deque(_even_parts(range(len(prompts)), pieces))
        self._unfinished = set(range(len(prompts)))
        self._more = asyncio.Event()
        self._results: asyncio.Queue[RolloutPart | BaseException] = asyncio.Queue()

    async def finished_parts(self) -> AsyncIterator[RolloutPart]:
        """Yield each part once, when it is finished.

        Raises:
            Exception: the first error of a worker.
        """
        for _ in range(len(self._prompts)):
            item = await self._results.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    async def take(self) -> tuple[int, ...]:
        """Return the positions of the next piece; where there is none, wait for one."""
        while not self._open:
            self._more.clear()
            await self._more.wait()
        return self._open.popleft()

    def give_back(self, positions: Sequence[int], pieces: int) -> int:
        """Offer the unfinished prompts of a piece again, and return how many there are."""
        left = [position for position in positions if position in self._unfinished]
        self._open.extend(_even_parts(left, pieces))
        self._more.set()
        return len(left)

    def finish(self, part: RolloutPart) -> None:
        """Pass on a part; each prompt has one."""
        # A prompt that counts twice would silently bias the update.
        assert part.prompt_index in self._unfinished, f"prompt {part.prompt_index} came twice"
        self._unfinished.remove(part.prompt_index)
        self._results.put_nowait(part)

    def check_finished(self, positions: Sequence[int]) -> None:
        """Assert that a worker that is done has answered all of its prompts."""
        missing = self._unfinished.intersection(positions)
        assert not missing, f"a generation worker left out the prompts {sorted(missing)}"

    def fail(self, error: BaseException) -> None:
        """End the work with an error."""
        self._results.put_nowait(error)

    def prompts_at(self, positions: Sequence[int]) -> PromptBatch:
        """Return some of the prompts."""
        return PromptBatch(
            batch_id=self._prompts.batch_id,
            prompts=tuple(self._prompts.prompts[position] for position in positions),
            group_ids=self._prompts.group_ids[np.asarray(positions, dtype=np.int64)],
        )


def _next_steps(unfinished: int, others: int) -> str:
    """Describe what happens with the prompts of a worker that died."""
    if not unfinished:
        return "it is restarted"
    goes = "go to the other workers" if others else "wait for a worker"
    return f"its unfinished prompts ({unfinished}) {goes}, and it is restarted"


def _even_parts(items: Sequence[int], parts: int) -> list[tuple[int, ...]]:
    """Split into at most `parts` consecutive parts, not empty, whose sizes differ by at most 1."""
    bounds = [len(items) * i // parts for i in range(parts + 1)]
    ranges = itertools.pairwise(bounds)
    return [tuple(items[start:stop]) for start, stop in ranges if stop > start]
