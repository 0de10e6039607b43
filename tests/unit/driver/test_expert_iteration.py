"""The loop of expert iteration against in-process fakes: order, learning, resuming, stopping."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from docs.generate.metrics import documented
from rlsys.config.command_line import evolve
from rlsys.config.expert_iteration import ExpertConfig, ExpertIterationRunConfig
from rlsys.data.batches import RewardBatch, RolloutBatch, ScoredBatch
from rlsys.data.example_stream import ExampleBatch
from rlsys.data.rollout_files import read_rollouts, write_rollouts
from rlsys.driver.evaluation import Evaluator
from rlsys.driver.expert_iteration import ExpertIterationLoop, NothingLearnedError
from rlsys.driver.expert_selection import choose_responses
from rlsys.driver.ports import ExpertIterationWorkers, Handle, KeptResponses
from rlsys.driver.sampling import Sampler
from rlsys.driver.session import Session
from rlsys.metrics import Metric, mean, total
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.directory import RunDirectory
from rlsys.run.observers.metrics_log import MetricsLog
from rlsys.run.observers.observer import Outcome
from tests.support.in_process_fakes import (
    PROBLEMS,
    VOCABULARY,
    FirstTokenScorer,
    InProcessHandle,
    Stage,
    TableGenerator,
    TableSync,
    held_out_prompts,
    make_prompts,
)
from tests.support.in_process_runs import DEADLOCK_S, Recorder, assert_same_metrics
from tests.support.saved_at_once import SavedAtOnce


def make_config(**changes: Any) -> ExpertIterationRunConfig:
    """Return a run of 4 steps; `__` in a name stands for a dot."""
    small = {
        "generation.samples_per_prompt": 8,
        "generation.max_tokens": 2,
        "trainer.steps": 4,
        "trainer.prompts_per_step": 4,
        "trainer.evaluation.every": 2,
        "trainer.checkpoints.every": 1,
        "trainer.seed": 3,
    }
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    return evolve(ExpertIterationRunConfig(), {**small, **dotted})


class TableLearner(SavedAtOnce):
    """A `ports.ExpertLearner`: counts of the kept tokens are mixed into a table of chances.

    The most likely table for the kept responses has their frequencies; the learner moves halfway.
    """

    def __init__(self, stage: Stage, config: ExpertIterationRunConfig) -> None:
        self._stage = stage
        self.logits = np.zeros((PROBLEMS, config.generation.max_tokens, VOCABULARY))
        self.steps = 0
        self.learned: list[ExampleBatch] = []

    async def update(self, batch: Handle[ExampleBatch]) -> dict[str, Metric]:
        await self._stage.enter("update")
        handle: Any = batch
        kept: ExampleBatch = await handle.open()
        self.learned.append(kept)
        self.steps += 1
        if len(kept):
            self.logits = self._moved(kept)
        empty = not len(kept)
        return {
            "policy/loss": mean(0.0, 0 if empty else 1),
            "policy/updates": total(0 if empty else 1),
            "policy/skipped_updates": total(1 if empty else 0),
        }

    def _moved(self, kept: ExampleBatch) -> np.ndarray:
        counts = np.zeros_like(self.logits)
        sequences = kept.sequences
        for row in range(len(kept)):
            prompt, *response = sequences.token_ids[slice(*sequences.offsets[row : row + 2])]
            counts[prompt, np.arange(len(response)), response] += 1
        seen = counts.sum(axis=-1, keepdims=True)
        chances = np.exp(self.logits)
        chances /= chances.sum(axis=-1, keepdims=True)
        moved = 0.5 * chances + 0.5 * counts / np.maximum(seen, 1)
        return np.log(np.maximum(np.where(seen > 0, moved, chances), 1e-30))

    async def save(self, directory: Path) -> None:
        np.save(directory / "logits.npy", self.logits)
        (directory / "steps.json").write_text(json.dumps(self.steps))

    async def load(self, directory: Path) -> None:
        self.logits = np.load(directory / "logits.npy")
        self.steps = json.loads((directory / "steps.json").read_text())


class InProcessFilter:
    """A `ports.ResponseFilter`."""

    def __init__(self, stage: Stage, settings: ExpertConfig) -> None:
        self._stage = stage
        self._settings = settings

    async def choose(
        self, rollouts: Sequence[Handle[RolloutBatch]], rewards: Sequence[Handle[RewardBatch]]
    ) -> KeptResponses:
        await self._stage.enter("choose")
        chosen = choose_responses(
            RolloutBatch.concatenate([await _opened(handle) for handle in rollouts]),
            RewardBatch.concatenate([await _opened(handle) for handle in rewards]),
            self._settings,
        )
        return KeptResponses(
            responses=len(chosen.batch),
            batch=self._stage.put(chosen.batch),
            sampled=self._stage.put(chosen.sampled),
            metrics=chosen.metrics,
        )

    async def write_rollouts(self, sampled: Handle[ScoredBatch], path: Path) -> None:
        write_rollouts(await _opened(sampled), path)

    async def metrics(self) -> dict[str, Metric]:
        return {}


async def _opened(handle: Any) -> Any:
    assert isinstance(handle, InProcessHandle)
    return await handle.open()


@dataclass
class Run:
    """A run with its parts."""

    stage: Stage
    recorder: Recorder
    learner: TableLearner
    generator: TableGenerator
    scorer: FirstTokenScorer
    session: Session
    loop: ExpertIterationLoop

    async def finish(self) -> Outcome:
        return await asyncio.wait_for(self.loop.run(), DEADLOCK_S)


async def start(path: Path, config: ExpertIterationRunConfig, *, resume: bool = False) -> Run:
    """Return a run with new workers; with `resume` it continues from the newest checkpoint."""
    stage, online = Stage(), config.online()
    learner, generator = TableLearner(stage, config), TableGenerator(stage, online)
    scorer = FirstTokenScorer(stage)
    table: Any = learner  # the sync copies its logits
    directory = RunDirectory(path)
    directory.create(config)
    store = CheckpointStore(directory.checkpoints, keep=config.trainer.checkpoints.keep)
    log, recorder = MetricsLog(directory), Recorder(stage.journal)
    sampler = Sampler(online, generator, scorer)
    evaluator = Evaluator(online, held_out_prompts(), sampler)
    session = Session(config, store, [log, recorder], evaluator)
    session.register("metrics_position", log)
    workers = ExpertIterationWorkers(
        generator=generator,
        scorer=scorer,
        filter=InProcessFilter(stage, config.expert),
        policy=learner,
        weights=TableSync(stage, table, generator),
    )
    loop = ExpertIterationLoop(
        config, workers, make_prompts(online), sampler, session, directory.rollouts
    )
    if resume:
        checkpoint = store.latest()
        assert checkpoint is not None
        await session.restore(checkpoint)
    return Run(stage, recorder, learner, generator, scorer, session, loop)


def never_right(run: Run) -> None:
    """Give every response another first answer than the right one."""
    run.learner.logits[:] = 0
    for problem in range(PROBLEMS):
        run.learner.logits[problem, 0, (3 * problem + 1) % VOCABULARY] = -1e9


async def test_a_step_samples_chooses_trains_and_syncs_and_the_accuracy_rises(tmp_path: Path):
    run = await start(tmp_path, make_config(trainer__steps=6))
    assert await run.finish() == "finished"
    watched = ("generate", "choose", "update", "sync")
    events = [event for event in run.stage.journal if event in watched]
    assert events == ["sync", *watched * 6]

    accuracies = [values["eval/accuracy"] for _, values in run.recorder.evaluations]
    assert [step for step, _ in run.recorder.evaluations] == [0, 2, 4, 6]
    assert accuracies[-1] > accuracies[0] + 0.5
    rewards = [values["reward/accuracy"] for _, values in run.recorder.steps]
    assert rewards[-1] > rewards[0] + 0.3
    written = {name for _, values in run.recorder.steps for name in values}
    assert [name for name in sorted(written) if documented(name) is None] == []


async def test_what_is_learned_is_what_was_sampled_and_right(tmp_path: Path):
    run = await start(tmp_path, make_config(trainer__steps=1))
    await run.finish()
    rows = read_rollouts(tmp_path / "rollouts" / "step_000001.parquet")
    kept = [row for row in rows if row["trained"]]
    assert len(rows) == 4 * 8
    assert all(row["correct"] for row in kept)
    pairs = {tuple(row["token_ids"]) for row in rows if row["correct"]}
    assert len(kept) == len(pairs)  # each once

    sequences = run.learner.learned[0].sequences
    learned = np.split(sequences.token_ids, sequences.offsets[1:-1])
    assert [row.tolist() for row in learned] == [list(row["token_ids"]) for row in kept]
    values = run.recorder.steps[0][1]
    assert values["expert/kept_fraction"] == pytest.approx(len(kept) / 32)
    assert values["trained/responses"] == len(kept)


async def test_a_resumed_run_gives_the_same_numbers(tmp_path: Path):
    config = make_config()
    await (await start(tmp_path / "whole", config)).finish()
    half = await start(tmp_path / "parts", config)
    half.recorder.at_step = lambda: (
        half.session.request_stop() if len(half.recorder.steps) == 2 else None
    )
    assert await half.finish() == "interrupted"
    rest = await start(tmp_path / "parts", config, resume=True)
    assert await rest.finish() == "finished"
    assert rest.recorder.first_step == 3
    assert_same_metrics(tmp_path / "whole", tmp_path / "parts")


async def test_a_step_without_a_correct_response_is_skipped_and_counted(tmp_path: Path):
    run = await start(tmp_path, make_config(trainer__steps=2, expert__max_empty_steps=3))
    never_right(run)
    before = run.learner.logits.copy()
    assert await run.finish() == "finished"
    for _, values in run.recorder.steps:
        assert values["policy/skipped_updates"] == 1
        assert values["expert/kept_fraction"] == 0
        assert "policy/loss" not in values
    np.testing.assert_array_equal(run.learner.logits, before)
    assert run.learner.steps == 2  # they count in its schedule


async def test_several_empty_steps_in_a_row_end_the_run_also_across_a_resume(tmp_path: Path):
    config = make_config(trainer__steps=5, expert__max_empty_steps=2)
    run = await start(tmp_path, config)
    never_right(run)
    with pytest.raises(NothingLearnedError, match="in 2 steps in a row none of the 4 x 8"):
        await run.finish()
    assert [step for step, _ in run.recorder.steps] == [1, 2]
    assert run.recorder.ends[0][0] == "failed"

    again = await start(tmp_path, config, resume=True)
    with pytest.raises(NothingLearnedError, match=r"expert\.max_empty_steps"):
        await again.finish()
    # With the check off it goes on.
    on = await start(tmp_path, evolve(config, {"expert.max_empty_steps": 0}), resume=True)
    assert await on.finish() == "finished"


async def test_a_correct_response_starts_the_count_again(tmp_path: Path):
    config = make_config(trainer__steps=4, expert__max_empty_steps=2, trainer__evaluation__every=0)
    run = await start(tmp_path, config)
    never_right(run)

    def recover() -> None:
        if len(run.recorder.steps) == 1:
            run.generator.logits[:] = 0
            run.learner.logits[:] = 0

    run.recorder.at_step = recover
    assert await run.finish() == "finished"
    assert run.recorder.steps[0][1]["expert/kept_fraction"] == 0
    assert run.recorder.steps[1][1]["expert/kept_fraction"] > 0


async def test_the_driver_keeps_no_record_of_a_step(tmp_path: Path):
    run = await start(tmp_path, make_config(trainer__steps=3))
    alive: list[int] = []
    run.recorder.at_step = lambda: alive.append(len(run.stage.handles))
    await run.finish()
    assert alive == [0, 0, 0]
