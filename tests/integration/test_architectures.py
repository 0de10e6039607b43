"""Several architectures train from the command line: real Ray, and the transformers engine."""

import subprocess
import sys
from pathlib import Path

import pytest

from rlsys.run.observers.metrics_log import read_metrics
from tests.support.architectures import ARCHITECTURES, save_tiny_model

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


SMALL = [
    *("--run.progress", "false", "--data.template", "few_shot"),
    *("--generation.engine", "transformers", "--generation.dtype", "float32"),
    *("--policy.compute_dtype", "float32", "--generation.max_tokens", "8"),
    *("--generation.samples_per_prompt", "2", "--trainer.prompts_per_step", "2"),
    *("--trainer.steps", "1", "--trainer.evaluation.every", "0"),
    *("--data.synthetic.train_size", "8", "--data.synthetic.eval_size", "2"),
]


def train(model: Path, run: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Train `model` for one step in a process of its own."""
    command = [sys.executable, "-m", "recipes.grpo_math", *SMALL]
    command += ["--model.path", str(model), "--run.directory", str(run), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def model(tmp_path: Path, name: str) -> Path:
    directory = tmp_path / "model"
    (chosen,) = (architecture for architecture in ARCHITECTURES if architecture.name == name)
    save_tiny_model(directory, chosen)
    return directory


@pytest.mark.parametrize(
    ("name", "padded"),
    [("mistral, sliding window", False), ("gpt2, dropout", False), ("falcon", True)],
)
def test_engine_and_trainer_agree_and_a_padded_pass_is_reported(
    tmp_path: Path, name: str, padded: bool
):
    result = train(
        model(tmp_path, name),
        tmp_path / "run",
        *("--cluster.object_store_gib", "0.2"),
        *("--algorithm.kl.coefficient", "0.1"),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert ("policy: runs padded instead of packed" in result.stdout) == padded
    assert ("reference: runs padded instead of packed" in result.stdout) == padded

    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    (step,) = [record for record in records if record.kind == "train"]
    assert step.values["policy/logprob_difference_max"] < 1e-4


def test_a_model_that_is_not_causal_ends_with_one_clear_line(tmp_path: Path):
    result = train(model(tmp_path, "bert, not causal"), tmp_path / "run")
    assert result.returncode == 2
    assert result.stderr.startswith(
        "error: model.path: BertLMHeadModel is not a causal language model"
    )
    assert "Traceback" not in result.stdout + result.stderr
