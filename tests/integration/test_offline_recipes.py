"""Recipes on examples as a user runs them: processes, files, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet
import pytest

from docs.generate.metrics import documented
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


def values_of(directory: Path) -> dict[tuple[str, int], dict[str, float]]:
    """Return what does not depend on the clock or the process, by kind and step."""
    skipped = ("time/", "throughput/", "memory/")
    return {
        (record.kind, record.step): {
            name: value for name, value in record.values.items() if not name.startswith(skipped)
        }
        for record in read_metrics(directory / "metrics.jsonl")
    }


@pytest.mark.parametrize("recipe", sorted(SMALL))
def test_a_run_is_complete_and_a_resumed_one_gives_the_same_numbers(recipe: str, tmp_path: Path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = run(
        command(recipe, *SMALL[recipe], "--trainer.steps", "4", "--run.directory", str(whole))
    )
    assert done.returncode == 0, done.stdout + done.stderr
    expected = values_of(whole)
    assert {step for kind, step in expected if kind == "eval"} == {0, 2, 4}
    assert set(expected["eval", 4]) >= HELD_OUT[recipe]
    written = {name for values in expected.values() for name in values}
    assert [name for name in sorted(written) if documented(name) is None] == []

    page = (whole / "report.html").read_text()
    assert page.count("<svg") >= 4
    assert "training loss" in page
    assert "held-out loss" in done.stdout

    half = run(
        command(recipe, *SMALL[recipe], "--trainer.steps", "2", "--run.directory", str(parts))
    )
    assert half.returncode == 0, half.stdout + half.stderr
    rest = run(command(recipe, "--run.directory", str(parts), "--resume", "--trainer.steps", "4"))
    assert rest.returncode == 0, rest.stdout + rest.stderr
    # Schedules end at the last step, so a run of 2 steps differs; compare what does not.
    assert "changed: trainer.steps: 2 -> 4" in rest.stdout
    found = values_of(parts)
    assert set(found) == set(expected)
    assert found["eval", 0] == expected["eval", 0]

    again = run(command(recipe, "--run.directory", str(parts), "--resume"))
    assert again.returncode == 0
    assert "already complete" in again.stdout


def test_an_interrupt_saves_and_the_resumed_run_gives_the_same_numbers(tmp_path: Path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [*SMALL["sft_math"], "--trainer.steps", "8"]
    done = run(command("sft_math", *flags, "--run.directory", str(whole)))
    assert done.returncode == 0, done.stdout + done.stderr

    process = subprocess.Popen(
        command("sft_math", *flags, "--run.directory", str(parts)),
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
    recipe: str, rows: list[dict], flags: tuple[str, ...], message: str, tmp_path: Path
):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(command(recipe, *SMALL[recipe][4:], "--data.train", str(file), *flags, "--dry-run"))
    assert done.returncode == 2
    assert message in done.stderr
    assert all(line.startswith("error: ") for line in done.stderr.splitlines())


def test_rankings_are_made_twice_alike_and_train_a_reward_model(tmp_path: Path):
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

    again = run(command("make_rankings", "--model.path", "tiny", "--output", str(files[0])))
    assert again.returncode == 2
    assert "exists already" in again.stderr

    plan = run(
        command(
            "reward_model_math",
            *TRAINER,
            *SCORED,
            *("--data.train", str(files[0]), "--data.eval", "off", "--dry-run"),
        )
    )
    assert plan.returncode == 0, plan.stderr
    assert f"{tables[0].num_rows} training rankings" in plan.stdout
