"""The command of a recipe with run.storage, from the command line to the exit code.

The run trains nothing and needs no Ray; all that concerns its files is real.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from recipes.prepared_run import Prepared, Started
from recipes.run_command import changes_of, run_command, said_complete
from rlsys.config import ConfigError, RunConfig
from rlsys.config.command_line import Invocation
from rlsys.config.hardware import Hardware
from rlsys.driver.faults import FaultLog
from rlsys.driver.session import Session
from rlsys.run import storage
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.directory import RunDirectory
from rlsys.run.observers.console import Progress
from rlsys.run.observers.metrics_log import read_metrics
from rlsys.run.observers.observer import Outcome
from rlsys.run.observers.run_status import StatusWriter
from rlsys.run.storage import RunStorage, StoragePace, check_storage
from rlsys.run.storage_owner import read_owner
from rlsys.run.stored_place import StoredPlace
from tests.support.saved_at_once import SavedAtOnce


class Counter(SavedAtOnce):
    """A loop that counts its steps; the count is its model and its state."""

    def __init__(self, session: Session, broken: str) -> None:
        self._session = session
        self._broken = broken
        self.count = 0
        session.register("count", self)
        session.register_model(self)

    def state(self) -> int:
        return self.count

    def load_state(self, count: int) -> None:
        self.count = count

    async def save(self, directory: Path) -> None:
        (directory / "model.txt").write_text(str(self.count))

    async def load(self, directory: Path) -> None:
        assert (directory / "model.txt").read_text() == str(self.count)

    async def run(self) -> Outcome:
        return await self._session.run(self._train)

    async def _train(self) -> None:
        while self._session.goes_on():
            self._session.begin_step()
            with self._session.phase("update"):
                self.count += 1
            if self.count == 2 and self._broken == "step":
                raise RuntimeError("the step failed")
            if self.count == 2 and self._broken == "refused step":
                raise ConfigError("a plug-in refuses the step")
            values = {"policy/loss": 1.0 / self.count} | self._session.measurements()
            await self._session.end_step(values)


class NoCluster:
    """In place of Ray's cluster: no actor."""

    actors: dict[str, Any] = {}  # noqa: RUF012

    def supervised_of(self, role: str) -> list[Any]:
        return []

    def shutdown(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class CountingRun(Prepared[RunConfig]):
    """A run of a `Counter`."""

    broken: str

    @property
    def online(self) -> RunConfig:
        return self.config

    def connect(self) -> Any:
        return NoCluster()

    async def start(
        self, cluster: Any, status: StatusWriter, console: Console, faults: FaultLog
    ) -> Started:
        if self.broken == "set-up":
            raise ConfigError("model.path: refused by a worker")
        session = self.open_session(Progress(console, live=False), status, None, faults)
        return Started(loop=Counter(session, self.broken), session=session)


class Recipe:
    """The command of a recipe for a `CountingRun`."""

    def __init__(self) -> None:
        self.broken = ""

    def prepare(
        self, invocation: Invocation[RunConfig], hardware: Hardware, console: Console
    ) -> CountingRun | None:
        config = invocation.config
        directory = RunDirectory.named_by(config)
        directory.check(resume=invocation.resume)
        check_storage(config.run, directory, resume=invocation.resume)
        store = CheckpointStore(directory.checkpoints, keep=config.trainer.checkpoints.keep)
        checkpoint = store.latest() if invocation.resume else None
        if said_complete(checkpoint, config, console, evaluates=False):
            return None
        return CountingRun(
            config=config,
            resume=invocation.resume,
            store=store,
            checkpoint=checkpoint,
            directory=directory,
            plan="",
            changes=changes_of(invocation, checkpoint, config),
            notices=(),
            reasons=(),
            warnings=(),
            speed=None,
            estimate=None,
            broken=self.broken,
        )

    def run(self, *words: str) -> int:
        """Run the command as in a new process, and return its exit code."""
        with pytest.raises(SystemExit) as ended:
            run_command(lambda hardware: RunConfig(), self.prepare, words)
        assert isinstance(ended.value.code, int)
        return ended.value.code


@pytest.fixture
def recipe() -> Iterator[Recipe]:
    """A recipe; what its command changes in this process is undone."""
    log = logging.getLogger()
    handlers, level = log.handlers[:], log.level
    terminate = signal.getsignal(signal.SIGTERM)
    yield Recipe()
    signal.signal(signal.SIGTERM, terminate)
    log.handlers[:] = handlers
    log.setLevel(level)


def steps_of(directory: Path) -> list[int]:
    return [record.step for record in read_metrics(directory / "metrics.jsonl")]


def test_a_run_its_resume_elsewhere_and_a_second_run(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    stored = tmp_path / "disk" / "mine"
    short = ("--run.storage", str(stored), "--trainer.steps", "3")
    every = ("--trainer.checkpoints.every", "1", "--trainer.checkpoints.keep", "2")
    first, second = tmp_path / "a" / "run", tmp_path / "b" / "run"

    assert recipe.run(*short, *every, "--run.directory", str(first)) == 0
    assert f"stored       {stored}" in capsys.readouterr().out
    local = {path.relative_to(first) for path in first.rglob("*") if path.is_file()}
    there = {path.relative_to(stored) for path in stored.rglob("*") if path.is_file()}
    assert there == {*local, Path("owner.json")} - {Path("storage.json")}
    for name in local - {Path("storage.json")}:
        assert (first / name).read_bytes() == (stored / name).read_bytes(), name

    assert recipe.run(*short, "--run.directory", str(tmp_path / "c")) == 2
    assert "run.storage" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()

    where = ("--run.storage", str(stored), "--run.directory", str(second), "--resume")
    assert recipe.run(*where, "--trainer.steps", "5") == 0
    output = capsys.readouterr().out
    assert f"fetching the run from {stored} into {second}" in output
    assert f"resuming from {second}/checkpoints/step_000003" in output
    assert steps_of(second) == steps_of(stored) == [1, 2, 3, 4, 5]
    kept = sorted(path.name for path in (stored / "checkpoints").iterdir())
    assert kept == ["step_000004", "step_000005"]

    # The first machine has the older state, and its own configuration names the storage.
    assert recipe.run("--run.directory", str(first), "--resume") == 0
    assert "already complete" in capsys.readouterr().out
    assert steps_of(first) == [1, 2, 3, 4, 5]


def test_a_failed_run_is_stored_with_its_reason(recipe: Recipe, tmp_path: Path):
    stored = tmp_path / "disk" / "mine"
    recipe.broken = "step"
    words = ("--run.storage", str(stored), "--run.directory", str(tmp_path / "a" / "run"))
    assert recipe.run(*words, "--trainer.checkpoints.every", "1") == 1
    assert "the step failed" in (stored / "status.json").read_text()
    assert "the step failed" in (stored / "run.log").read_text()
    assert sorted(path.name for path in (stored / "checkpoints").iterdir()) == ["step_000001"]


def test_a_run_that_a_worker_refuses_leaves_the_place_free(recipe: Recipe, tmp_path: Path):
    stored = tmp_path / "disk" / "mine"
    recipe.broken = "set-up"
    words = ("--run.storage", str(stored), "--run.directory", str(tmp_path / "a" / "run"))
    assert recipe.run(*words, "--trainer.steps", "1") == 2
    assert not [path for path in stored.rglob("*") if path.is_file()]

    recipe.broken = ""
    assert recipe.run(*words, "--trainer.steps", "1") == 0


def test_a_refusal_after_the_first_step_keeps_the_results(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    stored, directory = tmp_path / "disk" / "mine", tmp_path / "a" / "run"
    recipe.broken = "refused step"
    words = ("--run.storage", str(stored), "--run.directory", str(directory))
    assert recipe.run(*words, "--trainer.checkpoints.every", "1") == 1
    assert "the run failed: a plug-in refuses the step" in capsys.readouterr().out
    for place in (directory, stored):
        assert [path.name for path in (place / "checkpoints").iterdir()] == ["step_000001"]
        assert steps_of(place) == [1]


def test_an_error_of_the_driver_itself_leaves_the_run_stored(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise OSError("the console is gone")

    monkeypatch.setattr("rlsys.run.observers.console.print_summary", fail)
    stored = tmp_path / "disk" / "mine"
    words = ("--run.storage", str(stored), "--run.directory", str(tmp_path / "a" / "run"))
    assert recipe.run(*words, "--trainer.steps", "1") == 1
    assert (stored / "checkpoints" / "step_000001" / "manifest.json").is_file()
    owner = read_owner(StoredPlace.open(str(stored)))
    assert owner is not None
    assert owner.ended


def test_a_run_whose_storage_was_taken_does_not_tell_to_take_it_back(
    recipe: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(RunStorage, "is_lost", True)
    words = ("--run.storage", str(tmp_path / "stored"), "--run.directory", str(tmp_path / "a"))
    assert recipe.run(*words, "--trainer.steps", "2") == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "not stored in" in output
    assert "The other process goes on with the run." in output


def test_what_a_complete_run_could_not_store_is_stored_by_its_resume(
    recipe: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """The store fails for good after the start, and works again later."""
    stored, directory = tmp_path / "disk" / "mine", tmp_path / "a" / "run"
    upload = StoredPlace.upload

    def fail(self: StoredPlace, local: Path, name: str, between: Any) -> None:
        raise OSError("no space left in the store")

    monkeypatch.setattr(StoredPlace, "upload", fail)
    monkeypatch.setattr(storage, "StoragePace", partial(StoragePace, longest_pause=0.01))
    words = ("--run.storage", str(stored), "--run.directory", str(directory))
    assert recipe.run(*words, "--trainer.steps", "2") == 1
    output = " ".join(capsys.readouterr().out.split())
    assert f"storage {stored} failed (no space left in the store)" in output
    assert f"not stored in {stored}: checkpoints/step_000002, config.yaml" in output
    assert steps_of(directory) == [1, 2]  # the run itself is complete

    monkeypatch.setattr(StoredPlace, "upload", upload)
    assert recipe.run("--run.directory", str(directory), "--resume") == 0
    output = capsys.readouterr().out
    assert "already complete" in output
    assert f"stored       {stored}" in output
    assert (stored / "checkpoints" / "step_000002" / "manifest.json").is_file()
