"""Runs as a user starts them, whose ranks die or hang: they go on in the same process."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlsys.run.observers.metrics_log import read_metrics
from tests.support.disturbed_runs import (
    FLAGS,
    DisturbedRun,
    differences,
    faults_of,
    undisturbed,
)

pytestmark = pytest.mark.slow
TIMEOUT_S = 400.0
STEPS = ("--trainer.steps", "5")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("whole") / "run"
    with undisturbed(directory, *FLAGS, *STEPS, timeout_s=TIMEOUT_S):
        yield directory


def test_a_killed_rank_costs_the_steps_since_the_checkpoint_and_nothing_else(
    whole: Path, tmp_path: Path
):
    """Kill the policy in step 4, where the checkpoint is that of step 2, then the critic."""
    directory = tmp_path / "run"
    with DisturbedRun(directory, *FLAGS, *STEPS) as run:
        assert run.wait_until(lambda status: status.step >= 1, TIMEOUT_S)
        (policy,) = run.processes("policy rank")
        assert run.wait_until(lambda status: status.step >= 3, TIMEOUT_S)
        policy.kill()
        assert run.wait_until(lambda status: status.step == 2, TIMEOUT_S), "it starts again"
        (critic,) = run.processes("critic rank")
        assert run.wait_until(lambda status: status.phase == "generate of step 5", TIMEOUT_S)
        critic.kill()
        ended = run.end(TIMEOUT_S)
        assert ended.code == 0, ended.output
        assert run.left_over() == []

    assert differences(directory, whole) == []
    faults = faults_of(directory)
    assert [(fault["kind"], fault["step"]) for fault in faults] == [
        ("training_group", 4),
        ("training_group", 5),
    ]
    assert ended.output.count("policy-0 died") == 1
    assert "step_000002 (1 step lost)" in ended.output
    assert "step_000004 (0 steps lost)" in ended.output
    last = [r for r in read_metrics(directory / "metrics.jsonl") if r.kind == "train"][-1]
    assert last.values["faults/training_group"] == 2
    assert "policy-0 died" in (directory / "report.html").read_text()
    (error,) = (directory / "failures").glob("01_step_000004_*/error.txt")
    assert "of step 4; the newest checkpoint is that of step 2" in error.read_text()


@pytest.mark.long
def test_a_hang_leaves_the_stacks_of_all_actors_and_heals(whole: Path, tmp_path: Path):
    directory = tmp_path / "run"
    with DisturbedRun(directory, *FLAGS, *STEPS, "--trainer.phase_timeout_s", "30") as run:
        assert run.wait_until(lambda status: status.step >= 3, TIMEOUT_S)
        (policy,) = run.processes("policy rank")
        policy.send_signal(signal.SIGSTOP)
        ended = run.end(TIMEOUT_S)
        assert ended.code == 0, ended.output
        assert run.left_over() == []

    assert differences(directory, whole) == []
    (fault,) = faults_of(directory)
    assert fault["kind"] == "phase_timeout"
    (stacks,) = (directory / "failures").glob("*/stacks.txt")
    text = stacks.read_text()
    for name in ("driver", "policy-0", "reference-0", "critic-0", "generation-0", "reward-0"):
        assert f"===== {name}, process" in text
    assert "state: stopped" in text
    assert text.count("Thread") > 5
