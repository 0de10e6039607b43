"""Evaluation, checkpoints, stops and failures, which do not depend on the kind of a step."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from rlsys.config import DataConfig, RunConfig
from rlsys.run.directory import RunDirectory
from rlsys.run.observers.console import print_summary
from rlsys.run.observers.html_report import write_report
from rlsys.run.observers.metrics_log import read_metrics
from tests.support.in_process_fakes import PROBLEMS, FirstTokenScorer
from tests.support.in_process_runs import (
    DEADLOCK_S,
    assert_same_metrics,
    make_config,
    start,
    without_times,
)


async def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """Eight steps at once have the same metrics, to 1e-6, as eight with a resume.

    There an actor dies in step 6, and the run is resumed from step 4.
    """
    config = make_config(steps=8, evaluate=2, save=2, kl=0.05, num_mini_batches=2, pass_at=2)
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
    # A record beyond the checkpoint, which the resume must remove.
    assert read_metrics(killed.directory.metrics)[-1].step == 5

    resumed = await start(tmp_path / "killed", config, resume=True)
    assert await resumed.finish() == "finished"
    assert resumed.recorder.first_step == 5
    assert_same_metrics(tmp_path / "whole", tmp_path / "killed")
    np.testing.assert_array_equal(resumed.policy.logits, whole.policy.logits)
    assert len(read_metrics(whole.directory.metrics)) == 8 + 5


async def test_different_seeds_differ(tmp_path: Path) -> None:
    """Otherwise the equality above would prove nothing."""
    for seed in (1, 2):
        await (await start(tmp_path / str(seed), make_config(seed=seed))).finish()
    with pytest.raises(AssertionError):
        assert_same_metrics(tmp_path / "1", tmp_path / "2")


async def test_a_failure_is_reported_with_its_place_and_leaves_the_checkpoint(
    tmp_path: Path,
) -> None:
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
        "This happened during update of step 3; the newest checkpoint is that of step 2, from "
        "which --resume continues."
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
    """Failures of background work, such as scoring during generation, end the run too."""
    run = await start(tmp_path, make_config(steps=2, kl=0.1, num_mini_batches=2))

    async def fail() -> None:
        raise OSError(f"no {event}")

    run.stage.hooks = {event: fail}
    with pytest.raises(OSError, match=f"no {event}"):
        await run.finish()
    ((outcome, message),) = run.recorder.ends
    assert (outcome, f"OSError: no {event}" in message) == ("failed", True)
    assert run.store.latest() is None


@pytest.mark.parametrize("phase", ["generate", "reward", "update", "sync"])
async def test_a_stop_request_ends_after_the_step_with_a_checkpoint(
    tmp_path: Path, phase: str
) -> None:
    """An evaluation is due after step 2, but the run stops without it.

    The resumed run evaluates first, and equals the uninterrupted one.
    """
    config = make_config(steps=4, evaluate=2)
    run = await start(tmp_path / "stopped", config)
    run.recorder.react = lambda step, at: (
        run.session.request_stop() if (step, at) == (2, phase) else None
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
            run.session.request_stop()
            await asyncio.Event().wait()

    run.stage.hooks = {"generate:greedy": hang}
    assert await run.finish() == "interrupted"
    assert run.recorder.checkpoints == [2]
    assert [step for step, _ in run.recorder.evaluations] == [0]


async def test_a_last_evaluation_that_was_stopped_is_done_after_a_resume(tmp_path: Path) -> None:
    """All steps are done, but the run is not finished without its last evaluation."""
    config = make_config(steps=2, evaluate=2)
    run = await start(tmp_path, config)
    run.recorder.react = lambda step, at: (
        run.session.request_stop() if (step, at) == (2, "evaluate") else None
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
    run.session.request_stop()
    assert await run.finish() == "interrupted"
    assert run.recorder.steps == run.recorder.evaluations == run.recorder.checkpoints == []


async def test_cancellation_leaves_at_once(tmp_path: Path) -> None:
    """A second Ctrl-C ends without waiting and without a checkpoint; observers are notified."""
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


async def test_checkpoint_holds_the_state_for_a_resume(tmp_path: Path) -> None:
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
        "returned": [],
        "prompts": PROBLEMS,
        "problems_digest": None,  # the prompts of these fakes have no problems behind them
    }
    assert state["metrics_position"] == 4  # evaluations 0 and 2, steps 1 and 2
    assert state["config"]["trainer"]["steps"] == 3
    assert {"torch", "numpy"} <= set(state["versions"])


async def test_failures_of_an_evaluation_are_its_own(tmp_path: Path) -> None:
    """Half of the responses of the first evaluation fail; the first step counts none of them."""
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


async def test_adaptive_numbers_resume_with_the_run(tmp_path: Path) -> None:
    """The entropy temperature is tuned from batch to batch; a resumed run continues with it."""

    def tuned() -> RunConfig:
        made = make_config(steps=4, save=2, temperature=0.1)
        entropy = made.algorithm.entropy.model_copy(update={"target": 1.0})
        return made.model_copy(
            update={"algorithm": made.algorithm.model_copy(update={"entropy": entropy})}
        )

    await (await start(tmp_path / "whole", tuned())).finish()
    stopped = await start(tmp_path / "stopped", tuned())
    stopped.recorder.react = lambda step, at: (
        stopped.session.request_stop() if (step, at) == (2, "update") else None
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
