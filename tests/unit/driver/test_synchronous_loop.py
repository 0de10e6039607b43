"""The loop against in-process fakes: what it computes, in which order, and what it leaves behind."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from rich.console import Console

from docs.generate.metrics import documented
from rlsys.config import (
    AdvantageConfig,
    AlgorithmConfig,
    CheckpointConfig,
    DataConfig,
    DynamicSamplingConfig,
    EntropyConfig,
    EvaluationConfig,
    GenerationConfig,
    KLConfig,
    OverlongConfig,
    PolicyConfig,
    RunConfig,
    TrainerConfig,
)
from rlsys.config.algorithm import GroupFilter
from rlsys.data.batches import RewardBatch, RewardFailure, RolloutBatch
from rlsys.data.rollout_files import read_rollouts
from rlsys.driver.evaluation import Evaluator
from rlsys.driver.ports import Handle
from rlsys.driver.synchronous_loop import SynchronousLoop, Workers
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.directory import RunDirectory
from rlsys.run.observers.console import print_summary
from rlsys.run.observers.html_report import write_report
from rlsys.run.observers.metrics_log import MetricsLog, MetricsRecord, read_metrics
from rlsys.run.observers.observer import PHASES, Observers, Outcome
from rlsys.run.reward_failures import RewardFailureError
from tests.support.in_process_fakes import (
    PROBLEMS,
    FirstTokenScorer,
    InProcessAdvantages,
    OpenedByDriverError,
    Stage,
    TableGenerator,
    TablePolicy,
    held_out_prompts,
    in_process_workers,
    make_prompts,
)

DEADLOCK_S = 20  # a test that waits for an overlap which never comes fails after this


def make_config(
    *,
    steps: int = 6,
    evaluate: int = 0,
    save: int = 0,
    kl: float = 0.0,
    placement: Literal["loss", "reward", "advantage"] = "loss",
    temperature: float = 0.0,
    estimator: str = "grpo",
    sampling_rounds: int = 1,
    by: GroupFilter = "accuracy",
    mini_batches: int = 1,
    seed: int = 3,
    pass_at: int = 1,
) -> RunConfig:
    return RunConfig(
        generation=GenerationConfig(samples_per_prompt=8, min_tokens=0, max_tokens=2),
        policy=PolicyConfig(mini_batches=mini_batches),
        algorithm=AlgorithmConfig(
            advantage=AdvantageConfig(name=estimator),
            kl=KLConfig(coefficient=kl, placement=placement),
            entropy=EntropyConfig(temperature=temperature),
            dynamic_sampling=DynamicSamplingConfig(max_rounds=sampling_rounds, by=by),
        ),
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


@dataclass
class Recorder:
    """Observer that writes everything down; `react` is called at each phase."""

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
    stage: Stage
    workers: Workers
    recorder: Recorder
    store: CheckpointStore
    directory: RunDirectory
    loop: SynchronousLoop

    async def finish(self) -> Outcome:
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


async def start(path: Path, config: RunConfig, *, resume: bool = False) -> Run:
    """A run with new workers, as a new process would make them; with `resume`, restored from the newest checkpoint."""
    stage = Stage()
    workers, directory = in_process_workers(stage, config), RunDirectory(path)
    directory.create(config)
    store = CheckpointStore(directory.checkpoints, keep=config.trainer.checkpoints.keep)
    checkpoint = store.latest() if resume else None
    log = MetricsLog(
        directory, keep_lines=checkpoint.state["metrics_position"] if checkpoint else None
    )
    recorder = Recorder(stage.journal)
    evaluator = Evaluator(config, held_out_prompts(), workers.generator, workers.scorer, stop=())
    loop = SynchronousLoop(
        config,
        workers,
        make_prompts(config),
        None if config.data.eval == "off" else evaluator,
        store,
        Observers([log, recorder]),
        rollouts_directory=directory.rollouts,
        metrics_log=log,
        stop=("</answer>",),
    )
    if checkpoint:
        await loop.restore(checkpoint)
    return Run(stage, workers, recorder, store, directory, loop)


def without_times(records: list[MetricsRecord]) -> list[tuple]:
    """What must be equal between two runs of one configuration."""
    measured = ("time/", "throughput/", "memory/")
    return [
        (
            record.kind,
            record.step,
            {name: value for name, value in record.values.items() if not name.startswith(measured)},
        )
        for record in records
    ]


def assert_same_metrics(left: Path, right: Path) -> None:
    first, second = (
        without_times(read_metrics(RunDirectory(path).metrics)) for path in (left, right)
    )
    assert [record[:2] for record in first] == [record[:2] for record in second]
    for (_, _, expected), (_, _, found) in zip(first, second, strict=True):
        assert found == pytest.approx(expected, abs=1e-6)


async def test_learns(tmp_path: Path) -> None:
    """Chance is 1/8; REINFORCE with group baselines must get well beyond it, on training samples and on greedy answers."""
    run = await start(tmp_path, make_config(steps=30, evaluate=10))
    assert await run.finish() == "finished"
    rewards = [values["reward/mean"] for _, values in run.recorder.steps]
    accuracies = {step: values["eval/accuracy"] for step, values in run.recorder.evaluations}
    assert np.mean(rewards[:3]) < 0.35
    assert np.mean(rewards[-3:]) > 0.8
    assert list(accuracies) == [0, 10, 20, 30]
    assert accuracies[0] <= 0.5 < 0.8 < accuracies[30]


async def test_order_of_a_step_and_versions(tmp_path: Path) -> None:
    run = await start(tmp_path, make_config(steps=3, kl=0.1, mini_batches=2))
    await run.finish()
    step = [event for event in run.stage.journal if not event.startswith(("phase", "part", "scor"))]
    one = ["generate", "logprobs:old", "logprobs:ref", "credit", "update", "write_rollouts", "sync"]
    assert step == ["sync", *one * 3, "save"]
    assert [batch["versions"] for batch in run.batches] == [{0}, {1}, {2}]
    assert run.generator.version == run.policy.updates == 3


async def test_parts_are_joined_in_prompt_order(tmp_path: Path) -> None:
    """The generator finishes the last prompts first."""
    run = await start(tmp_path, make_config(steps=2))
    await run.finish()
    assert [batch["group_ids"] for batch in run.batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]


async def test_rewards_are_scored_while_generation_goes_on(tmp_path: Path) -> None:
    """The last part is held back until the first one is being scored."""
    run = await start(tmp_path, make_config(steps=1))
    scoring = asyncio.Event()

    async def began() -> None:
        scoring.set()

    run.stage.hooks = {"scoring": began, "part:last": lambda: _wait(scoring)}
    assert await run.finish() == "finished"


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


async def test_old_and_ref_run_side_by_side_and_beside_rewards(tmp_path: Path) -> None:
    """old waits for ref to begin and ref for old; scoring waits for both."""
    run = await start(tmp_path, make_config(steps=1, kl=0.1, mini_batches=2))
    old, ref = asyncio.Event(), asyncio.Event()

    async def on_old() -> None:
        old.set()
        await ref.wait()

    async def on_ref() -> None:
        ref.set()
        await old.wait()

    async def on_scoring() -> None:
        await old.wait()
        await ref.wait()

    run.stage.hooks = {"logprobs:old": on_old, "logprobs:ref": on_ref, "scoring": on_scoring}
    assert await run.finish() == "finished"


async def test_waiting_for_rewards_is_a_phase_of_its_own(tmp_path: Path) -> None:
    """A reward that comes only once the loop waits for nothing else is counted under time/reward."""
    run = await start(tmp_path, make_config(steps=1))
    waiting = asyncio.Event()
    run.recorder.react = lambda _, phase: waiting.set() if phase == "reward" else None
    run.stage.hooks = {"scoring": lambda: _wait(waiting)}
    assert await run.finish() == "finished"
    assert [
        event
        for event in run.stage.journal
        if event in ("phase:reward", "scored", "phase:advantages")
    ] == [
        "phase:reward",
        "scored",
        "scored",
        "scored",
        "scored",
        "phase:advantages",
    ]


async def test_logprobs_are_asked_for_only_where_needed(tmp_path: Path) -> None:
    cases = {
        "one update, no KL": (make_config(steps=1), set()),
        "two updates a batch": (make_config(steps=1, mini_batches=2), {"logprobs:old"}),
        "the estimator reads them": (
            make_config(steps=1, kl=0.01, estimator="token_kl_grpo"),
            {"logprobs:old", "logprobs:ref"},
        ),
        "KL": (make_config(steps=1, kl=0.01), {"logprobs:ref"}),
        "KL in the reward": (
            make_config(steps=1, kl=0.01, placement="reward"),
            {"logprobs:old", "logprobs:ref"},
        ),
        "rewarded entropy": (make_config(steps=1, temperature=0.1), {"logprobs:old"}),
    }
    for name, (config, expected) in cases.items():
        run = await start(tmp_path / name, config)
        await run.finish()
        assert {event for event in run.stage.journal if event.startswith("logprobs")} == expected, (
            name
        )
        (batch,) = run.batches
        assert (batch["old_gap"] is not None) == ("logprobs:old" in expected)
        assert (batch["ref_gap"] is not None) == ("logprobs:ref" in expected)


async def test_old_logprobs_reach_their_rows(tmp_path: Path) -> None:
    """Two ranks return alternate rows; joined, they equal what the engine sampled with, while the reference falls behind."""
    run = await start(tmp_path, make_config(steps=4, kl=0.01, mini_batches=2))
    await run.finish()
    assert max(batch["old_gap"] for batch in run.batches) < 1e-6
    assert run.batches[0]["ref_gap"] < 1e-6 < 0.1 < run.batches[3]["ref_gap"]


async def test_handles_are_dropped_after_each_step(tmp_path: Path) -> None:
    """By reference counts alone: the object store cannot wait for a garbage collection."""
    run = await start(tmp_path, make_config(steps=4, kl=0.1, mini_batches=2, evaluate=2))
    alive: list[int] = []
    run.recorder.at_step = lambda: alive.append(len(run.stage.handles))
    most = 0

    async def count() -> None:
        nonlocal most
        most = max(most, len(run.stage.handles))

    run.stage.hooks = {"update": count}
    await run.finish()
    assert alive == [0, 0, 0, 0]
    assert (
        most == 4 + 4 + 2 + 2 + 1
    )  # rollouts and rewards of four groups, old and ref of two ranks, the train batch


async def test_the_fakes_catch_a_driver_that_opens_a_batch(tmp_path: Path) -> None:
    """What all tests here rely on."""
    run = await start(tmp_path, make_config())
    await run.workers.weights.sync(0)
    prompts = make_prompts(make_config()).next_batch()
    async for part in run.workers.generator.generate(prompts, run.loop._sampling(0, 0)):
        with pytest.raises(OpenedByDriverError):
            await part.rollouts


async def test_metrics_of_a_step(tmp_path: Path) -> None:
    run = await start(tmp_path, make_config(steps=3, save=2))
    await run.finish()
    for _, values in run.recorder.steps:
        assert sum(values[f"time/{phase}"] for phase in PHASES) == pytest.approx(
            values["time/step"]
        )
        assert min(values[f"time/{phase}"] for phase in PHASES) >= 0
        assert values["rollout/tokens"] == values["policy/tokens"] == 4 * 8 * 2
        assert values["throughput/generate"] == pytest.approx(64 / values["time/generate"])
        assert values["throughput/update"] == pytest.approx(64 / values["time/update"])
        assert values["memory/driver"] > 0.01
        assert {"memory/generation", "memory/reward", "memory/advantage"} <= set(values)
    assert ["time/checkpoint" in values for _, values in run.recorder.steps] == [False, False, True]


@pytest.mark.parametrize("estimator", ["grpo", "remax", "hierarchical"])
async def test_a_run_writes_no_metric_that_is_not_documented(
    tmp_path: Path, estimator: str
) -> None:
    """docs/metrics.md, with everything on that the fakes can do."""
    config = make_config(
        steps=2,
        evaluate=1,
        save=1,
        kl=0.01,
        placement="reward",
        temperature=0.1,
        estimator=estimator,
        sampling_rounds=2,
        pass_at=2,
    )
    run = await start(tmp_path, config)
    await run.finish()
    written = {name for record in read_metrics(run.directory.metrics) for name in record.values}
    assert len(written) > 40
    assert [name for name in sorted(written) if documented(name) is None] == []


async def test_rollouts_of_each_step_are_written(tmp_path: Path) -> None:
    config = make_config(steps=5)
    every_second = config.model_copy(
        update={"trainer": config.trainer.model_copy(update={"save_rollouts_every": 2})}
    )
    run = await start(tmp_path, every_second)
    await run.finish()
    assert sorted(path.name for path in run.directory.rollouts.iterdir()) == [
        f"step_{step:06d}.parquet" for step in (1, 2, 4, 5)
    ]


async def test_sampling_seed_depends_on_run_and_batch_alone(tmp_path: Path) -> None:
    """Golden: the first word of NumPy's SeedSequence([seed, batch_id]), which NumPy promises to keep."""
    run = await start(tmp_path, make_config(steps=2, seed=3))
    await run.finish()
    assert [request.seed for request in run.generator.requests] == [
        np.random.SeedSequence([3, 0]).generate_state(1)[0],
        np.random.SeedSequence([3, 1]).generate_state(1)[0],
    ]
    assert (
        run.generator.requests[0].seed == 1576890651
    )  # written down from NumPy 2.3: another value would change every resumed run
    assert all(request.stop == ("</answer>",) for request in run.generator.requests)


async def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """Eight steps at once; and eight with an actor's death in step 6, resumed from step 4: the same lines of metrics, to 1e-6."""
    config = make_config(steps=8, evaluate=2, save=2, kl=0.05, mini_batches=2, pass_at=2)
    whole = await start(tmp_path / "whole", config)
    await whole.finish()

    killed = await start(tmp_path / "killed", config)
    updates = 0

    async def die() -> None:
        nonlocal updates
        updates += 1
        if updates == 6:
            raise RuntimeError("the worker died")

    killed.stage.hooks = {"update": die}
    with pytest.raises(RuntimeError, match="the worker died"):
        await killed.finish()
    assert read_metrics(killed.directory.metrics)[-1].step == 5  # beyond the checkpoint: must go

    resumed = await start(tmp_path / "killed", config, resume=True)
    assert await resumed.finish() == "finished"
    assert resumed.recorder.first_step == 5
    assert_same_metrics(tmp_path / "whole", tmp_path / "killed")
    np.testing.assert_array_equal(resumed.policy.logits, whole.policy.logits)
    assert len(read_metrics(whole.directory.metrics)) == 8 + 5


async def test_different_seeds_differ(tmp_path: Path) -> None:
    """So that the equality above says something."""
    for seed in (1, 2):
        await (await start(tmp_path / str(seed), make_config(seed=seed))).finish()
    with pytest.raises(AssertionError):
        assert_same_metrics(tmp_path / "1", tmp_path / "2")


async def test_a_failure_is_told_with_its_place_and_leaves_the_checkpoint(tmp_path: Path) -> None:
    run = await start(tmp_path, make_config(steps=6, save=2))
    count = 0

    async def fail() -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise ConnectionError("actor 7 is gone\nits node left the cluster")

    run.stage.hooks = {"update": fail}
    with pytest.raises(ConnectionError) as caught:
        await run.finish()
    assert caught.value.__notes__ == [
        "This happened during update of step 3; the newest checkpoint is that of step 2, from which --resume continues."
    ]
    assert run.recorder.ends == [
        ("failed", "update of step 3: ConnectionError: its node left the cluster")
    ]
    checkpoint = run.store.latest()
    assert checkpoint is not None
    assert checkpoint.step == 2


@pytest.mark.parametrize(
    "event",
    ["generate", "part:last", "scoring", "logprobs:old", "logprobs:ref", "credit", "sync", "save"],
)
async def test_a_failure_anywhere_ends_the_run(tmp_path: Path, event: str) -> None:
    """Also one in work that nobody waits for at that moment, such as scoring during generation."""
    run = await start(tmp_path, make_config(steps=2, kl=0.1, mini_batches=2))

    async def fail() -> None:
        raise OSError(f"no {event}")

    run.stage.hooks = {event: fail}
    with pytest.raises(OSError, match=f"no {event}"):
        await run.finish()
    ((outcome, message),) = run.recorder.ends
    assert (outcome, f"OSError: no {event}" in message) == ("failed", True)
    assert run.store.latest() is None


async def test_a_generator_that_loses_a_prompt_is_found_out(tmp_path: Path) -> None:
    run = await start(tmp_path, make_config())
    generate = run.generator.generate

    async def lossy(prompts, sampling):
        async for part in generate(prompts, sampling):
            if part.prompt_index:
                yield part

    run.generator.generate = lossy
    with pytest.raises(AssertionError, match="must answer each prompt once"):
        await run.finish()


@pytest.mark.parametrize("phase", ["generate", "reward", "update", "sync"])
async def test_a_stop_request_ends_after_the_step_with_a_checkpoint(
    tmp_path: Path, phase: str
) -> None:
    """Step 2 is due for an evaluation, which is not made; the resumed run makes it up and equals the uninterrupted one."""
    config = make_config(steps=4, evaluate=2)
    run = await start(tmp_path / "stopped", config)
    run.recorder.react = lambda step, at: (
        run.loop.request_stop() if (step, at) == (2, phase) else None
    )
    assert await run.finish() == "interrupted"
    assert run.recorder.checkpoints == [2]
    assert [step for step, _ in run.recorder.evaluations] == [0]
    assert run.recorder.ends == [("interrupted", "")]

    resumed = await start(tmp_path / "stopped", config, resume=True)
    assert await resumed.finish() == "finished"
    await (await start(tmp_path / "whole", config)).finish()
    assert_same_metrics(tmp_path / "whole", tmp_path / "stopped")


async def test_a_stop_request_abandons_an_evaluation(tmp_path: Path) -> None:
    """The evaluation after step 2 never ends; the stop request comes while it runs."""
    run = await start(tmp_path, make_config(steps=4, evaluate=2))
    evaluations = 0

    async def hang() -> None:
        nonlocal evaluations
        evaluations += 1
        if evaluations == 2:
            run.loop.request_stop()
            await asyncio.Event().wait()

    run.stage.hooks = {"generate:greedy": hang}
    assert await run.finish() == "interrupted"
    assert run.recorder.checkpoints == [2]
    assert [step for step, _ in run.recorder.evaluations] == [0]


async def test_a_stop_in_the_last_evaluation_is_made_up_after_a_resume(tmp_path: Path) -> None:
    """All steps are done, but the run is not finished without its last evaluation."""
    config = make_config(steps=2, evaluate=2)
    run = await start(tmp_path, config)
    run.recorder.react = lambda step, at: (
        run.loop.request_stop() if (step, at) == (2, "evaluate") else None
    )
    assert await run.finish() == "interrupted"
    resumed = await start(tmp_path, config, resume=True)
    assert await resumed.finish() == "finished"
    assert [
        record.step for record in read_metrics(run.directory.metrics) if record.kind == "eval"
    ] == [0, 2]


async def test_without_an_evaluation_the_run_is_the_same_but_for_its_numbers(
    tmp_path: Path,
) -> None:
    config = make_config(steps=3, evaluate=1)
    off = config.model_copy(update={"data": DataConfig(eval="off")})
    silent = await start(tmp_path / "off", off)
    assert await silent.finish() == "finished"
    assert silent.recorder.evaluations == []
    await (await start(tmp_path / "on", config)).finish()

    def training(directory: str) -> list[tuple]:
        records = read_metrics(RunDirectory(tmp_path / directory).metrics)
        return without_times([record for record in records if record.kind == "train"])

    assert training("off") == training("on")
    with (tmp_path / "summary").open("w") as file:
        records = read_metrics(silent.directory.metrics)
        print_summary(Console(file=file), records, silent.directory, seconds=1.0)
    assert "held-out" not in (tmp_path / "summary").read_text()
    write_report(silent.directory)
    assert "held-out accuracy" not in silent.directory.report.read_text()


async def test_a_stop_before_the_first_step_trains_nothing(tmp_path: Path) -> None:
    run = await start(tmp_path, make_config(evaluate=2))
    run.loop.request_stop()
    assert await run.finish() == "interrupted"
    assert run.recorder.steps == run.recorder.evaluations == run.recorder.checkpoints == []


async def test_cancellation_leaves_at_once(tmp_path: Path) -> None:
    """The second Ctrl-C: no waiting, no checkpoint, and the display is told."""
    run = await start(tmp_path, make_config(steps=4, save=1))
    updating = asyncio.Event()
    count = 0

    async def hang() -> None:
        nonlocal count
        count += 1
        if count == 2:
            updating.set()
            await asyncio.Event().wait()

    run.stage.hooks = {"update": hang}
    task = asyncio.create_task(run.loop.run())
    await asyncio.wait_for(updating.wait(), DEADLOCK_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    ((outcome, message),) = run.recorder.ends
    assert outcome == "interrupted"
    assert "update of step 2" in message
    assert "checkpoint is that of step 1" in message


async def test_restore_names_what_has_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await (await start(tmp_path, make_config(steps=2))).finish()
    with caplog.at_level(logging.WARNING):
        longer = await start(tmp_path, make_config(steps=3, evaluate=5), resume=True)
    changes = [record.getMessage().split(": ", 1)[1] for record in caplog.records]
    assert changes == ["trainer.evaluation.every: 0 -> 5", "trainer.steps: 2 -> 3"]
    assert await longer.finish() == "finished"
    assert [step for step, _ in longer.recorder.steps] == [3]


async def test_restore_refuses_another_model(tmp_path: Path) -> None:
    config = make_config(steps=1)
    await (await start(tmp_path, config)).finish()
    other = config.model_copy(update={"model": config.model.model_copy(update={"path": "tiny"})})
    with pytest.raises(ValueError, match=r"model\.path: 'tiny'.*'smollm2-135m'.*start a new run"):
        await start(tmp_path, other, resume=True)


async def test_a_finished_run_resumes_to_nothing(tmp_path: Path) -> None:
    config = make_config(steps=2, evaluate=1)
    run = await start(tmp_path, config)
    await run.finish()
    before = run.directory.metrics.read_text()
    again = await start(tmp_path, config, resume=True)
    assert await again.finish() == "finished"
    assert again.recorder.steps == again.recorder.evaluations == again.recorder.checkpoints == []
    assert run.directory.metrics.read_text() == before


async def test_checkpoint_holds_what_a_resume_needs(tmp_path: Path) -> None:
    run = await start(tmp_path, make_config(steps=3, save=2, evaluate=2))
    await run.finish()
    assert sorted(path.name for path in run.directory.checkpoints.iterdir()) == [
        "step_000002",
        "step_000003",
    ]
    state = json.loads(
        (run.directory.checkpoints / "step_000002" / "trainer_state.json").read_text()
    )
    assert state["step"] == state["evaluated_step"] == 2
    taken = 2 * make_config(steps=3).trainer.prompts_per_step
    assert state["prompts"] == {
        "batches_taken": 2,
        "prompts_taken": taken,
        "prompts": PROBLEMS,
        "digest": None,  # the stream of these fakes was not made of problems
    }
    assert state["metrics_position"] == 4  # evaluations 0 and 2, steps 1 and 2
    assert state["config"]["trainer"]["steps"] == 3
    assert {"torch", "numpy"} <= set(state["versions"])


async def test_dynamic_sampling_replaces_groups_of_equal_rewards(tmp_path: Path) -> None:
    """Trained groups have mixed rewards as long as the rounds suffice; what is missing is filled up, and everything is counted."""
    plain = await start(tmp_path / "plain", make_config(steps=3))
    await plain.finish()
    run = await start(tmp_path / "dynamic", make_config(steps=3, sampling_rounds=4))
    await run.finish()
    for _, step in run.recorder.steps:
        missing = step["sampling/missing_groups"]
        assert step["trained/equal_reward_groups"] * 4 == missing
        assert 1 <= step["sampling/rounds"] <= 4
        assert step["sampling/rounds"] == 4 or not missing
    assert sum(step["sampling/replaced_groups"] for _, step in run.recorder.steps) > 0
    assert sum(step["trained/equal_reward_groups"] for _, step in plain.recorder.steps) > sum(
        step["trained/equal_reward_groups"] for _, step in run.recorder.steps
    )
    seeds = [request.seed for request in run.generator.requests]
    assert len(set(seeds)) == len(seeds)  # a further round is sampled anew
    assert all(len(set(batch["group_ids"])) == 4 for batch in run.batches)


@pytest.mark.parametrize("by", ["accuracy", "reward"])
async def test_dynamic_sampling_goes_by_correctness_unless_it_is_told_otherwise(
    tmp_path: Path, by: GroupFilter
) -> None:
    """With a punishment that differs within every group, all groups are mixed in reward: only correctness tells which teach."""

    class Punishing(FirstTokenScorer):
        async def _score(self, rollouts: Handle[RolloutBatch]) -> RewardBatch:
            scored = await super()._score(rollouts)
            punished = scored.rewards - np.linspace(0, 0.4, len(scored), dtype=np.float32)
            return dataclasses.replace(scored, rewards=punished)

    config = make_config(steps=2, sampling_rounds=3, by=by)
    run = await start(tmp_path, config)
    scorer = Punishing(run.stage)
    run.loop._workers = dataclasses.replace(run.workers, scorer=scorer)
    await run.finish()
    for _, step in run.recorder.steps:
        if by == "reward":
            assert (step["sampling/rounds"], step["sampling/missing_groups"]) == (1, 0)
            assert step["trained/responses"] == 4 * 8
        else:
            assert step["sampling/rounds"] > 1
            assert step["trained/responses"] == (4 - step["sampling/missing_groups"]) * 8


async def test_with_dynamic_sampling_metrics_and_files_are_of_everything_that_was_sampled(
    tmp_path: Path,
) -> None:
    """Against the files, which hold every response: dropped groups count in reward, accuracy, tokens and throughput, and are not trained."""
    run = await start(tmp_path, make_config(steps=3, sampling_rounds=4))
    await run.finish()
    differed = 0
    for number, step in run.recorder.steps:
        rows = read_rollouts(run.directory.rollouts / f"step_{number:06d}.parquet")
        trained = [row for row in rows if row["trained"]]
        differed += step["reward/mean"] != step["trained/reward_mean"]
        assert step["rollout/responses"] == len(rows)
        assert step["rollout/tokens"] == 2 * len(rows)
        assert step["throughput/generate"] == pytest.approx(2 * len(rows) / step["time/generate"])
        assert step["reward/mean"] == pytest.approx(np.mean([row["reward"] for row in rows]))
        assert step["reward/accuracy"] == pytest.approx(np.mean([row["correct"] for row in rows]))
        assert step["trained/responses"] == len(trained) == 4 * 8
        assert step["trained/reward_mean"] == pytest.approx(
            np.mean([row["reward"] for row in trained])
        )
        dropped = step["sampling/replaced_groups"] + step["sampling/surplus_groups"]
        assert len(rows) - len(trained) == 8 * dropped
        for row in rows:
            assert (row["advantages"] is None) == (not row["trained"])
        assert {row["group_id"] for row in trained} == set(run.batches[number - 1]["group_ids"])
    assert differed > 0


async def test_the_file_holds_the_advantages_that_the_update_estimated(tmp_path: Path) -> None:
    """With `recompute` the batch has none; those of the file are the estimator's of the same rewards."""
    config = make_config(steps=2)
    algorithm = config.algorithm.model_copy(
        update={"advantage": AdvantageConfig(name="rloo", recompute=True)}
    )
    run = await start(tmp_path, config.model_copy(update={"algorithm": algorithm}))
    await run.finish()
    for step in (1, 2):
        rows = read_rollouts(run.directory.rollouts / f"step_{step:06d}.parquet")
        groups: dict[int, list[float]] = {}
        for row in rows:
            groups.setdefault(row["group_id"], []).append(row["reward"])
        for row in rows:
            rewards = groups[row["group_id"]]
            others = (sum(rewards) - row["reward"]) / (len(rewards) - 1)
            assert row["advantages"] == pytest.approx([0.0, *[row["reward"] - others] * 2])


async def test_a_step_in_which_everything_is_masked_is_told(tmp_path: Path) -> None:
    """The fake's responses all reach the limit."""
    config = make_config(steps=1)
    algorithm = config.algorithm.model_copy(
        update={"overlong": OverlongConfig(mask_truncated=True)}
    )
    run = await start(tmp_path, config.model_copy(update={"algorithm": algorithm}))
    await run.finish()
    ((_, step),) = run.recorder.steps
    assert step["trained/responses"] == step["policy/updates"] == 0
    assert "trained/reward_mean" not in step
    assert step["rollout/truncated_share"] == 1
    (record,) = read_metrics(run.directory.metrics)
    assert record.notes == (
        "every response was truncated at generation.max_tokens and masked out of the loss: nothing was trained",
    )
    rows = read_rollouts(run.directory.rollouts / "step_000001.parquet")
    assert not any(row["trained"] or row["advantages"] for row in rows)


async def test_greedy_responses_count_in_the_throughput(tmp_path: Path) -> None:
    """They are sampled too, a response of two tokens for each of four prompts."""
    run = await start(tmp_path, make_config(steps=1, estimator="remax"))
    await run.finish()
    ((_, step),) = run.recorder.steps
    assert (step["rollout/tokens"], step["rollout/greedy_tokens"]) == (64, 8)
    assert step["throughput/generate"] == pytest.approx(72 / step["time/generate"])


async def test_failures_of_an_evaluation_are_its_own(tmp_path: Path) -> None:
    """Half of the responses of the evaluation before the first step fail; the first step counts none of them."""
    run = await start(tmp_path, make_config(steps=1, evaluate=1))
    scorer = run.workers.scorer
    assert isinstance(scorer, FirstTokenScorer)
    scorer.failures = PROBLEMS // 2
    await run.finish()
    (_, before), (_, after) = run.recorder.evaluations
    ((_, step),) = run.recorder.steps
    assert before["eval/errors"] == PROBLEMS // 2
    assert before["eval/accuracy"] <= 0.5
    assert "eval/errors" not in after
    assert step["reward/errors"] == 0


def break_rewards(run: Run, fails: Callable[[int], bool], *, drop: bool = False) -> None:
    """The scorer's function fails on the responses of a part for which `fails` says so."""
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


@pytest.mark.parametrize(("evaluate", "occasion"), [(0, "training"), (2, "evaluation")])
@pytest.mark.parametrize("rounds", [1, 3])
async def test_rewards_that_fail_from_the_start_end_the_run(
    tmp_path: Path, evaluate: int, occasion: str, rounds: int
) -> None:
    run = await start(tmp_path, make_config(steps=3, evaluate=evaluate, sampling_rounds=rounds))
    break_rewards(run, lambda row: row != 7)
    with pytest.raises(RewardFailureError, match=f"of the first {occasion} batch"):
        await run.finish()
    assert run.recorder.ends[0][0] == "failed"
    assert "update" not in run.stage.journal
    requests = [request for request in run.generator.requests if request.temperature]
    assert len(requests) == (1 if occasion == "training" else 0)  # no further round of sampling


async def test_dropped_responses_make_no_difference_to_a_group_of_equal_rewards(
    tmp_path: Path,
) -> None:
    """Dynamic sampling asks for two different rewards among those that are there."""
    run = await start(tmp_path, make_config(steps=2, sampling_rounds=3))
    break_rewards(run, lambda row: row == 0, drop=True)
    await run.finish()
    for _, step in run.recorder.steps:
        assert step["reward/dropped"] == 4  # one of each group
        assert step["reward/failed/first_token"] == step["rollout/responses"] / 8
        assert step["trained/equal_reward_groups"] * 4 == step["sampling/missing_groups"]


async def test_dynamic_sampling_resumes_to_the_same_result(tmp_path: Path) -> None:
    config = make_config(steps=4, sampling_rounds=3, save=2)
    await (await start(tmp_path / "whole", config)).finish()
    stopped = await start(tmp_path / "stopped", config)
    stopped.recorder.react = lambda step, at: (
        stopped.loop.request_stop() if (step, at) == (2, "update") else None
    )
    await stopped.finish()
    await (await start(tmp_path / "stopped", config, resume=True)).finish()
    assert_same_metrics(tmp_path / "whole", tmp_path / "stopped")


async def test_a_greedy_response_a_prompt_is_sampled_where_the_estimator_reads_it(
    tmp_path: Path,
) -> None:
    run = await start(tmp_path, make_config(steps=2, estimator="remax"))
    await run.finish()
    assert [
        (request.samples_per_prompt, request.temperature) for request in run.generator.requests
    ] == [(8, 1.0), (1, 0.0)] * 2
    assert all(step["advantage/mean_abs"] > 0 for _, step in run.recorder.steps)


async def test_adaptive_numbers_resume_with_the_run(tmp_path: Path) -> None:
    """The entropy temperature is tuned from batch to batch; a resumed run goes on with the value it had."""

    def tuned() -> RunConfig:
        made = make_config(steps=4, save=2, temperature=0.1)
        entropy = made.algorithm.entropy.model_copy(update={"target": 1.0})
        return made.model_copy(
            update={"algorithm": made.algorithm.model_copy(update={"entropy": entropy})}
        )

    await (await start(tmp_path / "whole", tuned())).finish()
    stopped = await start(tmp_path / "stopped", tuned())
    stopped.recorder.react = lambda step, at: (
        stopped.loop.request_stop() if (step, at) == (2, "update") else None
    )
    await stopped.finish()
    resumed = await start(tmp_path / "stopped", tuned(), resume=True)
    await resumed.finish()
    temperatures = [
        step["entropy/temperature"]
        for _, step in (*stopped.recorder.steps, *resumed.recorder.steps)
    ]
    assert len(set(temperatures)) == 4
    assert_same_metrics(tmp_path / "whole", tmp_path / "stopped")


async def test_a_temperature_that_is_changed_for_the_resume_replaces_the_tuned_one(
    tmp_path: Path,
) -> None:
    def tuned(temperature: float, steps: int) -> RunConfig:
        made = make_config(steps=steps, save=2, temperature=temperature)
        entropy = made.algorithm.entropy.model_copy(update={"target": 1.0})
        return made.model_copy(
            update={"algorithm": made.algorithm.model_copy(update={"entropy": entropy})}
        )

    await (await start(tmp_path, tuned(0.1, 2))).finish()
    resumed = await start(tmp_path, tuned(0.7, 3), resume=True)
    await resumed.finish()
    assert resumed.recorder.steps[0][1]["entropy/temperature"] == pytest.approx(0.7)


async def test_a_resume_with_another_batch_size_takes_the_next_prompts(tmp_path: Path) -> None:
    await (await start(tmp_path, make_config(steps=2, save=2))).finish()
    longer = make_config(steps=4, save=2)
    smaller = longer.model_copy(
        update={"trainer": longer.trainer.model_copy(update={"prompts_per_step": 2})}
    )
    resumed = await start(tmp_path, smaller, resume=True)
    assert await resumed.finish() == "finished"
    state = json.loads((tmp_path / "checkpoints/step_000004/trainer_state.json").read_text())
    assert state["prompts"]["prompts_taken"] == 2 * 4 + 2 * 2
    assert state["prompts"]["batches_taken"] == 4
