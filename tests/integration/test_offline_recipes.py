"""Recipes on examples as a user runs them: processes, files, exit codes."""

import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest

from docs.generate.metrics import documented
from recipes.make_rankings import run_rankings
from recipes.run_offline import run_offline
from rlsys.run.directory import RunDirectory
from rlsys.run.observers.metrics_log import read_metrics
from rlsys.run.observers.run_status import read_status

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]

DATA = ("--data.synthetic.train_size", "40", "--data.synthetic.eval_size", "4")
TRAINER = (
    *("--trainer.examples_per_step", "4", "--trainer.evaluation.every", "2"),
    *("--trainer.checkpoints.every", "2", "--model.path", "tiny"),
)
POLICY = (
    *("--policy.compute_dtype", "float32", "--generation.engine", "transformers"),
    *("--generation.dtype", "float32", "--generation.max_tokens", "8"),
    *("--policy.optimizer.warmup_steps", "0"),
)
SCORED = ("--reward_model.compute_dtype", "float32", "--reward_model.optimizer.warmup_steps", "0")
SMALL = {
    "sft_math": (*DATA, *TRAINER, *POLICY),
    "dpo_math": (*DATA, *TRAINER, *POLICY),
    "reward_model_math": (*DATA, *TRAINER, *SCORED, "--data.responses", "4"),
    "process_reward_model_math": (*DATA, *TRAINER, *SCORED),
}
STEPS = ("--trainer.steps", "4")
HELD_OUT = {
    "sft_math": {"eval/loss", "eval/accuracy"},
    "dpo_math": {"eval/loss", "eval/accuracy", "eval/preference_accuracy"},
    "reward_model_math": {"eval/loss", "eval/ranking_accuracy"},
    "process_reward_model_math": {"eval/loss", "eval/step_accuracy"},
}


def command(recipe: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", f"recipes.{recipe}", *flags]


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    plugins = str(ROOT / "tests" / "plugin_package")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": plugins}
    return subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )


def run_here(
    capsys: pytest.CaptureFixture[str], recipe: str, *flags: str
) -> tuple[object, str, str]:
    """Run a command that starts nothing in this process; return exit code, output and errors."""
    function = getattr(importlib.import_module(f"recipes.{recipe}"), recipe)
    with pytest.raises(SystemExit) as end:
        run_offline(function, flags)
    printed = capsys.readouterr()
    return end.value.code, printed.out, printed.err


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
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """Return a function that trains a recipe for four steps, once.

    It returns the run's directory and what it printed.
    """

    @functools.cache
    def trained(recipe: str) -> tuple[Path, str]:
        directory = tmp_path_factory.mktemp(recipe) / "run"
        done = run(command(recipe, *SMALL[recipe], *STEPS, "--run.directory", str(directory)))
        assert done.returncode == 0, done.stdout + done.stderr
        return directory, done.stdout

    return trained


@pytest.mark.parametrize("recipe", sorted(SMALL))
def test_a_run_is_complete_and_a_resumed_one_gives_the_same_numbers(
    recipe: str,
    train: Callable[[str], tuple[Path, str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    whole, output = train(recipe)
    expected = values_of(whole)
    assert {step for kind, step in expected if kind == "eval"} == {0, 2, 4}
    assert set(expected["eval", 4]) >= HELD_OUT[recipe]
    written = {name for values in expected.values() for name in values}
    assert [name for name in sorted(written) if documented(name) is None] == []

    page = (whole / "report.html").read_text()
    assert page.count("<svg") >= 4
    assert "training loss" in page
    assert "held-out loss" in output

    # As if the run had been killed after its second step.
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step_000004")
    rest = run(command(recipe, "--run.directory", str(parts), "--resume"))
    assert rest.returncode == 0, rest.stdout + rest.stderr
    found = values_of(parts)
    assert set(found) == set(expected)
    assert found["eval", 0] == expected["eval", 0]
    for key, numbers in expected.items():
        assert found[key] == pytest.approx(numbers, abs=1e-6), key

    resumed = ("--run.directory", str(parts), "--resume")
    code, output, _ = run_here(capsys, recipe, *resumed)
    assert code == 0
    assert "already complete" in output
    code, output, _ = run_here(capsys, recipe, *resumed, "--trainer.steps", "6", "--dry-run")
    assert code == 0
    assert "changed: trainer.steps: 4 -> 6" in output


@pytest.mark.long
def test_an_interrupt_saves_and_the_resumed_run_gives_the_same_numbers(
    train: Callable[[str], tuple[Path, str]], tmp_path: Path
):
    whole, _ = train("sft_math")
    parts = tmp_path / "parts"
    process = subprocess.Popen(
        command("sft_math", *SMALL["sft_math"], *STEPS, "--run.directory", str(parts)),
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while process.poll() is None and ("train", 1) not in values_of(parts):
        time.sleep(0.2)  # read_metrics returns nothing before the file exists
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=200)
    assert process.returncode in (0, 130), output
    rest = run(command("sft_math", "--run.directory", str(parts), "--resume"))
    assert rest.returncode == 0, rest.stdout + rest.stderr
    assert values_of(parts) == values_of(whole)
    status = read_status(RunDirectory(parts))
    assert status is not None
    assert status.state == "finished"


@pytest.mark.parametrize(
    ("recipe", "rows", "flags", "message"),
    [
        ("sft_math", [{"inst": "a", "out": "b"}], (), "--data.columns.prompt"),
        ("dpo_math", [{"prompt": "a", "completion": "b"}], (), "--data.columns.chosen"),
        ("dpo_math", [{"prompt": "a", "responses": ["b"]}], (), "has 1 response"),
        (
            "reward_model_math",
            [{"prompt": "a", "responses": ["b", "c"], "ranks": [0, 0]}],
            ("--data.eval", "off"),
            "no pair is left",
        ),
        ("sft_math", [{"text": " "}], (), "'text' is blank"),
        ("sft_math", [{"prompt": "a", "completion": "b"}], ("--objective.beta", "1"), "no such"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    recipe: str,
    rows: list[dict],
    flags: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ("--data.train", str(file))
    code, _, errors = run_here(capsys, recipe, *SMALL[recipe][4:], *data, *flags, "--dry-run")
    assert code == 2
    assert message in errors
    assert all(line.startswith("error: ") for line in errors.splitlines())


def test_rankings_are_made_twice_alike_and_train_a_reward_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for file in files:
        done = run(
            command(
                "make_rankings",
                *("--model.path", "tiny", "--generation.engine", "transformers"),
                *("--generation.dtype", "float32", "--generation.max_tokens", "6"),
                *("--data.synthetic.train_size", "8", "--output", str(file)),
                *("--plugins", "rlsys_example_plugin", "--reward.functions", "example_digits"),
            )
        )
        assert done.returncode == 0, done.stdout + done.stderr
    tables = [pyarrow.parquet.read_table(file) for file in files]
    assert tables[0].equals(tables[1])
    assert all(len(set(ranks)) > 1 for ranks in tables[0]["ranks"].to_pylist())

    with pytest.raises(SystemExit) as again:
        run_rankings(["--model.path", "tiny", "--output", str(files[0])])
    assert again.value.code == 2
    assert "exists already" in capsys.readouterr().err

    data = ("--data.train", str(files[0]), "--data.eval", "off")
    code, plan, errors = run_here(
        capsys, "reward_model_math", *TRAINER, *SCORED, *data, "--dry-run"
    )
    assert code == 0, errors
    assert f"{tables[0].num_rows} training rankings" in plan
