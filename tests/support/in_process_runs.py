"""Whole runs of the synchronous loop against the in-process fakes, with helpers for tests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
import pytest

from rlsys.config import (
    AdvantageConfig,
    AlgorithmConfig,
    CheckpointConfig,
    DynamicSamplingConfig,
    EntropyConfig,
    EvaluationConfig,
    GenerationConfig,
    KLConfig,
    PolicyConfig,
    RunConfig,
    TrainerConfig,
)
from rlsys.config.algorithm import GroupFilter
from rlsys.config.trainer import AsynchronousConfig, OnStale
from rlsys.data.batches import RewardBatch, RewardFailure, RolloutBatch
from rlsys.driver.asynchronous_loop import AsynchronousLoop
from rlsys.driver.evaluation import Evaluator, TextEvaluator
from rlsys.driver.ports import Handle, Workers
from rlsys.driver.sampling import Sampler
from rlsys.driver.session import Session
from rlsys.driver.synchronous_loop import SynchronousLoop
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.directory import RunDirectory
from rlsys.run.observers.metrics_log import MetricsLog, MetricsRecord, read_metrics
from rlsys.run.observers.observer import Observer, Outcome
from tests.support.in_process_fakes import (
    FirstTokenScorer,
    InProcessAdvantages,
    Stage,
    TableGenerator,
    TablePolicy,
    held_out_prompts,
    in_process_workers,
    make_prompts,
)
from tests.support.text_examples import random_texts, text_stream

DEADLOCK_S = 20  # a test that waits for an overlap which never comes fails after this


class AlgorithmOptions(TypedDict, total=False):
    """The fields of an algorithm that tests of the loop vary."""

    estimator: str
    kl: float
    placement: Literal["loss", "reward", "advantage"]
    temperature: float
    sampling_rounds: int
    by: GroupFilter


class AsynchronousOptions(TypedDict, total=False):
    """The fields of asynchronous training that tests vary."""

    max_staleness: int
    on_stale: OnStale
    groups_per_call: int


def with_staleness(config: RunConfig, **options: Unpack[AsynchronousOptions]) -> RunConfig:
    """Return the configuration with asynchronous training."""
    settings: dict[str, Any] = {**options}
    update = {
        "max_staleness": settings.pop("max_staleness", 1),
        "asynchronous": AsynchronousConfig(**settings),
    }
    trainer = config.trainer.model_copy(update=update)
    return RunConfig.model_validate(config.model_copy(update={"trainer": trainer}).model_dump())


def make_config(
    *,
    steps: int = 6,
    evaluate: int = 0,
    save: int = 0,
    num_mini_batches: int = 1,
    seed: int = 3,
    pass_at: int = 1,
    **algorithm: Unpack[AlgorithmOptions],
) -> RunConfig:
    """Return a configuration for the fakes: 4 prompts per step, 8 responses of 2 tokens each."""
    return RunConfig(
        generation=GenerationConfig(
            samples_per_prompt=8, min_tokens=0, max_tokens=2, stop=("</answer>",)
        ),
        policy=PolicyConfig(num_mini_batches=num_mini_batches),
        algorithm=_algorithm(**algorithm),
        trainer=TrainerConfig(
            steps=steps,
            prompts_per_step=4,
            seed=seed,
            evaluation=EvaluationConfig(
                every=evaluate, samples_per_prompt=4 if pass_at > 1 else 1, pass_at=(pass_at,)
            ),
            checkpoints=CheckpointConfig(every=save, keep=2),
        ),
    )


def _algorithm(
    *,
    estimator: str = "grpo",
    kl: float = 0.0,
    placement: Literal["loss", "reward", "advantage"] = "loss",
    temperature: float = 0.0,
    sampling_rounds: int = 1,
    by: GroupFilter = "accuracy",
) -> AlgorithmConfig:
    return AlgorithmConfig(
        advantage=AdvantageConfig(name=estimator),
        kl=KLConfig(coefficient=kl, placement=placement),
        entropy=EntropyConfig(temperature=temperature),
        dynamic_sampling=DynamicSamplingConfig(max_rounds=sampling_rounds, by=by),
    )


@dataclass
class Recorder(Observer):
    """An observer that records everything; `react` is called at each phase."""

    journal: list[str]
    react: Callable[[int, str], None] = lambda step, phase: None
    at_step: Callable[[], None] = lambda: None
    steps: list[tuple[int, Mapping[str, float]]] = field(default_factory=list)
    evaluations: list[tuple[int, Mapping[str, float]]] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    ends: list[tuple[Outcome, str]] = field(default_factory=list)
    first_step: int = 0

    def on_start(self, first_step: int, total_steps: int) -> None:
        self.first_step = first_step

    def on_phase(self, step: int, phase: str) -> None:
        self.journal.append(f"phase:{phase}")
        self.react(step, phase)

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        self.steps.append((step, values))
        self.at_step()

    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        self.evaluations.append((step, values))

    def on_checkpoint(self, step: int, path: str) -> None:
        assert Path(path).is_dir()
        self.checkpoints.append(step)

    def on_end(self, outcome: Outcome, message: str) -> None:
        self.ends.append((outcome, message))


@dataclass
class Run:
    """One run of the loop with its parts."""

    stage: Stage
    workers: Workers
    recorder: Recorder
    store: CheckpointStore
    directory: RunDirectory
    session: Session
    loop: SynchronousLoop  # or its subclass, the asynchronous one

    async def finish(self) -> Outcome:
        """Run the loop to its end."""
        return await asyncio.wait_for(self.loop.run(), DEADLOCK_S)

    @property
    def generator(self) -> TableGenerator:
        assert isinstance(self.workers.generator, TableGenerator)
        return self.workers.generator

    @property
    def policy(self) -> TablePolicy:
        assert isinstance(self.workers.policy, TablePolicy)
        return self.workers.policy

    @property
    def batches(self) -> list[Mapping]:
        assert isinstance(self.workers.advantages, InProcessAdvantages)
        return self.workers.advantages.batches


@dataclass(frozen=True, kw_only=True)
class Concurrency:
    """How an asynchronous run samples."""

    workers: int = 2
    seconds: Callable[[int], float] = lambda group: 0.0  # that a group takes, by its id


async def start(
    path: Path,
    config: RunConfig,
    *,
    resume: bool = False,
    concurrency: Concurrency | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Run:
    """Return a run with new workers, as in a new process.

    With `resume` it is restored from the newest checkpoint. With `concurrency` it is that of the
    asynchronous loop, whatever the staleness.
    """
    stage = Stage()
    workers = in_process_workers(stage, config)
    if concurrency is not None:
        assert isinstance(workers.generator, TableGenerator)
        workers.generator.add_slots(concurrency.workers, concurrency.seconds)
    directory = RunDirectory(path)
    directory.create(config)
    store = CheckpointStore(directory.checkpoints, keep=config.trainer.checkpoints.keep)
    checkpoint = store.latest() if resume else None

    log = MetricsLog(directory)
    recorder = Recorder(stage.journal)
    sampler = Sampler(config, workers.generator, workers.scorer)
    evaluator = None
    if config.data.eval != "off":
        evaluator = Evaluator(config, held_out_prompts(), sampler)
    if config.evaluates_text:
        evaluator = TextEvaluator(workers, random_texts(3), evaluator)

    session = Session(config, store, [log, recorder], evaluator, clock=clock)
    session.register("metrics_position", log)
    make_loop = SynchronousLoop if concurrency is None else AsynchronousLoop
    loop = make_loop(
        config,
        workers,
        make_prompts(config),
        sampler,
        session,
        directory.rollouts,
        texts=text_stream(config.ptx.examples_per_step) if config.ptx.trains else None,
    )
    if checkpoint:
        await session.restore(checkpoint)

    return Run(stage, workers, recorder, store, directory, session, loop)


def without_times(records: list[MetricsRecord]) -> list[tuple]:
    """Return the part of the metrics that is equal in two runs of one configuration."""
    measured = ("time/", "throughput/", "memory/", "faults/")
    rows = []
    for record in records:
        computed = {
            name: value for name, value in record.values.items() if not name.startswith(measured)
        }
        rows.append((record.kind, record.step, computed))
    return rows


def assert_same_metrics(left: Path, right: Path) -> None:
    """Assert that two runs have the same records, to 1e-6, without their times."""
    first = without_times(read_metrics(RunDirectory(left).metrics))
    second = without_times(read_metrics(RunDirectory(right).metrics))
    assert [record[:2] for record in first] == [record[:2] for record in second]
    for (_, _, expected), (_, _, found) in zip(first, second, strict=True):
        assert found == pytest.approx(expected, abs=1e-6)


async def wait(event: asyncio.Event) -> None:
    await event.wait()


def break_rewards(run: Run, fails: Callable[[int], bool], *, drop: bool = False) -> None:
    """Let the reward function fail on the rows of each part for which `fails` is true."""
    scorer = run.workers.scorer
    assert isinstance(scorer, FirstTokenScorer)
    score = scorer._score

    async def broken(rollouts: Handle[RolloutBatch]) -> RewardBatch:
        batch = await score(rollouts)
        failed = np.array([fails(row) for row in range(len(batch))])
        components = np.where(failed, np.float32(np.nan), batch.rewards)
        return replace(
            batch,
            rewards=components if drop else np.nan_to_num(components),
            accuracies=components,
            components={"first_token": components},
            failures=tuple(
                RewardFailure(row=int(row), function="first_token", kind="error", message="no")
                for row in np.flatnonzero(failed)
            ),
        )

    scorer._score = broken
