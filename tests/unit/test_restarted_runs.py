"""The command of a recipe over in-process workers that fail: it goes on, or ends with a reason."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError
from rich.console import Console

from recipes.prepared_run import Prepared, Started
from recipes.training import train
from rlsys.config import RunConfig
from rlsys.data.prompt_stream import PromptStream
from rlsys.driver import restarts
from rlsys.driver.evaluation import Evaluator
from rlsys.driver.faults import FaultLog
from rlsys.driver.sampling import Sampler
from rlsys.driver.synchronous_loop import SynchronousLoop
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.directory import RunDirectory
from rlsys.run.fault_events import read_faults
from rlsys.run.observers.console import Progress
from rlsys.run.observers.metrics_log import read_metrics
from rlsys.run.observers.run_status import StatusWriter, read_status
from rlsys.run.run_log import HeldLog
from tests.support.in_process_fakes import (
    Stage,
    held_out_prompts,
    in_process_workers,
    make_prompts,
)
from tests.support.in_process_runs import DEADLOCK_S, assert_same_metrics, make_config
from tests.support.prepared_fields import without_notes

Hook = Callable[[int], Awaitable[None]]  # gets the number of the update in the whole test, from 1


@dataclass
class FakeCluster:
    """A cluster without actors; it must be shut down before the next one connects."""

    faults: FaultLog | None = None
    actors: dict[str, Any] = field(default_factory=dict)
    supervised: dict[str, Any] = field(default_factory=dict)
    is_shut_down: bool = False

    def supervised_of(self, role: str) -> list[Any]:
        return []

    def shutdown(self) -> None:
        self.is_shut_down = True


@dataclass(frozen=True, kw_only=True)
class FakeRun(Prepared[RunConfig]):
    """A run whose workers live in this process; the prompts outlive them, as in a real one."""

    prompts: PromptStream
    hook: Hook
    updates: list[int] = field(default_factory=list)
    clusters: list[FakeCluster] = field(default_factory=list)

    def connect(self) -> Any:
        assert all(cluster.is_shut_down for cluster in self.clusters)
        self.clusters.append(FakeCluster())
        return self.clusters[-1]

    async def start(self, cluster: Any, status: StatusWriter, console: Console, faults: FaultLog):
        stage = Stage()

        async def update() -> None:
            self.updates.append(1)
            await self.hook(len(self.updates))

        stage.hooks = {"update": update}
        workers = in_process_workers(stage, self.config)
        sampler = Sampler(self.config, workers.generator, workers.scorer)
        evaluator = Evaluator(self.config, held_out_prompts(), sampler)
        session = self.open_session(Progress(console, live=False), status, evaluator, faults)
        loop = SynchronousLoop(
            self.config, workers, self.prompts, sampler, session, self.directory.rollouts
        )
        return Started(loop=loop, session=session)


def make_run(path: Path, config: RunConfig, hook: Hook, **trainer: object) -> FakeRun:
    trained = config.trainer.model_copy(update=trainer)
    config = config.model_copy(update={"trainer": trained})
    directory = RunDirectory(path)
    directory.create(config)
    return FakeRun(
        config=config,
        store=CheckpointStore(directory.checkpoints, keep=2),
        directory=directory,
        prompts=make_prompts(config),
        hook=hook,
        **without_notes(),
    )


async def finish(run: FakeRun, storage: FakeStorage | None = None) -> tuple[int, str]:
    """Return the exit code, and what the console showed."""
    console = Console(record=True, width=300)
    log = HeldLog(run.directory.log, held=False)
    code = await asyncio.wait_for(train(run, log, console, cast(Any, storage)), DEADLOCK_S)
    return code, console.export_text()


async def no_failure(update: int) -> None: ...


def dies_at(*updates: int) -> Hook:
    async def hook(update: int) -> None:
        if update in updates:
            raise ActorDiedError

    return hook


@pytest.fixture(autouse=True)
def quick_and_clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make no pauses, and restore the handlers of signals."""
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 0.0)
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("updates", "origins"),
    [
        ((6,), ["checkpoint"]),  # the checkpoint of step 4
        ((2,), ["the beginning"]),  # before the first checkpoint
        ((1, 3, 7, 9), ["the beginning", "the beginning", "checkpoint", "checkpoint"]),
    ],
)
async def test_a_run_that_was_hit_has_the_metrics_of_an_undisturbed_one(
    updates: tuple[int, ...], origins: list[str], tmp_path: Path
):
    config = make_config(steps=8, evaluate=2, save=2, kl=0.05, num_mini_batches=2, pass_at=2)
    whole, hit = (
        make_run(tmp_path / "whole", config, no_failure),
        make_run(tmp_path / "hit", config, dies_at(*updates)),
    )
    assert (await finish(whole))[0] == 0
    code, shown = await finish(hit)
    assert code == 0, shown
    assert_same_metrics(tmp_path / "whole", tmp_path / "hit")
    names = [{file.name for file in run.directory.rollouts.iterdir()} for run in (whole, hit)]
    assert names[0] == names[1]

    assert len(hit.clusters) == 1 + len(updates)
    faults = read_faults(hit.directory.faults)
    assert [fault.kind for fault in faults] == ["training_group"] * len(updates)
    for fault, origin in zip(faults, origins, strict=True):
        assert f"from {origin}" in fault.action
        assert shown.count(fault.line()) == 1
    train = [record for record in read_metrics(hit.directory.metrics) if record.kind == "train"]
    assert train[-1].values["faults/training_group"] == len(updates)
    status = read_status(hit.directory)
    assert status is not None
    assert (status.state, status.step) == ("finished", 8)
    assert len(list(hit.directory.failures.glob("*/error.txt"))) == len(updates)


class FakeStorage:
    """A storage that notes whether it copies, and that another process may have taken."""

    def __init__(self, *, is_lost: bool = False) -> None:
        self.is_lost = is_lost
        self.begun = False
        self.on_loss: Callable[[], object] = lambda: None

    def begin(self) -> None:
        self.begun = True


@dataclass(frozen=True, kw_only=True)
class LateRun(FakeRun):
    """A run of which an actor dies in the first start."""

    async def start(self, cluster: Any, status: StatusWriter, console: Console, faults: FaultLog):
        if len(self.clusters) == 1:
            raise ActorDiedError
        return await super().start(cluster, status, console, faults)


async def test_a_failure_of_the_first_start_leaves_nothing_out(tmp_path: Path):
    """The second one begins to store, and writes the changes of a resumed run."""
    first = make_run(tmp_path, make_config(steps=2), no_failure)
    fields = {one.name: getattr(first, one.name) for one in dataclasses.fields(first)}
    changed = first.config.trainer.model_copy(update={"max_restarts": 7})
    config = first.config.model_copy(update={"trainer": changed})
    run = LateRun(**fields | {"config": config, "resume": True})
    storage = FakeStorage()
    code, shown = await finish(run, storage)
    assert (code, len(run.clusters)) == (0, 2), shown
    assert storage.begun
    assert "max_restarts: 7" in run.directory.config.read_text()


async def test_a_storage_that_was_lost_before_the_loop_ends_the_run(tmp_path: Path):
    run = make_run(tmp_path, make_config(steps=4), no_failure)
    code, _ = await finish(run, FakeStorage(is_lost=True))
    assert code == 130
    assert not run.updates


@pytest.mark.parametrize("fails", [False, True])
def test_an_interrupt_while_no_actor_runs_is_in_the_status(fails: bool, tmp_path: Path):
    """In the first start, or in the one after a failure."""

    @dataclass(frozen=True, kw_only=True)
    class InterruptedRun(FakeRun):
        async def start(self, *arguments: Any, **named: Any):
            if fails and len(self.clusters) == 1:
                return await super().start(*arguments, **named)
            raise KeyboardInterrupt

    first = make_run(tmp_path, make_config(steps=2), dies_at(1))
    fields = {one.name: getattr(first, one.name) for one in dataclasses.fields(first)}
    log = HeldLog(first.directory.log, held=False)
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(train(InterruptedRun(**fields), log, Console(), None))
    status = read_status(first.directory)
    assert status is not None
    assert status.state == "interrupted"


async def test_a_hang_is_ended_and_healed(tmp_path: Path):
    async def hook(update: int) -> None:
        if update == 3:
            await asyncio.Event().wait()

    config = make_config(steps=4, save=2)
    assert (await finish(make_run(tmp_path / "whole", config, no_failure)))[0] == 0
    run = make_run(tmp_path / "hit", config, hook, phase_timeout_s=1.0)
    code, shown = await finish(run)
    assert code == 0, shown
    assert_same_metrics(tmp_path / "whole", tmp_path / "hit")
    (fault,) = read_faults(run.directory.faults)
    assert (fault.kind, fault.phase, fault.step) == ("phase_timeout", "update", 3)
    (stacks,) = run.directory.failures.glob("01_step_000003_update/stacks.txt")
    assert "SynchronousLoop._update (" in stacks.read_text(), "where the driver waits"


async def test_the_third_failure_at_one_place_ends_the_run_with_the_evidence(tmp_path: Path):
    """Step 3 is the first after the checkpoint, so every restart fails there at once."""
    run = make_run(tmp_path, make_config(steps=4, save=2), dies_at(3, 4, 5))
    code, shown = await finish(run)
    assert code == 1
    assert len(run.clusters) == 3
    assert "no restart: 3 failures of the same kind (lost process) in update of step 3" in shown
    assert len(list(run.directory.failures.iterdir())) == 3
    status = read_status(run.directory)
    assert status is not None
    assert status.state == "failed"
    assert "no restart" in run.directory.report.read_text()


@pytest.mark.parametrize("error", [ValueError("a plug-in"), OSError("the disk is full")])
async def test_an_error_that_would_come_again_ends_the_run_at_once(
    error: Exception, tmp_path: Path
):
    async def hook(update: int) -> None:
        raise error

    run = make_run(tmp_path, make_config(steps=4), hook)
    code, shown = await finish(run)
    assert (code, len(run.clusters)) == (1, 1)
    assert f"the run failed: {error}" in shown
    assert not run.directory.failures.exists()
    assert not run.directory.faults.exists()


async def test_without_restarts_a_death_ends_the_run(tmp_path: Path):
    run = make_run(tmp_path, make_config(steps=4), dies_at(2), max_restarts=0)
    code, shown = await finish(run)
    assert (code, len(run.clusters)) == (1, 1)
    assert "no restart: trainer.max_restarts is 0" in shown
