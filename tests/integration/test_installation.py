"""One run on a small model, as a user starts it: `make test` proves an installation with it."""

import os
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

from rlsys.config.command_line import load_yaml
from rlsys.run.observers.metrics_log import read_metrics

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    *("--model.path", "tiny", "--trainer.steps", "2", "--trainer.prompts_per_step", "4"),
    *("--generation.samples_per_prompt", "4", "--generation.max_tokens", "8"),
    *("--data.synthetic.train_size", "16", "--data.synthetic.eval_size", "4"),
    *("--trainer.evaluation.every", "2", "--trainer.checkpoints.every", "2"),
)


def test_the_default_engine_trains_syncs_evaluates_and_saves(tmp_path: Path):
    directory = tmp_path / "run"
    command = [sys.executable, "-m", "recipes.grpo_math", *FLAGS]
    done = subprocess.run(
        [*command, "--run.directory", str(directory)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "generation.dtype, policy.compute_dtype: auto -> " in done.stdout
    assert "step time: " in done.stdout

    config = load_yaml(directory / "config.yaml")
    assert config.generation.engine == "vllm"
    assert "auto" not in (config.generation.dtype, config.policy.compute_dtype)

    records = read_metrics(directory / "metrics.jsonl")
    steps = [record for record in records if record.kind == "train"]
    evaluations = [record for record in records if record.kind == "eval"]
    assert [record.step for record in steps] == [1, 2]
    assert [record.step for record in evaluations] == [0, 2]
    # Engine and trainer hold the same weights: bfloat16 rounds to about 0.01 here, float32 to 1e-5.
    assert all(record.values["sync/logprob_difference_mean"] < 0.05 for record in steps)
    assert AutoModelForCausalLM.from_pretrained(directory / "checkpoints" / "step_000002")
    assert (directory / "report.html").exists()
