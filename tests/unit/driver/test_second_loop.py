"""Session and sampler serve another loop too: neither depends on the kind of a step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlsys.config import RunConfig
from rlsys.data.prompt_stream import PromptStream
from rlsys.driver.evaluation import Evaluator
from rlsys.driver.sampling import Sampler
from rlsys.driver.session import Session
from rlsys.run.checkpoints import Checkpoint, CheckpointStore
from rlsys.run.directory import RunDirectory
from rlsys.run.observers.metrics_log import MetricsLog, read_metrics
from rlsys.run.observers.observer import Observer, Outcome
from tests.support.in_process_fakes import (
    Stage,
    held_out_prompts,
    in_process_workers,
    make_prompts,
)
from tests.support.in_process_runs import assert_same_metrics, make_config
from tests.support.saved_at_once import SavedAtOnce


class CollectingLoop:
    """A loop that counts the right responses per prompt and trains nothing."""

    def __init__(self, sampler: Sampler, prompts: PromptStream, session: Session) -> None:
        self._sampler = sampler
        self._prompts = prompts
        self._session = session
        self.collected: list[int] = []
        session.register("prompts", prompts)
        session.register("collected", self)

    async def state(self) -> list[int]:
        return self.collected

    def load_state(self, state: list[int]) -> None:
        self.collected = list(state)

    async def run(self) -> Outcome:
        return await self._session.run(self._collect)

    async def _collect(self) -> None:
        session = self._session
        await session.evaluate_if_due()
        while session.goes_on():
            session.begin_step()
            with session.phase("generate"):
                sampled = await self._sampler.sample_step(self._prompts)
            with session.phase("reward"):
                rewards = await self._sampler.rewards(sampled.kept, "training")
            right = [int(batch.correct.sum()) for batch in rewards]
            self.collected += right
            await session.end_step({"collect/right": float(sum(right))} | session.measurements())


class StoppingAt(Observer):
    """An observer that requests a stop during a step."""

    def __init__(self, step: int) -> None:
        self._step = step
        self.session: Session | None = None

    def on_phase(self, step: int, phase: str) -> None:
        if self.session and (step, phase) == (self._step, "reward"):
            self.session.request_stop()


async def collect(
    path: Path, config: RunConfig, *, stop_at: int = 0, resume: bool = False
) -> tuple[CollectingLoop, Outcome]:
    """Run a loop as in a new process, and return it with its outcome."""
    directory = RunDirectory(path)
    directory.create(config)
    store = CheckpointStore(directory.checkpoints, keep=2)
    workers = in_process_workers(Stage(), config)
    await workers.weights.sync(0)
    sampler = Sampler(config, workers.generator, workers.scorer)
    evaluator = Evaluator(config, held_out_prompts(), sampler)
    log, stopping = MetricsLog(directory), StoppingAt(stop_at)
    session = Session(config, store, [log, stopping], evaluator)
    stopping.session = session
    session.register("metrics_position", log)
    loop = CollectingLoop(sampler, make_prompts(config), session)
    if resume:
        checkpoint = store.latest()
        assert checkpoint is not None
        await session.restore(checkpoint)
    return loop, await loop.run()


async def test_a_loop_that_trains_nothing_is_evaluated_saved_stopped_and_resumed(
    tmp_path: Path,
) -> None:
    config = make_config(steps=4, evaluate=2, save=2)
    whole, outcome = await collect(tmp_path / "whole", config)
    assert outcome == "finished"
    assert len(whole.collected) == 4 * config.trainer.prompts_per_step
    assert 0 < sum(whole.collected) < 8 * len(whole.collected)
    records = read_metrics(RunDirectory(tmp_path / "whole").metrics)
    assert [(record.kind, record.step) for record in records] == [
        ("eval", 0),
        ("train", 1),
        ("train", 2),
        ("eval", 2),
        ("train", 3),
        ("train", 4),
        ("eval", 4),
    ]
    assert records[1].values["time/generate"] <= records[1].values["time/step"]
    assert records[1].values["memory/driver"] > 0.01

    _, outcome = await collect(tmp_path / "stopped", config, stop_at=3)
    assert outcome == "interrupted"
    resumed, outcome = await collect(tmp_path / "stopped", config, resume=True)
    assert outcome == "finished"
    assert resumed.collected == whole.collected
    assert_same_metrics(tmp_path / "whole", tmp_path / "stopped")


class Weights(SavedAtOnce):
    """A model of one number."""

    def __init__(self, value: int) -> None:
        self.value = value

    async def save(self, directory: Path) -> None:
        (directory / "weights.json").write_text(json.dumps(self.value))

    async def load(self, directory: Path) -> None:
        self.value = json.loads((directory / "weights.json").read_text())


class Counter:
    """A part with a state of one number."""

    def __init__(self) -> None:
        self.count = 0

    def state(self) -> Mapping[str, Any]:
        return {"count": self.count}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]


async def steps_without_work(session: Session) -> None:
    while session.goes_on():
        session.begin_step()
        await session.end_step(session.measurements())


async def saved(path: Path) -> Checkpoint:
    """Return a checkpoint with two models and a counter."""
    config, store = make_config(steps=3), CheckpointStore(path, keep=1)
    session, counter = Session(config, store), Counter()
    session.register("counter", counter)
    session.register_model(Weights(1))
    session.register_model(Weights(2), "critic")
    counter.count = 7
    assert await session.run(lambda: steps_without_work(session)) == "finished"
    checkpoint = store.latest()
    assert checkpoint is not None
    return checkpoint


async def test_several_models_lie_side_by_side_in_a_checkpoint(tmp_path: Path) -> None:
    """The first is at the top, where Hugging Face looks for it; damage to either is detected."""
    checkpoint = await saved(tmp_path)
    assert json.loads((checkpoint.path / "weights.json").read_text()) == 1
    assert json.loads((checkpoint.path / "critic" / "weights.json").read_text()) == 2

    session, counter = Session(make_config(steps=3), CheckpointStore(tmp_path, keep=1)), Counter()
    policy, critic = Weights(0), Weights(0)
    session.register("counter", counter)
    session.register_model(policy)
    session.register_model(critic, "critic")
    await session.restore(checkpoint)
    assert (policy.value, critic.value, counter.count, session.step) == (1, 2, 7, 3)

    (checkpoint.path / "critic" / "weights.json").write_text("3")
    assert CheckpointStore(tmp_path, keep=1).latest() is None


async def test_a_checkpoint_of_another_kind_of_run_is_refused(tmp_path: Path) -> None:
    checkpoint = await saved(tmp_path)
    session = Session(make_config(steps=3), CheckpointStore(tmp_path, keep=1))
    session.register("counter", Counter())
    session.register("demonstrations", Counter())
    with pytest.raises(ValueError, match=r"holds no state of demonstrations: another kind of run"):
        await session.restore(checkpoint)
