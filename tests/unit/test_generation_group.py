"""The generation group answers each prompt once, whichever workers die, with present weights."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlsys.config import GenerationConfig, RunConfig
from rlsys.data.batches import PromptBatch, SamplingParameters
from rlsys.driver.faults import FaultLog
from rlsys.driver.ports import GenerationSlot, WeightSyncError, WorkerDiedError
from rlsys.models.weights import StoredWeights, WeightManifest
from rlsys.run.fault_events import Fault
from tests.support.killed_actors import FakeActor, supervised_fake
from tests.support.rollout_examples import rollouts
from workers.generation.group import GenerationGroup
from workers.supervision import ActorPool, TooManyDeathsError
from workers.weight_sync.synchronizer import EngineWeightSync

SAMPLING = SamplingParameters(
    samples_per_prompt=1,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    min_tokens=0,
    max_tokens=4,
    stop=(),
    seed=5,
)


def prompts(count: int) -> PromptBatch:
    """Return `count` prompts."""
    return rollouts([([i + 1], [[1]]) for i in range(count)], batch_id=3).prompts


class Engine:
    """A generation worker: the weights are one number, and responses name prompt and weights."""

    def __init__(self) -> None:
        self.weights, self.version = 0.0, -1

    def generate(
        self,
        own: PromptBatch,
        positions: Sequence[int],
        sampling: SamplingParameters,
        version: int | None,
    ) -> Iterator[Any]:
        assert version in (None, self.version), f"{self.version} is installed, not {version}"
        # The last prompt is finished first, as with engines that batch continuously.
        pairs = list(zip(own.prompts, own.group_ids.tolist(), positions, strict=True))
        for prompt, group, position in reversed(pairs):
            yield (prompt.problem_id, group, own.batch_id, self.weights)
            yield (position, 10 + position)

    def install_weights(self, stored: StoredWeights) -> None:
        self.weights, self.version = stored.parts[0], stored.manifest.version

    def probe_logprobs(self, probe: Any) -> list[np.ndarray]:
        return [np.full(3, self.weights, dtype=np.float32)]

    def differing_weights(self, stored: StoredWeights) -> list[str]:
        return []

    def metrics(self) -> dict:
        return {}


Fates = list[dict[str, list[int | None]]]


def pool_of(*fates: Fates, faults: FaultLog | None = None) -> tuple[ActorPool, list[list[Engine]]]:
    """Return a pool with a worker for each of `fates`, and the engines of each worker.

    `fates[worker][n]` are those of the n-th process of a worker; later ones live.
    """
    engines: list[list[Engine]] = [[] for _ in fates]

    def start(worker: int, number: int) -> FakeActor:
        engines[worker].append(Engine())
        own = fates[worker]
        return FakeActor(engines[worker][-1], own[number] if number < len(own) else {})

    members = [
        supervised_fake(
            lambda number, worker=worker: start(worker, number),
            name=f"generation worker {worker}",
            faults=faults,
        )
        for worker in range(len(fates))
    ]
    return ActorPool(members), engines


async def answers(group: GenerationGroup, batch: PromptBatch) -> dict[int, Any]:
    """Generate, and return the record of each prompt; every prompt must come once."""
    found: dict[int, Any] = {}
    async for part in group.generate(batch, SAMPLING):
        assert part.prompt_index not in found
        assert part.num_response_tokens == 10 + part.prompt_index
        found[part.prompt_index] = await part.rollouts
    return found


def expected(count: int, weights: float = 0.0) -> dict[int, Any]:
    """Return the records of all prompts."""
    return {i: (f"p{i}", i, 3, weights) for i in range(count)}


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("passed", range(7))
async def test_each_prompt_has_one_part_wherever_a_worker_dies(workers: int, passed: int):
    """Kill the first worker after `passed` items of its stream, also between the two of a part."""
    faults = FaultLog()
    fates: list[Fates] = [[{"generate": [passed]}], *([[]] * (workers - 1))]
    pool, _ = pool_of(*fates, faults=faults)
    assert await asyncio.wait_for(answers(GenerationGroup(pool), prompts(12)), 10) == expected(12)
    assert faults.metrics()["faults/generation_worker"] == 1


async def test_all_workers_may_die_at_once_and_again():
    faults = FaultLog()
    twice: Fates = [{"generate": [1]}, {"generate": [2]}]
    pool, _ = pool_of(twice, twice, twice, faults=faults)
    assert await asyncio.wait_for(answers(GenerationGroup(pool), prompts(9)), 10) == expected(9)
    assert faults.metrics()["faults/generation_worker"] == 6


async def test_the_event_says_where_the_prompts_go():
    faults, seen = FaultLog(), list[Fault]()
    faults.listen(seen.append)
    pool, _ = pool_of([{"generate": [2]}], [], faults=faults)
    await answers(GenerationGroup(pool), prompts(6))
    alone, _ = pool_of([{"generate": [4]}], faults=faults)
    await answers(GenerationGroup(alone), prompts(3))
    assert [fault.action for fault in seen] == [
        "its unfinished prompts (2) go to the other workers, and it is restarted",
        "its unfinished prompts (1) wait for a worker, and it is restarted",
    ]


async def test_workers_that_live_get_equal_shares():
    """Without a death the first worker gets the first half, as a single request."""
    pool, _ = pool_of([], [])
    await answers(GenerationGroup(pool), prompts(5))
    requests = [member.present.calls for member in pool.members]
    assert [[arguments[1] for _, arguments in calls] for calls in requests] == [
        [(0, 1)],
        [(2, 3, 4)],
    ]


async def test_a_prompt_that_kills_every_worker_ends_the_run():
    fatal: Fates = [{"generate": [0]}] * 9
    pool, _ = pool_of(fatal, fatal)
    with pytest.raises(TooManyDeathsError, match="died 3 times without progress in the same way"):
        await asyncio.wait_for(answers(GenerationGroup(pool), prompts(2)), 10)


async def test_an_error_of_the_engine_is_raised_and_restarts_nothing():
    faults = FaultLog()
    pool, engines = pool_of([], [], faults=faults)
    pool.version = 4  # no engine has it
    with pytest.raises(AssertionError, match="-1 is installed, not 4"):
        await answers(GenerationGroup(pool), prompts(4))
    assert set(faults.metrics().values()) == {0}
    assert [len(found) for found in engines] == [1, 1]


async def test_a_worker_that_leaves_out_a_prompt_is_an_error():
    class Lazy(Engine):
        def generate(self, own: Any, positions: Any, sampling: Any, version: Any) -> Iterator[Any]:
            yield from list(super().generate(own, positions, sampling, version))[2:]

    pool = ActorPool([supervised_fake(lambda number: FakeActor(Lazy()))])
    with pytest.raises(AssertionError, match=r"left out the prompts \[2\]"):
        await answers(GenerationGroup(pool), prompts(3))


class Trainer:
    """The policy's side of the sync; its weights are the version plus a half."""

    def __init__(self) -> None:
        self.exports = self.probes = 0
        self.kept: list[list[int]] = []  # versions that each export must keep
        self.released = asyncio.Event()
        self.released.set()
        self.weights = 0.0

    async def export_weights(
        self, version: int, keep: Sequence[StoredWeights] = ()
    ) -> StoredWeights:
        await self.released.wait()
        self.exports += 1
        self.kept.append([stored.manifest.version for stored in keep])
        self.weights = version + 0.5
        return StoredWeights(WeightManifest(version=version, buckets=()), [self.weights])

    async def probe_logprobs(self, sequences: Any, temperature: float) -> list[np.ndarray]:
        self.probes += 1
        return [np.full(3, self.weights, dtype=np.float32)]


def sync_of(pool: ActorPool, trainer: Trainer | None = None, **generation: Any) -> EngineWeightSync:
    """Return the sync between a trainer and the engines of a pool."""
    config = RunConfig(generation=GenerationConfig(**generation))
    return EngineWeightSync(trainer or Trainer(), pool, config, [np.arange(4, dtype=np.int32)])


async def test_a_restarted_worker_samples_with_the_present_weights():
    pool, engines = pool_of([{"generate": [None, 2]}], [])
    trainer = Trainer()
    sync, group = sync_of(pool, trainer), GenerationGroup(pool)
    for version in (0, 1):
        await sync.sync(version)
        assert await answers(group, prompts(6)) == expected(6, version + 0.5)

    await pool.members[0].ready()
    assert [engine.version for engine in engines[0]] == [1, 1]
    assert await answers(group, prompts(6)) == expected(6, 1.5)
    assert trainer.exports == 2, "the trainer must not be asked by a restart"
    # It was probed before it took part again.
    probed = [method for method, _ in pool.members[0].present.calls]
    assert probed == ["install_weights", "probe_logprobs", "generate"]


async def test_a_restart_during_a_sync_never_leaves_old_weights():
    """It becomes ready while the trainer still exports, and must wait for the new weights."""
    pool, engines = pool_of([{"generate": [0]}], [])
    trainer = Trainer()
    sync, group = sync_of(pool, trainer), GenerationGroup(pool)
    await sync.sync(0)

    trainer.released.clear()
    await answers(group, prompts(4))
    syncing = asyncio.create_task(sync.sync(1))
    for _ in range(20):
        await asyncio.sleep(0)
    trainer.released.set()
    await syncing
    await pool.members[0].ready()
    assert engines[0][-1].version == engines[1][-1].version == 1
    assert await answers(group, prompts(4)) == expected(4, 1.5)


@pytest.mark.parametrize("method", ["install_weights", "probe_logprobs"])
@pytest.mark.parametrize("workers", [1, 2])
async def test_a_worker_may_die_in_a_sync(method: str, workers: int):
    pool, engines = pool_of([{method: [0]}], *([[]] * (workers - 1)))
    sync, group = sync_of(pool), GenerationGroup(pool)
    report = await asyncio.wait_for(sync.sync(0), 10)
    assert report["sync/logprob_difference_mean"].value == 0
    assert await asyncio.wait_for(answers(group, prompts(5)), 10) == expected(5, 0.5)
    await pool.members[0].ready()
    assert engines[0][-1].version == 0


async def test_a_restarted_worker_that_fails_the_probe_ends_the_run():
    class Stale(Engine):
        def install_weights(self, stored: StoredWeights) -> None:
            self.version = stored.manifest.version

    def start(number: int) -> FakeActor:
        return FakeActor(Stale() if number else Engine(), {} if number else {"generate": [0]})

    pool = ActorPool([supervised_fake(start)])
    await sync_of(pool).sync(0)
    with pytest.raises(WeightSyncError, match=r"a restarted worker and the trainer differ by 0\.5"):
        await asyncio.wait_for(answers(GenerationGroup(pool), prompts(2)), 10)


async def take(slot: GenerationSlot, first: int, count: int) -> dict[int, tuple[Any, int]]:
    """Let one worker sample some prompts; return record and version by position."""
    whole = prompts(first + count)
    own = PromptBatch(batch_id=3, prompts=whole.prompts[first:], group_ids=whole.group_ids[first:])
    positions = tuple(range(first, first + count))
    return {
        part.part.prompt_index: (await part.part.rollouts, part.weight_version)
        async for part in slot.generate(own, positions, SAMPLING)
    }


async def test_a_group_has_the_version_of_the_weights_that_were_published_last():
    """Between the call of a publication and its end, a worker gets a group: under the new weights.

    An actor takes calls in their order, as the fakes do.
    """
    pool, _ = pool_of([], [])
    sync, (first, second) = sync_of(pool), GenerationGroup(pool).slots()
    await sync.sync(0)
    assert await take(first, 2, 2) == {
        2: (("p2", 2, 3, 0.5), 0),
        3: (("p3", 3, 3, 0.5), 0),
    }
    installed = await sync.publish(1)
    assert await take(second, 4, 1) == {4: (("p4", 4, 3, 1.5), 1)}
    assert set(await installed) >= {"sync/bytes", "sync/logprob_difference_mean"}


async def test_a_slot_whose_worker_dies_says_so_and_is_ready_with_present_weights():
    faults = FaultLog()
    pool, _ = pool_of([{"generate": [2]}], [], faults=faults)
    sync, (slot, _) = sync_of(pool), GenerationGroup(pool).slots()
    await sync.sync(0)
    with pytest.raises(WorkerDiedError, match="generation worker 0 died"):
        await take(slot, 0, 3)
    assert faults.metrics()["faults/generation_worker"] == 1

    await (await sync.publish(1))
    await asyncio.wait_for(slot.ready(), 10)
    assert await take(slot, 1, 1) == {1: (("p1", 1, 3, 1.5), 1)}


async def test_an_engine_with_other_weights_fails_the_publication_and_not_the_trainer():
    class Stale(Engine):
        def install_weights(self, stored: StoredWeights) -> None:
            self.version = stored.manifest.version

    pool = ActorPool([supervised_fake(lambda number: FakeActor(Stale()))])
    installed = await sync_of(pool).publish(0)
    with pytest.raises(WeightSyncError, match=r"worker 0 and the trainer differ by 0\.5"):
        await installed


async def test_workers_report_while_one_restarts():
    faults = FaultLog()
    pool, engines = pool_of([{"metrics": [0]}], [], faults=faults)
    assert await GenerationGroup(pool).metrics() == {}
    assert faults.metrics()["faults/generation_worker"] == 1
    await pool.members[0].ready()
    assert [len(found) for found in engines] == [2, 1]


async def test_a_probe_may_be_made_after_some_syncs_only():
    pool, _ = pool_of([], [])
    trainer = Trainer()
    sync = sync_of(pool, trainer, probe_every=3)
    probed = ["time/sync_probe" in await sync.sync(version) for version in range(7)]
    assert probed == [True, False, False, True, False, False, True]
    assert trainer.probes == 3
    for member in pool.members:
        assert [name for name, _ in member.present.calls].count("probe_logprobs") == 3


async def test_without_a_tolerance_nothing_is_probed():
    pool, _ = pool_of([])
    trainer = Trainer()
    report = await sync_of(pool, trainer, logprob_difference_tolerance=0.0).sync(0)
    assert "time/sync_probe" not in report
    assert not trainer.probes


async def test_the_sync_after_an_unproven_restart_is_probed():
    pool, engines = pool_of([{"generate": [None, 2]}], [])
    trainer = Trainer()
    sync, group = sync_of(pool, trainer, probe_every=100), GenerationGroup(pool)
    await sync.sync(0)
    await answers(group, prompts(6))
    assert "time/sync_probe" not in await sync.sync(1)
    await answers(group, prompts(6))  # a worker dies; version 1 has no probe
    await pool.members[0].ready()
    assert engines[0][-1].version == 1
    assert "time/sync_probe" in await sync.sync(2)
    assert "time/sync_probe" not in await sync.sync(3)


async def test_weights_that_a_restarted_worker_still_reads_are_kept():
    class Slow(FakeActor):
        """Installs weights when it is released."""

        def __getattr__(self, method: str) -> Any:
            if method != "install_weights":
                return super().__getattr__(method)
            return SimpleNamespace(remote=self._later)

        async def _later(self, stored: StoredWeights) -> None:
            began.set()
            await released.wait()
            self.target.install_weights(stored)

    began, released = asyncio.Event(), asyncio.Event()
    made = [FakeActor(Engine(), {"generate": [0]}), Slow(Engine())]
    pool = ActorPool([supervised_fake(lambda number: made[number]), FakeActor(Engine())])
    trainer = Trainer()
    sync, group = sync_of(pool, trainer), GenerationGroup(pool)
    await sync.sync(0)
    await answers(group, prompts(4))
    await began.wait()
    await sync.sync(1)
    released.set()
    await pool.members[0].ready()
    assert made[1].target.version == 1
    await sync.sync(2)
    assert trainer.kept == [[], [0], []]
