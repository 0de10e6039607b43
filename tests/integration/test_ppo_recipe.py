"""`recipes.ppo_math` as a user runs it: one command, checkpoints, resume, report."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForTokenClassification

from docs.generate.metrics import documented
from rlsys.data.rollout_files import read_rollouts
from rlsys.run.observers.metrics_log import read_metrics

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "tests" / "plugin_package"

SMALL = [
    *("--model.path", "tiny", "--generation.engine", "transformers"),
    *("--generation.dtype", "float32", "--policy.compute_dtype", "float32"),
    *("--generation.max_tokens", "8", "--generation.samples_per_prompt", "4"),
    *("--generation.cpus_per_worker", "0"),
    *("--trainer.prompts_per_step", "4", "--trainer.steps", "6"),
    *("--data.synthetic.train_size", "40", "--data.synthetic.eval_size", "4"),
    *("--plugins", "rlsys_example_plugin", "--reward.functions", "[{name: example_digits}]"),
    *("--trainer.checkpoints.every", "3", "--trainer.evaluation.every", "0"),
    *("--policy.optimizer.learning_rate", "1e-3", "--critic.optimizer.learning_rate", "3e-3"),
    *("--critic.optimizer.schedule", "linear", "--critic.warmup_steps", "2"),
]


def ppo(directory: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "recipes.ppo_math", "--run.directory", str(directory), *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(PLUGINS), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def computed(directory: Path) -> dict[int, dict[str, float]]:
    """Return the numbers of each step that do not depend on the clock or the process."""
    measured = ("time/", "throughput/", "memory/")
    return {
        record.step: {k: v for k, v in record.values.items() if not k.startswith(measured)}
        for record in read_metrics(directory / "metrics.jsonl")
        if record.kind == "train"
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ppo") / "whole"
    done = ppo(directory, *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def test_a_run_writes_critic_metrics_files_and_charts(whole: Path):
    steps = computed(whole)
    assert sorted(steps) == [1, 2, 3, 4, 5, 6]
    assert ["policy/updates" in steps[step] for step in steps] == [False] * 2 + [True] * 4
    for values in steps.values():
        assert values["critic/updates"] == 2
        assert [name for name in values if documented(name) is None] == []

    (row, *_) = read_rollouts(whole / "rollouts" / "step_000006.parquet")
    assert any(row["values"])
    assert any(row["returns"])
    report = (whole / "report.html").read_text()
    assert "Variance of the returns that the critic explains" in report


def test_a_checkpoint_has_the_critic_as_a_model_of_transformers(whole: Path):
    checkpoint = whole / "checkpoints" / "step_000006"
    critic = AutoModelForTokenClassification.from_pretrained(checkpoint / "critic")
    assert critic.num_labels == 1
    assert critic.score.weight.abs().max() > 0
    assert json.loads((checkpoint / "critic" / "critic_state.json").read_text())["steps"] == 6
    assert json.loads((checkpoint / "policy_state.json").read_text())["steps"] == 4


def test_a_resumed_run_has_the_numbers_of_an_uninterrupted_one(whole: Path, tmp_path: Path):
    """As if the run had been killed after its third step."""
    directory = tmp_path / "part"
    shutil.copytree(whole, directory)
    shutil.rmtree(directory / "checkpoints" / "step_000006")
    refused = ppo(directory, "--resume", "--critic.enabled", "false")
    assert refused.returncode == 2
    assert "critic.enabled: False, but checkpoint" in refused.stderr

    resumed = ppo(directory, "--resume")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    expected, found = computed(whole), computed(directory)
    assert sorted(found) == sorted(expected)
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, abs=1e-6)


@pytest.mark.long
def test_a_run_starts_from_the_policy_and_the_critic_of_another(whole: Path, tmp_path: Path):
    checkpoint = whole / "checkpoints" / "step_000006"
    models = ("--model.path", str(checkpoint), "--critic.path", str(checkpoint / "critic"))
    done = ppo(tmp_path / "next", *SMALL, *models, "--trainer.steps", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    first = computed(tmp_path / "next")[1]
    assert first["critic/value_mean"] != 0, "it starts from the trained values"
    saved = tmp_path / "next" / "checkpoints" / "step_000003"
    assert (saved / "critic" / "model.safetensors").exists()
