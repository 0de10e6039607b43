"""Checkpoints that are written while the session trains on."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.config import RunConfig
from rlsys.run.checkpoints import MANIFEST, TRAINER_STATE
from rlsys.run.observers.metrics_log import read_metrics
from tests.support.in_process_runs import (
    DEADLOCK_S,
    Concurrency,
    Run,
    assert_same_metrics,
    make_config,
    start,
    wait,
    with_staleness,
)


def background(config: RunConfig, *, keep: int = 9) -> RunConfig:
    """Return the configuration with checkpoints in the background, and with many kept."""
    return with_checkpoints(config, asynchronous=True, keep=keep)


def with_checkpoints(config: RunConfig, **changes: Any) -> RunConfig:
    checkpoints = config.trainer.checkpoints.model_copy(update=changes)
    trainer = config.trainer.model_copy(update={"checkpoints": checkpoints})
    return config.model_copy(update={"trainer": trainer})


def steps_of(run: Run) -> list[int]:
    """Return the steps of the complete checkpoints."""
    return [int(path.name.removeprefix("step_")) for path in run.store.intact()]


def left_over(run: Run) -> list[str]:
    return [path.name for path in run.directory.checkpoints.glob("*.partial")]


def hold_writes(run: Run, until: int) -> None:
    """Let no write of the policy's files end before the update of a step."""
    released = asyncio.Event()
    updates = 0

    async def count() -> None:
        nonlocal updates
        updates += 1
        if updates >= until:
            released.set()

    run.stage.hooks = {"update": count, "write": lambda: wait(released)}


def contents(checkpoint: Path) -> dict[str, bytes]:
    """Return the files of a checkpoint but those that name the option itself."""
    return {
        str(file.relative_to(checkpoint)): file.read_bytes()
        for file in checkpoint.rglob("*")
        if file.is_file() and file.name not in (MANIFEST, TRAINER_STATE)
    }


def driver_state(checkpoint: Path) -> dict[str, Any]:
    """Return the driver's state without what differs between two runs of any kind."""
    state = json.loads((checkpoint / TRAINER_STATE).read_text())
    state["config"]["trainer"]["checkpoints"].pop("asynchronous")
    state.pop("metrics_position")  # times have more or fewer digits
    return state


@pytest.mark.parametrize("staleness", [0, 1])
async def test_checkpoints_are_those_that_are_saved_at_once(tmp_path: Path, staleness: int) -> None:
    """The first is written after two further updates, and is that of its step all the same."""
    config = with_checkpoints(make_config(steps=7, save=2, num_mini_batches=2), keep=9)
    concurrency = None
    if staleness:
        config, concurrency = with_staleness(config, max_staleness=1), Concurrency(workers=1)
    at_once = await start(tmp_path / "once", config, concurrency=concurrency)
    assert await at_once.finish() == "finished"

    run = await start(tmp_path / "later", background(config), concurrency=concurrency)
    hold_writes(run, until=4)
    assert await run.finish() == "finished"
    assert run.stage.journal.count("write") == run.stage.journal.count("copy") == 3
    first = run.stage.journal.index("write")
    assert run.stage.journal[first:].count("update") == 5

    np.testing.assert_array_equal(run.policy.logits, at_once.policy.logits)
    assert steps_of(run) == steps_of(at_once) == [2, 4, 6, 7]
    if not staleness:  # what is sampled ahead depends on the time
        assert_same_metrics(tmp_path / "once", tmp_path / "later")
    for left, right in zip(at_once.store.intact(), run.store.intact(), strict=True):
        assert contents(left) == contents(right)
        if not staleness:
            assert driver_state(left) == driver_state(right)
    assert len({contents(path)["policy.npz"] for path in run.store.intact()}) == 4


async def test_the_newest_checkpoint_is_the_one_before_until_it_is_sealed(tmp_path: Path) -> None:
    run = await start(tmp_path, background(make_config(steps=6, save=2)))
    hold_writes(run, until=4)
    seen: list[tuple[int, list[int]]] = []
    run.recorder.react = lambda step, phase: (
        seen.append((step, steps_of(run))) if phase == "update" else None
    )
    assert await run.finish() == "finished"
    assert seen[2:4] == [(3, []), (4, [])]
    assert 2 in seen[4][1]
    assert steps_of(run) == run.recorder.checkpoints == [2, 4, 6]
    assert left_over(run) == []

    values = dict(run.recorder.steps)
    assert "time/checkpoint_copy" in values[3]
    assert "time/checkpoint_write" in values[5]


async def test_a_second_checkpoint_waits_for_the_first_and_says_how_long(tmp_path: Path) -> None:
    config = background(make_config(steps=5, save=2), keep=1)
    run = await start(tmp_path, config)
    waited = asyncio.Event()

    def react(step: int, phase: str) -> None:
        if (step, phase) == (2, "checkpoint_write"):
            asyncio.get_running_loop().call_later(0.2, waited.set)

    run.recorder.react = react
    run.stage.hooks = {"write": lambda: wait(waited)}
    assert await run.finish() == "finished"

    assert run.recorder.checkpoints == [2, 4, 5]
    assert steps_of(run) == [5]  # keep is 1
    phases = [event for event in run.stage.journal if event.startswith("phase:checkpoint")]
    assert phases == [
        *("phase:checkpoint_copy", "phase:checkpoint_write", "phase:checkpoint_copy"),
        *(["phase:checkpoint_write"] if len(phases) == 5 else []),
        "phase:checkpoint",
    ]
    values = dict(run.recorder.steps)
    assert "time/checkpoint_wait" not in values[3]
    assert 0.2 <= values[5]["time/checkpoint_wait"] <= values[5]["time/checkpoint_write"]


async def test_the_last_checkpoint_is_written_at_once(tmp_path: Path) -> None:
    run = await start(tmp_path, background(make_config(steps=2, save=1)))
    assert await run.finish() == "finished"
    events = [event for event in run.stage.journal if event in ("copy", "write", "save")]
    assert events == ["copy", "write", "save"]


async def test_a_write_that_fails_ends_the_run_as_a_failing_save_does(tmp_path: Path) -> None:
    run = await start(tmp_path, background(make_config(steps=8, save=2)))
    writes = 0

    async def fail() -> None:
        nonlocal writes
        writes += 1
        if writes == 2:
            raise OSError("[Errno 5] Input/output error: model.safetensors")

    run.stage.hooks = {"write": fail}
    with pytest.raises(OSError, match="Input/output") as caught:
        await run.finish()
    assert caught.value.__notes__ == [
        "This happened during checkpoint_write of step 4; the newest checkpoint is that of step 2, "
        "from which --resume continues."
    ]
    ((outcome, message),) = run.recorder.ends
    assert outcome == "failed"
    assert message.startswith("checkpoint_write of step 4: OSError: [Errno 5] Input/output error")
    assert run.recorder.steps[-1][0] == 5  # it was noticed after the step in progress
    assert steps_of(run) == [2]
    assert left_over(run) == []

    resumed = await start(tmp_path, background(make_config(steps=8, save=2)), resume=True)
    assert await resumed.finish() == "finished"
    assert resumed.recorder.first_step == 3


async def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = await start(tmp_path, background(make_config(steps=4, save=2)))

    async def fail() -> None:
        usage = namedtuple("usage", "total used free")(100 << 30, 100 << 30, 1 << 20)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        raise RuntimeError("I/O error: write failed")

    run.stage.hooks = {"write": fail}
    with pytest.raises(OSError, match=r"trainer\.checkpoints: the disk .* is full"):
        await run.finish()


async def test_a_copy_that_fails_ends_the_run_in_the_pause(tmp_path: Path) -> None:
    run = await start(tmp_path, background(make_config(steps=4, save=2)))

    async def fail() -> None:
        raise MemoryError("no room for the copy")

    run.stage.hooks = {"copy": fail}
    with pytest.raises(MemoryError) as caught:
        await run.finish()
    assert "checkpoint_copy of step 2; there is no checkpoint yet" in caught.value.__notes__[0]
    assert run.recorder.steps[-1][0] == 2
    assert left_over(run) == []


async def test_a_stop_waits_for_the_checkpoint_that_is_being_written(tmp_path: Path) -> None:
    """It is asked for in step 3, while that of step 2 is written; both are complete at the end."""
    config = background(make_config(steps=6, save=2))
    whole = await start(tmp_path / "whole", config)
    await whole.finish()

    run = await start(tmp_path / "stopped", config)
    released = asyncio.Event()

    def react(step: int, phase: str) -> None:
        if (step, phase) == (3, "update"):
            run.session.request_stop()
        if phase == "checkpoint_write":
            released.set()

    run.recorder.react = react
    run.stage.hooks = {"write": lambda: wait(released)}
    assert await run.finish() == "interrupted"
    assert steps_of(run) == [2, 3]

    resumed = await start(tmp_path / "stopped", config, resume=True)
    assert await resumed.finish() == "finished"
    assert resumed.recorder.first_step == 4
    np.testing.assert_array_equal(resumed.policy.logits, whole.policy.logits)
    assert_same_metrics(tmp_path / "whole", tmp_path / "stopped")


async def test_a_stop_in_the_step_of_a_checkpoint_needs_no_second_one(tmp_path: Path) -> None:
    run = await start(tmp_path, background(make_config(steps=6, save=2)))
    run.recorder.react = lambda step, phase: (
        run.session.request_stop() if (step, phase) == (2, "other") else None
    )
    assert await run.finish() == "interrupted"
    assert run.recorder.checkpoints == [2]
    assert "save" not in run.stage.journal


async def test_a_rank_that_dies_meanwhile_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    config = background(make_config(steps=8, save=2))
    whole = await start(tmp_path / "whole", config)
    await whole.finish()

    run = await start(tmp_path / "killed", config)
    updates, writes = 0, 0

    async def die() -> None:
        nonlocal updates
        updates += 1
        if updates == 6:
            raise ConnectionError("rank 1 died")

    async def write() -> None:
        nonlocal writes
        writes += 1
        if writes == 2:
            await asyncio.Event().wait()  # that of step 4 is never complete

    run.stage.hooks = {"update": die, "write": write}
    with pytest.raises(ConnectionError) as caught:
        await run.finish()
    assert "that of step 2" in caught.value.__notes__[0]
    assert steps_of(run) == [2]
    assert left_over(run) == []

    resumed = await start(tmp_path / "killed", config, resume=True)
    assert await resumed.finish() == "finished"
    assert resumed.recorder.first_step == 3
    np.testing.assert_array_equal(resumed.policy.logits, whole.policy.logits)
    assert_same_metrics(tmp_path / "whole", tmp_path / "killed")


async def test_a_checkpoint_whose_files_are_complete_is_sealed_in_spite_of_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rlsys.run.checkpoints as checkpoints

    run = await start(tmp_path, background(make_config(steps=6, save=2)))
    failed = asyncio.Event()
    loop = asyncio.get_running_loop()
    at_once = checkpoints.seal

    def slow(directory: Path) -> None:
        asyncio.run_coroutine_threadsafe(failed.wait(), loop).result(DEADLOCK_S)
        at_once(directory)

    async def die() -> None:
        if run.recorder.steps and run.recorder.steps[-1][0] == 2:
            loop.call_later(0.05, failed.set)
            raise ConnectionError("a rank died")

    monkeypatch.setattr(checkpoints, "seal", slow)
    run.stage.hooks = {"update": die}
    with pytest.raises(ConnectionError) as caught:
        await run.finish()
    assert "that of step 2" in caught.value.__notes__[0]
    assert steps_of(run) == [2]


async def test_an_interrupt_discards_what_is_not_complete(tmp_path: Path) -> None:
    run = await start(tmp_path, background(make_config(steps=6, save=2)))
    task = asyncio.create_task(run.finish())

    async def hang() -> None:
        await asyncio.Event().wait()

    def interrupt(step: int, phase: str) -> None:
        if (step, phase) == (3, "update"):
            task.cancel()

    run.stage.hooks = {"write": hang}
    run.recorder.react = interrupt
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    assert run.recorder.ends[0][0] == "interrupted"
    assert steps_of(run) == []
    assert left_over(run) == []


async def test_the_times_are_written_with_the_steps(tmp_path: Path) -> None:
    run = await start(tmp_path, background(make_config(steps=6, save=2)))
    assert await run.finish() == "finished"
    records = {record.step: record.values for record in read_metrics(run.directory.metrics)}
    assert "time/checkpoint_copy" in records[3]
    assert not any("time/checkpoint" in values for values in records.values())
    assert sum("time/checkpoint_write" in values for values in records.values()) == 2
