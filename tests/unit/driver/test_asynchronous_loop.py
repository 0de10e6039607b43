"""The asynchronous loop on in-process fakes: its samples, their age, its time, its checkpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from docs.generate.metrics import documented
from rlsys.config import RunConfig
from rlsys.config.trainer import OnStale
from rlsys.data.rollout_files import read_rollouts
from rlsys.driver.ports import WeightSyncError
from rlsys.run.directory import RunDirectory
from rlsys.run.observers.metrics_log import read_metrics
from rlsys.run.observers.observer import Outcome
from rlsys.simulate.simulated_time import SimulatedLoop, simulate
from tests.support.in_process_runs import (
    Concurrency,
    Run,
    make_config,
    start,
    with_staleness,
    without_times,
)

OWN = ("staleness/", "queue/", "idle/")  # metrics that the synchronous loop has not
GROUPS = 4  # per step, of `make_config`


async def slowly(
    path: Path,
    config: RunConfig,
    loop: SimulatedLoop,
    *,
    workers: int = 2,
    group_s: Callable[[int], float] = lambda group: 1.0,
    update_s: float = 2.0,
    resume: bool = False,
) -> Run:
    """Return an asynchronous run in which groups and updates take simulated time."""
    concurrency = Concurrency(workers=workers, seconds=group_s)
    run = await start(path, config, concurrency=concurrency, clock=loop.time, resume=resume)
    run.stage.hooks["update"] = lambda: asyncio.sleep(update_s)
    return run


def trained(run: Run) -> list[int]:
    """Return the ids of all groups that were trained, in their order."""
    return [group for batch in run.batches for group in batch["group_ids"]]


# Staleness 0


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    "config",
    [
        make_config(steps=8, evaluate=4, save=3, num_mini_batches=2),
        make_config(steps=4, kl=0.05, estimator="rloo"),
        make_config(steps=4, temperature=0.1, estimator="reinforce_baseline"),
    ],
    ids=["mini-batches", "kl", "entropy"],
)
async def test_without_staleness_metrics_are_those_of_the_synchronous_loop(
    tmp_path: Path, config: RunConfig, workers: int
) -> None:
    """Groups finish in any order: the later ones of a batch first."""
    synchronous = await start(tmp_path / "synchronous", config)
    assert await synchronous.finish() == "finished"

    concurrency = Concurrency(workers=workers, seconds=lambda group: 0.001 * (-group % 4))
    asynchronous = await start(tmp_path / "asynchronous", config, concurrency=concurrency)
    assert await asynchronous.finish() == "finished"

    expected = without_times(read_metrics(synchronous.directory.metrics))
    found = without_times(read_metrics(asynchronous.directory.metrics))
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    for (kind, _, values), (_, _, own) in zip(expected, found, strict=True):
        assert {n: v for n, v in own.items() if not n.startswith(OWN)} == pytest.approx(
            values, abs=1e-6
        )
        if kind == "train":
            assert own["staleness/max"] == own["staleness/dropped_groups"] == 0
    np.testing.assert_array_equal(synchronous.policy.logits, asynchronous.policy.logits)


# Staleness above 0


def test_training_and_sampling_overlap(tmp_path: Path) -> None:
    """Two workers sample 4 groups of 1 s in 2 s, and an update takes 2 s.

    By turns a step takes 4 s. With staleness 1 the groups of a step are sampled during the update
    before it, so that after the first 2 s each step takes 2 s.
    """
    steps = 10

    async def run(loop: SimulatedLoop, staleness: int) -> tuple[float, Run]:
        config = with_staleness(make_config(steps=steps), max_staleness=staleness)
        made = await slowly(tmp_path / str(staleness), config, loop)
        assert await made.loop.run() == "finished"
        return loop.time(), made

    by_turns, _ = simulate(lambda loop: run(loop, 0))
    overlapped, made = simulate(lambda loop: run(loop, 1))
    assert by_turns == pytest.approx(4 * steps)
    assert overlapped == pytest.approx(2 + 2 * steps)

    values = [values for _, values in made.recorder.steps]
    assert [value["staleness/mean"] for value in values] == [0] + [1] * (steps - 1)
    assert [value["idle/trainer"] for value in values] == pytest.approx([2] + [0] * (steps - 1))
    # In the last update nothing is left to sample.
    assert [value["idle/generation"] for value in values] == pytest.approx([0] * (steps - 1) + [2])
    assert all("throughput/generate" not in value for value in values)
    assert all(documented(name) for value in values for name in value)


def test_a_long_response_holds_up_one_worker_and_not_the_step(tmp_path: Path) -> None:
    """Group 0 takes 9 s, the others 1 s: by turns step 1 waits for it, else not."""

    async def run(loop: SimulatedLoop, staleness: int) -> Run:
        config = with_staleness(make_config(steps=4), max_staleness=staleness)
        made = await slowly(
            tmp_path / str(staleness), config, loop, group_s=lambda g: 9.0 if g == 0 else 1.0
        )
        assert await made.loop.run() == "finished"
        return made

    by_turns = simulate(lambda loop: run(loop, 0))
    assert by_turns.recorder.steps[0][1]["time/generate"] == pytest.approx(9)
    overlapped = simulate(lambda loop: run(loop, 2))
    assert overlapped.recorder.steps[0][1]["time/generate"] == pytest.approx(4)
    assert overlapped.batches[0]["group_ids"] == [1, 2, 3, 4]


STALE_CASES: list[tuple[OnStale, list[int], float]] = [
    # Group 0 begins under version 0 and ends at 9 s, when version 2 is the newest.
    ("drop", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], 1),
    ("resample", [1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 10, 11], 1),
    ("train", [1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 10, 11], 0),
]


@pytest.mark.parametrize(("on_stale", "order", "dropped"), STALE_CASES)
def test_a_group_that_is_overtaken(
    tmp_path: Path, on_stale: OnStale, order: list[int], dropped: float
) -> None:
    async def run(loop: SimulatedLoop) -> Run:
        config = with_staleness(make_config(steps=3), max_staleness=1, on_stale=on_stale)
        made = await slowly(
            tmp_path, config, loop, group_s=lambda g: 9.0 if g == 0 else 1.0, update_s=1.0
        )
        assert await made.loop.run() == "finished"
        return made

    made = simulate(run)
    assert trained(made) == order
    values = [values for _, values in made.recorder.steps]
    assert sum(value["staleness/dropped_groups"] for value in values) == dropped
    assert max(value["staleness/max"] for value in values) == (2 if on_stale == "train" else 1)
    # What was sampled and not trained is in the metrics of all samples, and in the files.
    sampled = sum(value["rollout/responses"] for value in values)
    assert sampled == (len(order) + dropped) * 8
    last = read_rollouts(RunDirectory(tmp_path).rollouts / "step_000003.parquet")
    assert len(last) == (GROUPS + dropped) * 8


@settings(max_examples=30, deadline=None)
@given(
    durations=st.lists(st.floats(0.01, 9.0), min_size=5, max_size=5),
    update_s=st.floats(0.01, 5.0),
    workers=st.integers(1, 6),
    staleness=st.integers(0, 3),
    on_stale=st.sampled_from(["drop", "resample"]),
    groups_per_call=st.integers(1, 3),
)
def test_no_group_is_older_than_the_bound_and_none_is_trained_twice(
    durations: list[float],
    update_s: float,
    workers: int,
    staleness: int,
    on_stale: OnStale,
    groups_per_call: int,
) -> None:
    steps = 5

    async def run(loop: SimulatedLoop, path: Path) -> Run:
        config = with_staleness(
            make_config(steps=steps),
            max_staleness=staleness,
            on_stale=on_stale,
            groups_per_call=groups_per_call,
        )
        made = await slowly(
            path,
            config,
            loop,
            workers=workers,
            group_s=lambda group: durations[group % len(durations)],
            update_s=update_s,
        )
        most = 0

        async def count() -> None:
            nonlocal most
            queue = made.loop._queue  # pyright: ignore[reportAttributeAccessIssue]
            most = max(most, queue.running + queue.ready)

        made.stage.hooks["group"] = count
        assert await made.loop.run() == "finished"
        assert most <= (staleness + 1) * GROUPS
        return made

    with TemporaryDirectory() as folder:
        made = simulate(lambda loop: run(loop, Path(folder)))
    assert len(made.batches) == steps
    for version, batch in enumerate(made.batches):
        assert all(0 <= version - sampled <= staleness for sampled in batch["versions"])
    ids = trained(made)
    assert len(set(ids)) == len(ids) == steps * GROUPS
    for batch in made.batches:  # a step is in the order of the stream
        assert batch["group_ids"] == sorted(batch["group_ids"])
    if staleness == 0:
        assert ids == list(range(steps * GROUPS))


async def test_old_logprobs_are_of_the_weights_that_are_trained(tmp_path: Path) -> None:
    """`rollout` differ from `old` exactly in the batches of older weights."""
    config = with_staleness(make_config(steps=4, num_mini_batches=2), max_staleness=2)
    made = await start(tmp_path, config, concurrency=Concurrency(workers=3))
    made.stage.hooks["update"] = lambda: asyncio.sleep(0.01)
    assert await made.finish() == "finished"
    for version, (_, values) in enumerate(made.recorder.steps):
        prefix = "staleness/effective_sample_size/"
        sizes = {int(n.removeprefix(prefix)): v for n, v in values.items() if n.startswith(prefix)}
        assert {version - age for age in sizes} == made.batches[version]["versions"]
        assert all((size < 1 - 1e-6) == (age > 0) for age, size in sizes.items())
    ages = [values["staleness/max"] for _, values in made.recorder.steps]
    differences = [batch["old_difference"] for batch in made.batches]
    assert ages[0] == 0
    assert max(ages) >= 1
    assert [difference > 1e-3 for difference in differences] == [age > 0 for age in ages]
    rollouts = read_rollouts(made.directory.rollouts / "step_000004.parquet")
    assert 3 - min(row["weight_version"] for row in rollouts) == ages[3]


async def test_learns(tmp_path: Path) -> None:
    config = with_staleness(make_config(steps=40), max_staleness=2)
    made = await start(tmp_path, config, concurrency=Concurrency(workers=3))
    assert await made.finish() == "finished"
    rewards = [values["reward/mean"] for _, values in made.recorder.steps]
    assert np.mean(rewards[:3]) < 0.35
    assert np.mean(rewards[-3:]) > 0.8


def test_dynamic_sampling_replaces_groups_without_a_signal(tmp_path: Path) -> None:
    """All trained groups have a signal, except for fillers, which the loss leaves out."""

    async def run(loop: SimulatedLoop) -> Run:
        config = make_config(steps=12, sampling_rounds=3, by="reward")
        made = await slowly(tmp_path, with_staleness(config, max_staleness=1), loop, workers=3)
        assert await made.loop.run() == "finished"
        return made

    made = simulate(run)
    values = [values for _, values in made.recorder.steps]
    assert sum(value["sampling/replaced_groups"] for value in values) > 0
    for step, value in enumerate(values, start=1):
        sampled = GROUPS + value["sampling/replaced_groups"] + value["staleness/dropped_groups"]
        assert value["rollout/responses"] == sampled * 8
        assert value["trained/responses"] == (GROUPS - value["sampling/missing_groups"]) * 8
        assert value["sampling/rounds"] <= 3
        rewards: dict[int, set[float]] = {}
        for row in read_rollouts(made.directory.rollouts / f"step_{step:06d}.parquet"):
            if row["trained"]:
                rewards.setdefault(row["group_id"], set()).add(row["reward"])
        assert all(len(found) > 1 for found in rewards.values())
    ids = trained(made)
    assert len(set(ids)) == len(ids) == 12 * GROUPS
    assert all(documented(name) for value in values for name in value)


# Checkpoints, stops, failures


def test_a_resumed_run_samples_again_what_was_not_trained(tmp_path: Path) -> None:
    """Stop after step 3, with groups ready and in work; every prompt is trained once."""
    config = with_staleness(make_config(steps=8), max_staleness=2, on_stale="resample")

    async def until_stopped(loop: SimulatedLoop) -> tuple[Outcome, Run]:
        made = await slowly(tmp_path, config, loop, workers=3)
        made.recorder.react = lambda step, phase: (
            made.session.request_stop() if (step, phase) == (3, "update") else None
        )
        return await made.loop.run(), made

    async def to_the_end(loop: SimulatedLoop) -> Run:
        made = await slowly(tmp_path, config, loop, workers=3, resume=True)
        assert await made.loop.run() == "finished"
        return made

    outcome, stopped = simulate(until_stopped)
    assert outcome == "interrupted"
    assert stopped.recorder.checkpoints == [3]
    sampled = {group for slot in stopped.generator.slots for group in slot.groups}
    assert len(sampled) > 3 * GROUPS, "some groups must be ahead of training"

    resumed = simulate(to_the_end)
    ids = trained(stopped) + trained(resumed)
    assert sorted(ids) == list(range(8 * GROUPS))
    assert resumed.batches[0]["versions"] == {3}
    steps = [record.step for record in read_metrics(stopped.directory.metrics)]
    assert steps == list(range(1, 9))


async def test_a_checkpoint_of_one_loop_resumes_in_the_other(tmp_path: Path) -> None:
    asynchronous = with_staleness(make_config(steps=8, save=2), max_staleness=1)
    stopped = await start(tmp_path, asynchronous, concurrency=Concurrency(workers=3))
    stopped.recorder.react = lambda step, phase: (
        stopped.session.request_stop() if (step, phase) == (2, "update") else None
    )
    assert await stopped.finish() == "interrupted"

    synchronous = await start(tmp_path, make_config(steps=4, save=2), resume=True)
    assert await synchronous.finish() == "finished"
    again = await start(tmp_path, asynchronous, concurrency=Concurrency(workers=3), resume=True)
    assert await again.finish() == "finished"
    ids = [*trained(stopped), *trained(synchronous), *trained(again)]
    assert sorted(ids) == list(range(8 * GROUPS))


async def test_evaluations_are_of_the_weights_of_their_step(tmp_path: Path) -> None:
    config = with_staleness(make_config(steps=4, evaluate=2), max_staleness=2)
    made = await start(tmp_path, config, concurrency=Concurrency(workers=2))
    versions: list[tuple[int, int]] = []

    async def note() -> None:
        versions.append((made.session.step, made.generator.version))

    made.stage.hooks["generate:greedy"] = note
    assert await made.finish() == "finished"
    assert versions == [(0, 0), (2, 2), (4, 4)]
    assert [step for step, _ in made.recorder.evaluations] == [0, 2, 4]


async def test_the_groups_of_a_worker_that_dies_go_to_another(tmp_path: Path) -> None:
    config = with_staleness(make_config(steps=5), max_staleness=1, groups_per_call=2)
    made = await start(tmp_path, config, concurrency=Concurrency(workers=2))
    for slot in made.generator.slots:
        slot.deaths = {1, 6, 9}
    assert await made.finish() == "finished"
    ids = trained(made)
    assert len(set(ids)) == len(ids) == 5 * GROUPS
    assert {1, 6, 9} <= set(ids)


def test_a_worker_that_dies_while_it_is_idle_holds_up_no_prompts(tmp_path: Path) -> None:
    """It waits for a place, perhaps until the end of the run; the other samples everything."""

    async def run(loop: SimulatedLoop) -> Run:
        config = with_staleness(make_config(steps=5), max_staleness=1)
        made = await slowly(tmp_path, config, loop)

        async def update() -> None:
            await asyncio.sleep(9.0)  # by then nothing is left to sample
            made.generator.slots[0].working.clear()

        made.stage.hooks["update"] = update
        assert await made.loop.run() == "finished"
        return made

    ids = trained(simulate(run))
    assert len(set(ids)) == len(ids) == 5 * GROUPS


async def test_an_error_of_a_worker_or_a_reward_ends_the_run(tmp_path: Path) -> None:
    async def fail() -> None:
        raise RuntimeError("broken")

    for event in ("group", "scoring"):
        config = with_staleness(make_config(steps=5), max_staleness=1)
        made = await start(tmp_path / event, config, concurrency=Concurrency(workers=2))
        made.stage.hooks[event] = fail
        with pytest.raises(RuntimeError, match="broken"):
            await made.finish()
        assert made.recorder.ends[-1][0] == "failed"


async def test_an_engine_with_other_weights_ends_the_run(tmp_path: Path) -> None:
    """The trainer does not wait for the comparison, and its error still ends the run."""
    config = with_staleness(make_config(steps=9), max_staleness=2)
    made = await start(tmp_path, config, concurrency=Concurrency(workers=2))
    publisher = made.workers.weights
    installed = publisher._installed  # pyright: ignore[reportAttributeAccessIssue]

    async def differs(busy: list) -> dict:
        report = await installed(busy)
        if made.generator.version == 2:
            raise WeightSyncError("they differ")
        return report

    publisher._installed = differs  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(WeightSyncError, match="they differ"):
        await made.finish()
    assert made.session.step < 9


async def test_handles_are_dropped(tmp_path: Path) -> None:
    """Between two steps the handles of ready groups are alive, at most 2 for each."""
    config = with_staleness(make_config(steps=6, num_mini_batches=2), max_staleness=2)
    made = await start(tmp_path, config, concurrency=Concurrency(workers=2))
    alive: list[int] = []
    made.recorder.at_step = lambda: alive.append(len(made.stage.handles))
    assert await made.finish() == "finished"
    assert max(alive) <= 2 * 3 * GROUPS
    assert alive[-1] == 0
