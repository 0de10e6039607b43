"""Expert iteration and its grid as a user runs them: processes, files, exit codes."""

import csv
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from docs.generate.metrics import documented
from recipes.run_expert_grid import run_expert_grid
from recipes.run_expert_iteration import run_expert_iteration
from rlsys.data.rollout_files import read_rollouts
from rlsys.run.observers.metrics_log import read_metrics

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]

# One digit is enough to be right, which an untrained model is sometimes.
REWARD = ("--reward.functions", "[{name: example_digits, parameters: {per_digit: 0.5}}]")
SMALL = (
    *("--model.path", "tiny", "--generation.engine", "transformers"),
    *("--generation.dtype", "float32", "--policy.compute_dtype", "float32"),
    *("--generation.max_tokens", "8", "--expert.examples_per_update", "4"),
    *("--data.synthetic.train_size", "40", "--data.synthetic.eval_size", "4"),
    *("--plugins", "rlsys_example_plugin", *REWARD),
    *("--policy.optimizer.learning_rate", "1e-3"),
)
ONE = (*SMALL, "--trainer.prompts_per_step", "6", "--generation.samples_per_prompt", "4")


def command(recipe: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", f"recipes.{recipe}", *flags]


def environment() -> dict[str, str]:
    plugins = str(ROOT / "tests" / "plugin_package")
    return os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": plugins}


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400
    )


def values_of(directory: Path) -> dict[tuple[str, int], dict[str, float]]:
    """Return what does not depend on the clock or the process, by kind and step."""
    skipped = ("time/", "throughput/", "memory/")
    return {
        (record.kind, record.step): {
            name: value for name, value in record.values.items() if not name.startswith(skipped)
        }
        for record in read_metrics(directory / "metrics.jsonl")
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run of four steps."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    flags = (*ONE, "--trainer.steps", "4", "--run.directory", str(directory))
    done = run(command("expert_iteration_math", *flags))
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def test_a_run_trains_on_correct_responses_and_shows_what_it_did(whole: Path):
    expected = values_of(whole)
    evaluations = [("eval", step) for step in range(5)]
    assert sorted(expected) == [*evaluations, *(("train", step) for step in range(1, 5))]
    train = expected["train", 1]
    assert train["trained/responses"] > 0
    assert train["policy/updates"] > 1
    assert train["rollout/entropy"] > 0
    assert train["sync/logprob_difference_mean"] < 1e-3
    written = {name for values in expected.values() for name in values}
    assert [name for name in sorted(written) if documented(name) is None] == []

    rows = read_rollouts(whole / "rollouts" / "step_000001.parquet")
    kept = [tuple(row["token_ids"]) for row in rows if row["trained"]]
    right = {tuple(row["token_ids"]) for row in rows if row["correct"]}
    assert len(rows) == 24
    assert set(kept) == right
    assert len(kept) == len(right)
    page = (whole / "report.html").read_text()
    assert "Expert iteration: what is learned" in page
    assert "Entropy (nats per token)" in page


@pytest.mark.long
def test_an_interrupt_saves_and_the_resumed_run_gives_the_same_numbers(whole: Path, tmp_path: Path):
    """The interrupted run is one of three steps, and the resumed one makes four."""
    parts = tmp_path / "parts"
    process = subprocess.Popen(
        command(
            "expert_iteration_math", *ONE, "--trainer.steps", "3", "--run.directory", str(parts)
        ),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while process.poll() is None and ("train", 1) not in values_of(parts):
        time.sleep(0.2)  # read_metrics returns nothing before the file exists
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=200)
    assert process.returncode in (0, 130), output
    resumed = ("--run.directory", str(parts), "--resume")
    rest = run(command("expert_iteration_math", *resumed, "--trainer.steps", "4"))
    assert rest.returncode == 0, rest.stdout + rest.stderr
    assert values_of(parts) == values_of(whole)

    again = run(command("expert_iteration_math", *resumed))
    assert again.returncode == 0
    assert "already complete" in again.stdout


def test_steps_in_which_nothing_is_correct_are_shown_and_end_the_run(tmp_path: Path):
    """An untrained model solves no problem."""
    flags = [word for word in ONE if word not in REWARD]
    done = run(
        command(
            "expert_iteration_math",
            *flags,
            *("--trainer.steps", "4", "--expert.max_empty_steps", "2"),
            *("--run.directory", str(tmp_path / "run")),
        )
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "nothing was trained" in done.stdout
    assert "expert.max_empty_steps: in 2 steps in a row none of the 6 x 4 responses" in done.stdout
    assert values_of(tmp_path / "run")["train", 2]["policy/skipped_updates"] == 1


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        ("expert_iteration_math", ("--expert.epochs", "0"), "expert.epochs: 0 does not fit"),
        ("expert_iteration_math", ("--policy.num_mini_batches", "2"), "no such flag"),
        ("expert_iteration_math", ("--data.train", "none.parquet"), "no such file 'none.parquet'"),
        ("expert_iteration_math", ("--reward.functions", "none"), "reward.functions"),
        ("expert_iteration_grid", ("--expert.epochs", "2"), "Use --grid.epochs"),
        ("expert_iteration_grid", ("--grid.problems", "0"), "grid.problems"),
        ("expert_iteration_grid", ("--data.train", "none.parquet"), "no such file 'none.parquet'"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    recipe: str, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
):
    """Nothing starts, so the command runs in this process; it finds the plug-in by another name."""
    plugin = "tests.plugin_package.rlsys_example_plugin"
    small = [plugin if word == "rlsys_example_plugin" else word for word in SMALL]
    function = getattr(importlib.import_module(f"recipes.{recipe}"), recipe)
    start = run_expert_grid if recipe.endswith("grid") else run_expert_iteration
    with pytest.raises(SystemExit) as end:
        start(function, [*small, *flags, "--dry-run"])

    errors = capsys.readouterr().err
    assert end.value.code == 2
    assert message in errors
    assert len(errors.splitlines()) == 1
    assert errors.startswith("error: ")


@pytest.mark.long
def test_a_grid_makes_each_run_once_and_summarizes_them(tmp_path: Path):
    directory = ("--run.directory", str(tmp_path / "grid"))
    values = ("--grid.samples", "2,4", "--grid.epochs", "1", "--grid.problems", "4")
    done = run(
        command("expert_iteration_grid", *SMALL, *values, "--trainer.steps", "1", *directory)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "grid" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["samples"], row["state"], row["steps"]) for row in rows] == [
        ("2", "finished", "1"),
        ("4", "finished", "1"),
    ]
    assert (tmp_path / "grid" / "summary.html").read_text().count("<svg") >= 4
    assert (tmp_path / "grid" / "samples_4-epochs_1-problems_4" / "report.html").exists()

    # A finished run is not made again, and a new value adds its own.
    first = tmp_path / "grid" / "samples_2-epochs_1-problems_4" / "metrics.jsonl"
    before = first.stat().st_mtime_ns
    more = run(command("expert_iteration_grid", *directory, "--resume", "--grid.samples", "2,4,1"))
    assert more.returncode == 0, more.stdout + more.stderr
    assert more.stdout.count("finished already") == 2
    assert first.stat().st_mtime_ns == before
    with (tmp_path / "grid" / "summary.csv").open() as file:
        assert [row["samples"] for row in csv.DictReader(file)] == ["1", "2", "4"]
