"""How a run comes back after a failure: from which checkpoint, and with which resources."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from rich.console import Console

from recipes import restarting
from recipes.prepared_run import Prepared
from recipes.restarting import Recovery, begin_restart, reconnect
from rlsys.config import RunConfig
from rlsys.driver import restarts as limits
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.directory import RunDirectory
from rlsys.run.fault_events import read_faults
from tests.support.prepared_fields import without_notes
from workers.cluster import CapacityError


@dataclass
class Resources:
    """The places of a cluster for generation workers, at each look."""

    looks: list[int]
    asked: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class FakeRun(Prepared[RunConfig]):
    """A run that connects where its generation workers have a place."""

    resources: Resources

    def connect(self) -> Any:
        looks = self.resources.looks
        places = looks.pop(0) if len(looks) > 1 else looks[0]
        self.resources.asked.append(self.generation_workers)
        if self.generation_workers > places:
            raise CapacityError(f"the cluster has {places}")
        return f"a cluster with {self.generation_workers}"


def make_run(path: Path, *looks: int, recovery_timeout_s: float = 0.0) -> FakeRun:
    config = RunConfig.model_validate(
        {
            "generation": {"workers": 3},
            "cluster": {"recovery_timeout_s": recovery_timeout_s},
        }
    )
    directory = RunDirectory(path)
    directory.create(config)
    run = FakeRun(
        config=config,
        store=CheckpointStore(directory.checkpoints, keep=2),
        directory=directory,
        resources=Resources(list(looks)),
        **without_notes(),
    )
    object.__setattr__(run, "recovery", Recovery.of(run, Console(record=True, width=300)))
    return run


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(restarting, "RESOURCES_EVERY_S", 0.0)


async def save(run: FakeRun, step: int) -> None:
    async def write(_: Path) -> None: ...

    await run.store.save(step, write, {"step": step})


async def test_a_restart_begins_at_the_newest_checkpoint_of_the_moment(tmp_path: Path):
    run, console = make_run(tmp_path, 3), Console(record=True, width=300)
    first = await begin_restart(run, ActorDiedError(), console)
    assert first is not None
    assert first.checkpoint is None

    await save(run, 4)
    second = await begin_restart(first, ActorDiedError(), console)
    assert second is not None
    assert second.checkpoint is not None
    assert second.checkpoint.step == 4
    actions = [fault.action for fault in read_faults(run.directory.faults)]
    assert "restart 1 of all actors, from the beginning" in actions[0]
    assert "restart 2 of all actors, from checkpoint" in actions[1]


async def test_a_resumed_run_keeps_the_evidence_of_earlier_failures(tmp_path: Path):
    (tmp_path / "failures" / "03_step_000001_update").mkdir(parents=True)
    (tmp_path / "failures" / "notes").mkdir()
    run = make_run(tmp_path, 3)
    restarted = await begin_restart(run, ActorDiedError(), Console())
    assert restarted is not None
    assert "failures/04_step_" in read_faults(run.directory.faults)[0].action


async def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path: Path):
    """It began from a checkpoint, so its data are at another position than new weights."""
    run, console = make_run(tmp_path, 3), Console()
    await save(run, 4)
    later = await begin_restart(run, ActorDiedError(), console)
    assert later is not None
    (tmp_path / "checkpoints" / "step_000004" / "manifest.json").unlink()
    assert await begin_restart(later, ActorDiedError(), console) is None
    assert "no undamaged checkpoint is left" in read_faults(run.directory.faults)[-1].action


async def test_an_error_of_user_code_is_neither_restarted_nor_counted(tmp_path: Path):
    run = make_run(tmp_path, 3)
    assert await begin_restart(run, ValueError("a plug-in failed"), Console()) is None
    assert read_faults(run.directory.faults) == []


async def test_it_waits_for_the_resources_of_a_node(tmp_path: Path):
    run, console = make_run(tmp_path, 1, 1, 3, recovery_timeout_s=1e6), Console(record=True)
    found, cluster = await reconnect(run, console)
    assert (found.generation_workers, cluster) == (3, "a cluster with 3")
    assert run.resources.asked == [3, 3, 3]
    assert console.export_text().count("waiting at most") == 1


async def test_after_the_wait_it_goes_on_with_fewer_generation_workers(tmp_path: Path):
    run, console = make_run(tmp_path, 1), Console(record=True, width=300)
    found, _ = await reconnect(run, console)
    assert (found.generation_workers, found.config.generation.workers) == (1, 1)
    assert run.resources.asked == [3, 2, 1]
    assert "going on with 1 of 3 generation workers" in console.export_text()
    assert run.generation_workers == 3, "the next restart tries all of them again"


async def test_without_a_place_for_one_worker_the_run_ends_with_the_reason(tmp_path: Path):
    with pytest.raises(CapacityError, match="the cluster has 0"):
        await reconnect(make_run(tmp_path, 0), Console())
