"""The other side of the driver's ports, with nothing but durations.

The loops are the real ones. Here a response is a length, a record is empty, and work is a sleep in
simulated time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlsys.data.batches import Prompt, PromptBatch, RewardBatch, RolloutBatch, SamplingParameters
from rlsys.data.prompt_stream import PromptStream
from rlsys.driver.background_save import Written
from rlsys.driver.ports import (
    ConcurrentGeneration,
    CreditedBatch,
    Handle,
    RolloutPart,
    StepHandles,
    VersionedPart,
    WorkerDiedError,
    Workers,
)
from rlsys.metrics import Metric, total
from rlsys.simulate.engine import SimulatedEngine
from rlsys.simulate.scenario import Scenario, Workload


@dataclass(frozen=True)
class Tokens:
    """A handle of a record of which only the number of response tokens is known."""

    count: int

    def __await__(self) -> Generator[Any, None, Any]:
        raise AssertionError("the driver opened a large record")
        yield


def no_rewards() -> RewardBatch:
    """Return the rewards of a simulated group: none, since nothing reads them."""
    empty = np.zeros(0, dtype=np.float32)
    return RewardBatch(
        batch_id=0,
        rewards=empty,
        accuracies=empty,
        components={},
        reasons=(),
        extracted_answers=(),
    )


class SimulatedWorker:
    """A `ports.GenerationSlot`: one engine, which may die and be restarted."""

    def __init__(self, scenario: Scenario, number: int, versions: Versions) -> None:
        self._scenario = scenario
        self._versions = versions
        self._random = np.random.default_rng((scenario.seed, 1, number))
        self.engine = SimulatedEngine(scenario.engine)
        self._ready = asyncio.Event()
        self._ready.set()
        self._free = asyncio.Event()
        self._free.set()
        self.deaths = 0
        self._fate: asyncio.Task[None] | None = None
        if scenario.failures is not None:
            self._fate = asyncio.create_task(self._die_and_restart())

    async def _die_and_restart(self) -> None:
        failures = self._scenario.failures
        assert failures is not None
        while True:
            await asyncio.sleep(self._random.exponential(failures.mean_s))
            self.deaths += 1
            self._ready.clear()
            self.engine.fail(WorkerDiedError("the law of failures says so"))
            await asyncio.sleep(failures.restart_s)
            self._ready.set()

    def end(self) -> None:
        """Let it die no more, at the end of the run."""
        if self._fate is not None:
            self._fate.cancel()

    @property
    def is_ready(self) -> bool:
        """See `ports.GenerationSlot`."""
        return self._ready.is_set()

    async def ready(self) -> None:
        """See `ports.GenerationSlot`."""
        await self._ready.wait()

    async def free(self) -> None:
        """Wait until it samples nothing, as new weights do."""
        await self._free.wait()

    async def generate(
        self, prompts: PromptBatch, positions: Sequence[int], sampling: SamplingParameters
    ) -> AsyncIterator[VersionedPart]:
        """See `ports.GenerationSlot`."""
        version = self._versions.newest
        self._free.clear()
        groups = [
            asyncio.ensure_future(self._group(int(group), position, sampling))
            for group, position in zip(prompts.group_ids, positions, strict=True)
        ]
        try:
            for finished in asyncio.as_completed(groups):
                yield VersionedPart(part=await finished, weight_version=version)
        finally:
            for group in groups:
                group.cancel()
            self._free.set()

    async def _group(self, group: int, position: int, sampling: SamplingParameters) -> RolloutPart:
        """Sample the responses to one prompt; their lengths depend on the prompt and the seed."""
        lengths = self._scenario.workload.lengths.draw(
            np.random.default_rng((self._scenario.seed, 2, group, sampling.seed)),
            sampling.samples_per_prompt,
        )
        await self.engine.generate(lengths.tolist())
        tokens = int(lengths.sum())
        return RolloutPart(
            prompt_index=position, num_response_tokens=tokens, rollouts=Tokens(tokens)
        )


@dataclass
class Versions:
    """The newest weights that workers are given."""

    newest: int = 0


class SimulatedGenerator:
    """A `ports.Generator`: prompts are divided evenly, and given again where a worker dies."""

    def __init__(self, workers: Sequence[SimulatedWorker]) -> None:
        self._workers = workers

    async def generate(
        self, prompts: PromptBatch, sampling: SamplingParameters
    ) -> AsyncIterator[RolloutPart]:
        """See `ports.Generator`."""
        results: asyncio.Queue[RolloutPart] = asyncio.Queue()
        pieces: asyncio.Queue[list[int]] = asyncio.Queue()
        for piece in np.array_split(np.arange(len(prompts)), len(self._workers)):
            if len(piece):
                pieces.put_nowait(piece.tolist())

        async def serve(worker: SimulatedWorker) -> None:
            while True:
                await worker.ready()
                piece = await pieces.get()
                left = set(piece)
                try:
                    async for part in worker.generate(_at(prompts, piece), piece, sampling):
                        left.discard(part.part.prompt_index)
                        results.put_nowait(part.part)
                except WorkerDiedError:
                    pieces.put_nowait(sorted(left))

        tasks = [asyncio.create_task(serve(worker)) for worker in self._workers]
        try:
            for _ in range(len(prompts)):
                yield await results.get()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def metrics(self) -> dict[str, Metric]:
        return {}


def _at(prompts: PromptBatch, positions: Sequence[int]) -> PromptBatch:
    return PromptBatch(
        batch_id=prompts.batch_id,
        prompts=tuple(prompts.prompts[position] for position in positions),
        group_ids=prompts.group_ids[np.asarray(positions)],
    )


class SimulatedScorer:
    """A `ports.RewardScorer`: every response takes the same time, all at once."""

    def __init__(self, workload: Workload) -> None:
        self._seconds = workload.reward_s

    def score(self, rollouts: Handle[RolloutBatch]) -> Handle[RewardBatch]:
        """See `ports.RewardScorer`."""
        return asyncio.ensure_future(asyncio.sleep(self._seconds, no_rewards()))

    async def metrics(self) -> dict[str, Metric]:
        return {}


class SimulatedPolicy:
    """A `ports.Policy`: an update takes time for its tokens."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self.busy_s = 0.0
        self.tokens = 0

    async def logprobs(
        self, rollouts: Sequence[Handle[Any]], ref_hidden: Sequence[Handle[Any]] = ()
    ) -> Sequence[Handle[Any]]:
        """Return nothing: the seconds of the forward passes are part of those of the update."""
        return ()

    async def update(
        self,
        batch: Handle[Any],
        ref_hidden: Sequence[Handle[Any]] = (),
        texts: Handle[Any] | None = None,
    ) -> dict[str, Metric]:
        """See `ports.Policy`."""
        assert isinstance(batch, Tokens)
        seconds = self._workload.train_fixed_s + batch.count * self._workload.train_token_s
        await asyncio.sleep(seconds)
        self.busy_s += seconds
        self.tokens += batch.count
        return {"policy/tokens": total(batch.count)}

    async def text_loss(self, texts: Handle[Any]) -> dict[str, Metric]:
        return {}

    async def estimated_advantages(self) -> None:
        return None

    async def save(self, directory: Path) -> None:
        """Write nothing: there are no weights."""

    async def copy_state(self, directory: Path) -> Written:
        raise AssertionError("a simulated run saves its last step only, which is not copied")

    async def load(self, directory: Path) -> None:
        raise AssertionError("a simulated run is not resumed")


class SimulatedAdvantages:
    """A `ports.AdvantageComputer` that counts tokens."""

    async def credit(self, step: StepHandles) -> CreditedBatch:
        """See `ports.AdvantageComputer`."""
        tokens = sum(_count(handle) for handle in step.rollouts)
        dropped = sum(_count(handle) for handle in step.dropped_rollouts)
        metrics = {"rollout/tokens": total(tokens + dropped)}
        return CreditedBatch(batch=Tokens(tokens), metrics=metrics)  # pyright: ignore[reportArgumentType]

    async def state(self) -> dict[str, Any]:
        return {}

    async def load_state(self, state: dict[str, Any]) -> None:
        raise AssertionError("a simulated run is not resumed")

    async def write_rollouts(self, *_: Any, **__: Any) -> None:
        """Write nothing: there are no responses."""

    async def metrics(self) -> dict[str, Metric]:
        return {}


def _count(handle: Handle[Any]) -> int:
    assert isinstance(handle, Tokens)
    return handle.count


class SimulatedSync:
    """A `ports.WeightSync` and `ports.WeightPublisher` that takes a fixed time."""

    def __init__(
        self, workload: Workload, versions: Versions, workers: Sequence[SimulatedWorker]
    ) -> None:
        self._seconds = workload.sync_s
        self._versions = versions
        self._workers = workers

    async def sync(self, version: int) -> dict[str, Metric]:
        """See `ports.WeightSync`."""
        return await (await self.publish(version))

    async def publish(self, version: int) -> Awaitable[dict[str, Metric]]:
        """See `ports.WeightPublisher`."""
        await asyncio.sleep(self._seconds)
        self._versions.newest = version
        busy = [asyncio.ensure_future(worker.free()) for worker in self._workers]
        return asyncio.ensure_future(self._installed(busy))

    async def _installed(self, busy: Sequence[Awaitable[None]]) -> dict[str, Metric]:
        await asyncio.gather(*busy)
        return {}


@dataclass(frozen=True, kw_only=True)
class SimulatedCluster:
    """All parts of a simulated run."""

    workers: Workers
    engines: Sequence[SimulatedWorker]
    policy: SimulatedPolicy
    prompts: PromptStream


def build_cluster(scenario: Scenario) -> SimulatedCluster:
    """Return new parts; call it in the simulated event loop."""
    versions = Versions()
    engines = [SimulatedWorker(scenario, number, versions) for number in range(scenario.engines)]
    policy = SimulatedPolicy(scenario.workload)
    sync = SimulatedSync(scenario.workload, versions, engines)
    return SimulatedCluster(
        workers=Workers(
            generator=SimulatedGenerator(engines),
            scorer=SimulatedScorer(scenario.workload),
            policy=policy,
            reference=None,
            advantages=SimulatedAdvantages(),
            weights=sync,
            concurrent=ConcurrentGeneration(slots=engines, publisher=sync),
        ),
        engines=engines,
        policy=policy,
        prompts=_endless_prompts(scenario),
    )


def _endless_prompts(scenario: Scenario) -> PromptStream:
    """Return a stream of prompts without a text; lengths depend on their number in the stream."""
    prompt = Prompt(problem_id="0", token_ids=(0,), text="", problem="", ground_truth="")
    return PromptStream(
        (prompt,),
        prompts_per_step=scenario.workload.prompts_per_step,
        seed=scenario.seed,
        shuffle=False,
    )
