"""The asynchronous training loop: generation runs ahead of training.

    prompts --> queue --one group at a time--> free workers --> score --> queue --P groups--> train
                  ^                                 ^                                           |
                  |                                 +----------- weights, version v + 1 <-------+
                  +------------------- room for P further groups <------------------------------+

A step is that of the synchronous loop, with another source of samples and a sync that does not
wait for the engines. Each worker gets a group when it has finished one, so that the longest
response holds up one worker and not the batch. Weights reach a worker between two of its groups
(drain): what it is sampling is finished under the old ones, and what it gets next is sampled under
the new ones. So all tokens of a group have one weight version, and `rollout_logprobs` are those of
that version. `old` are the trainer's weights at the start of the update, as in the synchronous
loop.

`rlsys.driver.group_queue` says which groups are started and taken, and how old they may be.

All times come from the session's clock, and all waiting is asyncio's, so the loop also runs in
simulated time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rlsys.config import RunConfig
from rlsys.data.batches import PromptBatch, RewardBatch
from rlsys.driver.group_queue import FinishedGroup, GroupQueue, QueueLimits, TakenGroups, Ticket
from rlsys.driver.ports import (
    ExampleSource,
    GenerationSlot,
    PromptSource,
    VersionedPart,
    WorkerDiedError,
    Workers,
)
from rlsys.driver.sampling import SampledGroups, Sampler
from rlsys.driver.session import HasState, Session
from rlsys.driver.synchronous_loop import SynchronousLoop
from rlsys.metrics import MetricMap, combine, maximum, mean, total


class Dispatcher:
    """The part of the loop that keeps the workers busy, beside the trainer."""

    def __init__(
        self,
        queue: GroupQueue,
        slots: Sequence[GenerationSlot],
        sampler: Sampler,
        groups_per_call: int,
        clock: Callable[[], float],
    ) -> None:
        """Create a dispatcher; `groups_per_call` is how many groups a worker gets at a time."""
        self._queue = queue
        self._slots = slots
        self._sampler = sampler
        self._groups_per_call = groups_per_call
        self._clock = clock
        self._idle: deque[asyncio.Future[list[Ticket]]] = deque()  # workers, the longest idle first
        self._idle_s = 0.0
        self._idle_since: dict[asyncio.Future[list[Ticket]], float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._error: BaseException | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep the workers busy while the body runs; what they are sampling then is abandoned."""
        for slot in self._slots:
            self._spawn(self._serve(slot))
        try:
            yield
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def take(self) -> TakenGroups:
        """Wait until there are enough groups for a step, and return them.

        Raises:
            Exception: the first error of a worker or a reward.
        """
        while True:
            if self._error is not None:
                raise self._error
            if self._queue.is_full:
                break
            self._changed.clear()
            await self._changed.wait()
        taken = self._queue.take()
        self.wake()
        return taken

    def wake(self) -> None:
        """Give prompts to idle workers, as far as there is room."""
        while self._idle:
            if self._idle[0].done():  # cancelled at the end
                self._idle.popleft()
                continue
            tickets = self._queue.start(self._groups_per_call)
            if not tickets:
                return
            self._idle.popleft().set_result(tickets)

    def take_idle_seconds(self) -> float:
        """Return the seconds for which a worker had nothing to do since the last call, as a mean.

        A worker that is restarted does not count as idle.
        """
        now = self._clock()
        seconds = self._idle_s + sum(now - since for since in self._idle_since.values())
        self._idle_s = 0.0
        self._idle_since = dict.fromkeys(self._idle_since, now)
        return seconds / len(self._slots)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Keep the first error for the trainer, which raises it."""
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._error = self._error or task.exception()
            self._changed.set()

    async def _serve(self, slot: GenerationSlot) -> None:
        """Let one worker sample group after group."""
        while True:
            await slot.ready()
            tickets = await self._next_tickets()
            if slot.is_ready:
                await self._sample(slot, tickets)
            else:  # it died while it waited, and its restart may wait for a place without a limit
                self._give_back(tickets)

    async def _next_tickets(self) -> list[Ticket]:
        """Wait for prompts; the worker that waits longest gets the next ones."""
        given = asyncio.get_running_loop().create_future()
        self._idle.append(given)
        self._idle_since[given] = self._clock()
        self.wake()
        try:
            return await given
        finally:
            self._idle_s += self._clock() - self._idle_since.pop(given)

    async def _sample(self, slot: GenerationSlot, tickets: Sequence[Ticket]) -> None:
        """Let a worker sample some prompts of one batch of the stream."""
        batch_id, attempt = tickets[0].seeded_as
        left = {ticket.position: ticket for ticket in tickets}
        parts = slot.generate(
            _joined(tickets), tuple(left), self._sampler.training_parameters(batch_id, attempt)
        )
        try:
            async for part in parts:
                ticket = left.pop(part.part.prompt_index)
                self._spawn(self._score(ticket, part))
        except WorkerDiedError:
            self._give_back(left.values())
            return
        # A prompt that is lost would silently bias the update.
        assert not left, f"a generation worker left out the prompts {sorted(left)}"

    def _give_back(self, tickets: Iterable[Ticket]) -> None:
        """Let another worker sample prompts."""
        self._queue.give_back(tickets)
        self.wake()

    async def _score(self, ticket: Ticket, part: VersionedPart) -> None:
        """Wait for the rewards of a group, and let the trainer have it."""
        group = self._sampler.scored(part.part)
        rewards: RewardBatch = await group.rewards
        self._queue.finish(
            FinishedGroup(
                ticket=ticket,
                group=group,
                weight_version=part.weight_version,
                has_signal=self._sampler.keeps(rewards),
            )
        )
        self._changed.set()
        self.wake()  # a group that is too old makes room


class AsynchronousLoop(SynchronousLoop):
    """Training of one policy on samples that are at most `trainer.max_staleness` versions old."""

    def __init__(
        self,
        config: RunConfig,
        workers: Workers,
        prompts: PromptSource,
        sampler: Sampler,
        session: Session,
        rollouts_directory: Path,
        texts: ExampleSource | None = None,
    ) -> None:
        """See `SynchronousLoop`."""
        trainer, concurrent = config.trainer, workers.concurrent
        assert concurrent is not None, "the generation group can be used beside training"
        limits = QueueLimits(
            steps=trainer.steps,
            prompts_per_step=trainer.prompts_per_step,
            max_staleness=trainer.max_staleness,
            on_stale=trainer.asynchronous.on_stale,
            max_rounds=config.algorithm.dynamic_sampling.max_rounds,
        )
        self._queue = GroupQueue(prompts, limits)
        super().__init__(config, workers, prompts, sampler, session, rollouts_directory, texts)
        groups_per_call = trainer.asynchronous.groups_per_call
        self._dispatcher = Dispatcher(
            self._queue, concurrent.slots, sampler, groups_per_call, session.now
        )
        self._publisher = concurrent.publisher
        # The oldest first; each ends when all workers have installed its version.
        self._installations: deque[asyncio.Future[MetricMap]] = deque()
        self._generator_report: asyncio.Future[MetricMap] | None = None

    def _resumable_prompts(self) -> HasState:
        """See `SynchronousLoop`: prompts that are not trained yet come again."""
        return self._queue

    async def _train(self) -> None:
        session = self._session
        with session.phase("sync"):
            await self._workers.weights.sync(session.step)
        await session.evaluate_if_due()
        self._queue.begin(session.step)
        try:
            async with self._dispatcher.running():
                while session.goes_on():
                    await session.end_step(await self._train_step())
            if session.step >= self._config.trainer.steps:
                await asyncio.gather(*self._installations)  # the last weights are verified too
        finally:
            for task in (*self._installations, self._generator_report):
                if task is not None:
                    task.cancel()

    async def _train_step(self) -> dict[str, float]:
        """See `SynchronousLoop`."""
        numbers = await super()._train_step()
        # Tokens are sampled all the time, not while the trainer waits for them.
        del numbers["throughput/generate"]
        idle = self._dispatcher.take_idle_seconds()
        return {
            **numbers,
            "idle/trainer": numbers["time/generate"],
            "idle/generation": idle,
        }

    async def _sample_step(self, step: int) -> SampledGroups:
        """Wait for the groups of a step."""
        taken = await self._dispatcher.take()
        ages = [self._queue.age(finished) for finished in taken.groups]
        metrics = {
            "staleness/mean": mean(sum(ages) / len(ages), len(ages)),
            "staleness/max": maximum(max(ages)),
            "staleness/dropped_groups": total(len(taken.stale)),
            "queue/ready_groups": total(taken.ready),
            "queue/running_groups": total(taken.running),
        }
        if self._config.algorithm.dynamic_sampling.max_rounds > 1:
            sampled = len(taken.groups) + len(taken.replaced)
            metrics |= {
                "sampling/rounds": total(sampled / len(taken.groups)),
                "sampling/replaced_groups": total(len(taken.replaced)),
                "sampling/missing_groups": total(taken.fillers),
            }
        return SampledGroups(
            kept=[finished.group for finished in taken.groups],
            dropped=[finished.group for finished in (*taken.stale, *taken.replaced)],
            metrics=metrics,
        )

    async def _sync_weights(self, step: int) -> MetricMap:
        """Publish the weights, and return the metrics of the installations that have ended.

        The trainer goes on while workers finish their groups under older weights; but not more than
        `max_staleness` versions ahead of the slowest, each of which lies in the object store.
        """
        self._installations.append(asyncio.ensure_future(await self._publisher.publish(step)))
        self._queue.advance(step)
        self._dispatcher.wake()

        ended: list[MetricMap] = []
        ahead = self._config.trainer.max_staleness
        while len(self._installations) > ahead or (
            self._installations and self._installations[0].done()
        ):
            ended.append(await self._installations.popleft())
        return combine(ended)

    async def _memory(self) -> list[MetricMap]:
        """Return what the workers report, the generation workers when they get to it.

        They answer between two groups, and the trainer does not wait for that.
        """
        generator = self._workers.generator
        others = [one for one in self._workers.reporting if one is not generator]
        reports = await asyncio.gather(*(worker.metrics() for worker in others))

        report = self._generator_report
        if report is None or report.done():
            self._generator_report = asyncio.ensure_future(generator.metrics())
        return [*reports, report.result()] if report is not None and report.done() else reports


def _joined(tickets: Sequence[Ticket]) -> PromptBatch:
    """Return the prompts of tickets of one batch of the stream."""
    return PromptBatch(
        batch_id=tickets[0].prompt.batch_id,
        prompts=tuple(prompt for ticket in tickets for prompt in ticket.prompt.prompts),
        group_ids=np.concatenate([ticket.prompt.group_ids for ticket in tickets]),
    )
