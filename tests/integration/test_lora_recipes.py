"""Runs with adapters from end to end: RL with a critic, and training on examples."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlsys.models import resolve_model
from rlsys.run.observers.metrics_log import read_metrics

pytestmark = [pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
LORA = ("--model.lora.rank", "4", "--model.lora.alpha", "8")


def run(recipe: str, directory: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", f"recipes.{recipe}", "--run.directory", str(directory), *flags],
        cwd=ROOT,
        env=os.environ
        | {"PYTHONPATH": str(ROOT / "tests" / "plugin_package"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def metrics(directory: Path) -> dict[int, dict[str, float]]:
    """Return what does not depend on the clock or the process, by step."""
    skipped = ("time/", "throughput/", "memory/")
    return {
        record.step: {
            name: value for name, value in record.values.items() if not name.startswith(skipped)
        }
        for record in read_metrics(directory / "metrics.jsonl")
        if record.kind == "train"
    }


SMALL = (
    *("--model.path", "tiny", "--generation.engine", "transformers"),
    *("--generation.dtype", "float32", "--generation.max_tokens", "8"),
    *("--data.synthetic.train_size", "40", "--data.synthetic.eval_size", "4"),
)


def test_a_run_with_a_critic_learns_resumes_and_leaves_adapters_of_both(tmp_path: Path):
    """PPO with a KL to the base: policy, critic and reference are one frozen model each or none."""
    whole = tmp_path / "whole"
    flags = (
        *SMALL,
        *LORA,
        *("--policy.compute_dtype", "float32", "--generation.samples_per_prompt", "4"),
        *("--generation.cpus_per_worker", "0", "--trainer.prompts_per_step", "4"),
        *("--trainer.steps", "4", "--trainer.checkpoints.every", "2"),
        *("--policy.num_mini_batches", "1", "--policy.epochs", "1", "--critic.warmup_steps", "0"),
        *("--trainer.evaluation.every", "0", "--algorithm.kl.coefficient", "0.05"),
        *("--plugins", "rlsys_example_plugin", "--reward.functions", "[{name: example_digits}]"),
        *("--policy.optimizer.learning_rate", "1e-2", "--critic.optimizer.learning_rate", "1e-2"),
    )
    done = run("ppo_math", whole, *flags)
    assert "policy: 0.01 M of" in done.stdout
    assert "critic: 0.01 M of" in done.stdout
    steps = metrics(whole)
    assert steps[1]["policy/kl_ref_k3"] == pytest.approx(0, abs=1e-6)  # the base is the reference
    assert steps[4]["policy/kl_ref_k3"] > 1e-4
    assert steps[4]["sync/logprob_difference_mean"] < 1e-4  # the engine has the merged weights
    records = read_metrics(whole / "metrics.jsonl")
    assert not any("memory/reference" in record.values for record in records)

    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step_000004")
    run("ppo_math", parts, "--resume")
    resumed = metrics(parts)
    for step in (3, 4):
        for name, value in steps[step].items():
            assert resumed[step][name] == pytest.approx(value, rel=1e-6, abs=1e-9), (step, name)

    checkpoint = whole / "checkpoints" / "step_000004"
    assert not (checkpoint / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(resolve_model("tiny"))
    tokens = torch.arange(3, 30)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, checkpoint)(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(resolve_model(str(checkpoint)))
        torch.testing.assert_close(merged(tokens).logits, expected, rtol=0, atol=1e-5)
    critic = load_file(checkpoint / "critic" / "adapter_model.safetensors")
    assert "base_model.model.score.weight" in critic

    # A new run starts from the checkpoint as from any model.
    again = run(
        "ppo_math", tmp_path / "again", *flags, "--model.path", str(checkpoint), "--dry-run"
    )
    assert "the policy without its adapters (model.lora.rank)" in again.stdout


@pytest.mark.parametrize("recipe", ["sft_math", "dpo_math", "reward_model_math"])
def test_runs_on_examples_train_adapters(recipe: str, tmp_path: Path):
    scored = recipe == "reward_model_math"
    role = "reward_model" if scored else "policy"
    data = SMALL[-4:] if scored else SMALL[2:]
    done = run(
        recipe,
        tmp_path / "run",
        *("--model.path", "tiny"),
        *data,
        *LORA,
        *(f"--{role}.compute_dtype", "float32", f"--{role}.optimizer.learning_rate", "1e-2"),
        *(f"--{role}.optimizer.warmup_steps", "0", "--trainer.steps", "3"),
        *("--trainer.examples_per_step", "8", "--trainer.evaluation.every", "3"),
    )
    assert f"{role}: 0.01 M of" in done.stdout
    steps = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    losses = [r.values[f"{role}/loss"] for r in steps if r.kind == "train"]
    assert np.isfinite(losses).all()
    if recipe == "dpo_math":
        assert losses[0] == pytest.approx(np.log(2), abs=1e-5)  # the policy is its reference
        assert losses[-1] < np.log(2) - 1e-5
        assert not any("memory/reference" in r.values for r in steps)

    checkpoint = tmp_path / "run" / "checkpoints" / "step_000003"
    facts = json.loads((checkpoint / "adapter_config.json").read_text())
    assert (facts["r"], facts["lora_alpha"]) == (4, 8)
    merged = resolve_model(str(checkpoint))
    tokens = torch.arange(3, 30)[None]
    if not scored:
        AutoModelForCausalLM.from_pretrained(merged)
        return
    kind: Any = AutoModelForSequenceClassification
    base = kind.from_pretrained(resolve_model("tiny"), num_labels=1, pad_token_id=0)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, checkpoint)(tokens).logits
        found = kind.from_pretrained(merged)(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float(found.abs().max()) > 1e-3
