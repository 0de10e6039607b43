"""Each recipe of a published algorithm trains the embedded model with the real engine, as a user starts it."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlsys.driver.metrics_log import read_metrics

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]

SHORT = [
    *(
        "--trainer.steps",
        "3",
        "--trainer.prompts_per_step",
        "4",
        "--generation.samples_per_prompt",
        "6",
        "--generation.max_tokens",
        "8",
    ),
    *("--trainer.evaluation.every", "0", "--trainer.checkpoints.every", "0"),
    # Most responses of the untrained model are wrong; whether they hold a box differs within most groups, so there is a gradient.
    *("--reward.functions", "[{name: math}, {name: format_boxed, weight: 0.5}]"),
]


def train(recipe: str, directory: Path, *flags: str) -> list[dict[str, float]]:
    """Metrics of the steps of a finished run."""
    command = [sys.executable, "-m", f"recipes.{recipe}_math", *SHORT, "--run.directory", str(directory), *flags]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [dict(record.values) for record in read_metrics(directory / "metrics.jsonl") if record.kind == "train"]
    assert len(steps) == 3
    assert any(step["policy/grad_norm"] > 0 for step in steps)
    for step in steps:
        assert all(math.isfinite(value) for value in step.values())
    return steps


@pytest.mark.parametrize("recipe", ["sapo", "dr_grpo", "reinforce"])
def test_recipes_without_a_reference(tmp_path: Path, recipe: str):
    steps = train(recipe, tmp_path / "run")
    assert "policy/kl_ref_k3" not in steps[0]
    moved = max(abs(step["policy/ratio_max"] - 1) for step in steps)
    assert (moved > 1e-6) == (recipe != "reinforce")  # two mini-batches a batch, or one


def test_dapo(tmp_path: Path):
    for step in train("dapo", tmp_path / "run"):
        assert 1 <= step["sampling/rounds"] <= 3
        assert step["rollout/equal_reward_groups"] * 4 == step["sampling/missing_groups"]
        assert -1 <= step["reward/component/soft_overlong"] <= 0


@pytest.mark.parametrize("recipe", ["rloo", "token_kl_grpo"])
def test_recipes_with_a_reference(tmp_path: Path, recipe: str):
    steps = train(recipe, tmp_path / "run")
    assert steps[2]["policy/kl_ref_k3"] > 0
    assert steps[2]["kl/coefficient"] > 0


def test_gspo_on_two_ranks(tmp_path: Path):
    """A whole run with a sharded policy: the engine reserves no core, so two ranks fit a machine of two."""
    steps = train("gspo", tmp_path / "run", "--policy.ranks", "2", "--generation.cpus_per_worker", "0")
    assert steps[2]["sync/logprob_gap_mean"] < 0.15
    # the ratio of a whole response moves less than that of its tokens
    assert max(abs(step["policy/ratio_max"] - 1) for step in steps) < 0.5


def test_hierarchical(tmp_path: Path):
    """Four mini-batches, advantages estimated anew before each; the diagnostics arrive."""
    steps = train("hierarchical", tmp_path / "run", "--trainer.prompts_per_step", "8")
    for step in steps:
        assert 0 < step["advantage/effective_share/last"] <= 1
        assert step["advantage/variance_ratio/leave_one_out"] == 1.0
    assert "Effective sample size of the ratios" in (tmp_path / "run" / "report.html").read_text()
