"""Rewards that fail in real runs of the tiny model: exit code, console and run.log."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlsys.data.rollout_files import read_rollouts
from rlsys.run.observers.metrics_log import read_metrics

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "tests" / "plugin_package"

SMALL = [
    *("--model.path", "tiny", "--generation.engine", "transformers"),
    *("--generation.dtype", "float32", "--policy.compute_dtype", "float32"),
    *("--generation.max_tokens", "8", "--generation.min_tokens", "0"),
    *("--generation.samples_per_prompt", "4", "--trainer.prompts_per_step", "4"),
    *("--data.synthetic.train_size", "40", "--data.synthetic.eval_size", "4"),
    *("--trainer.evaluation.every", "0", "--trainer.checkpoints.every", "0"),
    *("--trainer.steps", "2", "--plugins", "failing_rewards", "--reward.timeout_s", "0.2"),
]


def run(directory: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run the recipe for two small steps in a process of its own."""
    command = [sys.executable, "-m", "recipes.grpo_math", *SMALL]
    path = os.pathsep.join((str(ROOT), str(PLUGINS)))
    return subprocess.run(
        [*command, "--run.directory", str(directory), *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_a_run_whose_reward_always_fails_stops(tmp_path: Path):
    done = run(tmp_path / "run", "--reward.functions", "math,raises")
    assert done.returncode == 1, done.stdout + done.stderr

    log = (tmp_path / "run" / "run.log").read_text()
    message = (
        "reward.functions: 'raises' failed on 16 of the 16 responses of the first training batch; "
        "the first failure: error, ZeroDivisionError: float division by zero. "
        "Fix the function; its rewards are not usable."
    )

    for text in (done.stdout, log):
        assert message in text
        assert text.count("reward 'raises' failed (error): ZeroDivisionError") == 1
        assert 'failing_rewards.py", line ' in text
        assert "in _divide\n    return a / b" in text
    assert "Traceback" not in done.stderr
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == []  # nothing was trained on it


WAYS = {
    "gives_nan": "(error): ValueError: it returned nan; a reward must be finite",
    "gives_none": "(error): TypeError: it returned None; a reward is one number",
    "gives_list": "(error): TypeError: it returned [1.0] (list); a reward is one number",
    "gives_huge": (
        "(error): OverflowError: it returned -1e+39, which with weight 1 is beyond float32"
    ),
    "returns_coroutine": (
        "(error): TypeError: it returned a coroutine; a reward function is a plain"
    ),
    "hangs": "(timeout): no answer within reward.timeout_s 0.2",
    "calls_sys_exit": "(error): it called sys.exit('no more')",
    "calls_os_exit": "(crash): its process ended with exit code 7",
    "segfaults": "(crash): its process was ended by SIGSEGV",
}


def test_each_way_to_fail_is_named(tmp_path: Path):
    done = run(tmp_path / "run", "--reward.functions", f"math,{','.join(WAYS)}")
    assert done.returncode == 1, done.stdout + done.stderr

    log = (tmp_path / "run" / "run.log").read_text()
    for text in (done.stdout, log):
        for name, how in WAYS.items():
            assert text.count(f"reward {name!r} failed {how}") == 1, name
        assert " failed on 16 of the 16 responses of the first training batch" in text
        assert "reward 'math' failed" not in text
    assert "INFO workers.reward_worker: scored a completion of" in log  # what it printed
    assert "INFO workers.reward_worker: last words" in log


def test_a_first_evaluation_whose_rewards_fail_stops_the_run_too(tmp_path: Path):
    done = run(tmp_path / "run", "--reward.functions", "raises", "--trainer.evaluation.every", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "'raises' failed on 4 of the 4 responses of the first evaluation batch" in done.stdout


@pytest.mark.parametrize("on_failure", ["zero", "drop"])
def test_some_failures_are_counted_and_the_run_goes_on(on_failure: str, tmp_path: Path):
    directory = tmp_path / "run"
    done = run(directory, "--reward.functions", "sometimes,math", "--reward.on_failure", on_failure)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("reward 'sometimes' failed (error): KeyError: 'unlucky'") == 1

    files = sorted((directory / "rollouts").glob("step_*.parquet"))
    rows = [row for file in files for row in read_rollouts(file)]
    failed = [row for row in rows if row["failure"]]
    assert failed
    assert all(math.isnan(row["reward_sometimes"]) for row in failed)
    assert all(row["reward_math"] == 0.0 for row in failed)
    assert {math.isnan(row["reward"]) for row in failed} == {on_failure == "drop"}

    counts = [record.values for record in read_metrics(directory / "metrics.jsonl")]
    assert sum(values["reward/errors"] for values in counts) == len(failed)
    assert sum(values["reward/failed/sometimes"] for values in counts) == len(failed)
    if on_failure == "drop":
        assert sum(values.get("reward/dropped", 0.0) for values in counts) == len(failed)
        assert all(not any(row["advantages"] or []) for row in failed)

    assert f"sometimes {len(failed)}" in done.stdout  # in the summary
    assert "failed rewards" in (directory / "report.html").read_text()
