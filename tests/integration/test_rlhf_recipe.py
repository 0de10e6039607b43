"""The pipeline as a user runs it: all stages, an interrupt, a resume, the comparison."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from rlsys.run.observers.metrics_log import read_metrics

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]

ENGINE = {"engine": "transformers", "dtype": "float32", "max_tokens": 6}
OPTIMIZER = {"learning_rate": 1e-3, "warmup_steps": 0}
LOOP = {
    "steps": 2,
    "evaluation": {"every": 2},
    "checkpoints": {"every": 1},
}
# The rankings are made by a rule that also sees differences between the samples of a random model.
SMALL = {
    "plugins": ["rlsys_example_plugin"],
    "model": {"path": "tiny"},
    "data": {"synthetic": {"eval_size": 4}},
    "compare_without_ptx": True,
    "sft": {
        "data": {"synthetic": {"train_size": 40}},
        "policy": {"compute_dtype": "float32", "optimizer": OPTIMIZER},
        "generation": ENGINE,
        "trainer": {**LOOP, "examples_per_step": 4},
    },
    "rankings": {
        "data": {"synthetic": {"train_size": 12}},
        "batch": 6,
        "generation": ENGINE,
        "reward": {"functions": ["example_digits"]},
    },
    "reward_model": {
        "reward_model": {"compute_dtype": "float32", "optimizer": OPTIMIZER},
        "trainer": {**LOOP, "examples_per_step": 4},
    },
    "ppo": {
        "data": {"synthetic": {"train_size": 40}},
        "policy": {"compute_dtype": "float32", "optimizer": OPTIMIZER},
        "critic": {"warmup_steps": 0, "optimizer": OPTIMIZER},
        "generation": ENGINE,
        "ptx": {"examples_per_step": 2, "max_tokens": 32, "eval_limit": 4},
        "trainer": {**LOOP, "prompts_per_step": 4},
    },
}


def words(*flags: str) -> list[str]:
    return [sys.executable, "-m", "recipes.rlhf", *flags]


def environment() -> dict[str, str]:
    plugins = str(ROOT / "tests" / "plugin_package")
    return os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": plugins}


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words(*flags), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900
    )


@pytest.fixture
def small(tmp_path: Path) -> str:
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(SMALL))
    return str(file)


def interrupt_in_reward_model(directory: Path, small: str) -> str:
    """Start the pipeline, interrupt it in its third stage, and return what it printed."""
    process = subprocess.Popen(
        words("--config", small, "--run.directory", str(directory)),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    began = directory / "reward_model" / "status.json"
    deadline = time.monotonic() + 600
    while process.poll() is None and not began.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)  # to the pipeline alone, which passes it on
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    return output


@pytest.mark.timeout(2400)
def test_an_interrupted_pipeline_resumes_and_shows_all_stages(tmp_path: Path, small: str):
    directory = tmp_path / "run"
    output = interrupt_in_reward_model(directory, small)
    assert "stage reward_model was interrupted" in output
    assert f"continue with --run.directory {directory} --resume" in output
    rankings = (directory / "rankings" / "rankings.parquet").stat()
    sft = (directory / "sft" / "metrics.jsonl").read_text()

    refused = run("--run.directory", str(directory), "--resume", "--sft.trainer.steps", "5")
    assert refused.returncode == 2
    assert "sft.trainer.steps: 5, but stage" in refused.stderr

    done = run("--run.directory", str(directory), "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (directory / "rankings" / "rankings.parquet").stat() == rankings
    assert (directory / "sft" / "metrics.jsonl").read_text() == sft

    check_models(directory)
    check_results(directory)
    page = (directory / "report.html").read_text()
    assert "All 5 stages are complete" in page
    for stage in ("sft", "reward_model", "ppo", "ppo_without_ptx"):
        assert f'<a href="{stage}/report.html">' in page
        assert (directory / stage / "report.html").is_file()
    assert page.count("<figure") >= 8

    again = run("--run.directory", str(directory), "--resume")
    assert again.returncode == 0
    assert again.stdout.count("already complete") == 5


def check_models(directory: Path) -> None:
    """Check that each stage started from the results of the earlier ones."""
    sft = str(directory / "sft" / "checkpoints" / "step_000002")
    reward_model = str(directory / "reward_model" / "checkpoints" / "step_000002")
    configs = {
        stage: yaml.safe_load((directory / stage / "config.yaml").read_text())
        for stage in ("sft", "reward_model", "ppo", "ppo_without_ptx")
    }
    assert configs["sft"]["model"]["path"] == "tiny"
    assert configs["reward_model"]["model"]["path"] == sft
    for stage in ("ppo", "ppo_without_ptx"):
        config = configs[stage]
        assert (config["model"]["path"], config["critic"]["path"]) == (sft, reward_model)
        assert config["reward"]["functions"][1]["parameters"]["path"] == reward_model
    assert configs["ppo"]["ptx"]["coefficient"] == 1.0
    assert configs["ppo_without_ptx"]["ptx"]["coefficient"] == 0.0


def check_results(directory: Path) -> None:
    """Check that both runs of the last stage begin alike, and measure reward and text."""
    first, last = {}, {}
    for stage in ("ppo", "ppo_without_ptx"):
        records = read_metrics(directory / stage / "metrics.jsonl")
        evaluations = [record.values for record in records if record.kind == "eval"]
        assert {"eval/accuracy", "eval/reward", "eval/text_loss"} <= set(evaluations[-1])
        first[stage], last[stage] = _held_out(evaluations[0]), _held_out(evaluations[-1])
        assert any("policy/ptx_loss" in record.values for record in records) == (stage == "ppo")
    assert first["ppo"] == first["ppo_without_ptx"]
    text = {stage: values["eval/text_loss"] for stage, values in last.items()}
    assert text["ppo"] < text["ppo_without_ptx"]


def _held_out(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name.startswith("eval/")}


def test_mistakes_of_all_stages_are_refused_at_once(tmp_path: Path, small: str):
    done = run(
        *("--config", small, "--run.directory", str(tmp_path / "run")),
        *("--data.template", "no_such", "--sft.trainer.seed", "1"),
    )
    assert done.returncode == 2
    assert "sft.trainer.seed: 1, but seed is 0 for all stages" in done.stderr

    done = run(
        *("--config", small, "--run.directory", str(tmp_path / "run"), "--dry-run"),
        *("--data.template", "no_such", "--ppo.policy.num_mini_batches", "3"),
        *("--reward_model.reward_model.ranks", "64"),
    )
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert sum("data.template: 'no_such'" in line for line in lines) == 1
    assert any("ppo.policy.num_mini_batches: 3 does not divide" in line for line in lines)
    assert any("reward_model.reward_model.ranks: 64 ranks" in line for line in lines)
    assert not (tmp_path / "run").exists()
