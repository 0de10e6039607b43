"""Recipes and a preset train an embedded model for three steps, on real Ray and real processes.

`test_preset_goldens` holds the numbers of every preset.
"""

from __future__ import annotations

import importlib
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.run_recipe import run_recipe
from rlsys.run.observers.metrics_log import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster", "own_logging")]

SHORT = [
    *("--trainer.steps", "3", "--trainer.prompts_per_step", "4"),
    *("--generation.samples_per_prompt", "6", "--generation.max_tokens", "8"),
    *("--trainer.evaluation.every", "0", "--trainer.checkpoints.every", "0"),
    *("--generation.cpus_per_worker", "0"),
]
TINY = [
    *("--model.path", "tiny", "--generation.engine", "transformers"),
    *("--generation.dtype", "float32"),
    *("--policy.compute_dtype", "float32", "--policy.optimizer.learning_rate", "1e-3"),
    *("--plugins", "tests.plugin_package.rlsys_example_plugin"),
]
# Random text of the tiny model earns different rewards within most groups, so there is a gradient.
DIGITS = ("--reward.functions", "[{name: example_digits}]")
# Most responses of the untrained model are wrong; in most groups some have a box and some do not.
BOXES = ("--reward.functions", "[{name: math}, {name: format_boxed, weight: 0.5}]")


@pytest.fixture
def own_logging() -> Iterator[None]:
    """Restore pytest's log handlers, which a run replaces by those of its directory."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def train(recipe: str, directory: Path, *flags: str) -> list[dict[str, float]]:
    """Train in this process on the running cluster, and return the metrics of each step."""
    module = importlib.import_module(f"recipes.{recipe}_math")
    function = getattr(module, f"{recipe}_math")
    with pytest.raises(SystemExit) as end:
        run_recipe(function, [*SHORT, "--run.directory", str(directory), *flags])
    assert end.value.code == 0

    records = read_metrics(directory / "metrics.jsonl")
    steps = [dict(record.values) for record in records if record.kind == "train"]
    assert len(steps) == 3
    assert any(step["policy/grad_norm"] > 0 for step in steps)
    for step in steps:
        assert all(math.isfinite(value) for value in step.values())
    return steps


def test_dapo(tmp_path: Path):
    """Train with dynamic sampling and a length penalty.

    Any digit is right, so about half of the groups of two are all right or all wrong, and replaced.
    The penalty follows the limit of 8 tokens.
    """
    rewards = (
        "[{name: example_digits, parameters: {per_digit: 1.0}}, {name: soft_overlong, weight: 0.5}]"
    )
    flags = ("--generation.samples_per_prompt", "2", "--reward.functions", rewards)
    steps = train("dapo", tmp_path / "run", *TINY, *flags)

    for step in steps:
        assert 1 <= step["sampling/rounds"] <= 3
        assert step["trained/responses"] == (4 - step["sampling/missing_groups"]) * 2
        assert -1 <= step["reward/component/soft_overlong"] <= 0

    assert min(step["reward/component/soft_overlong"] for step in steps) < 0
    assert max(step["sampling/rounds"] for step in steps) > 1
    assert max(step["sampling/replaced_groups"] for step in steps) > 0


def test_masking_every_response_trains_nothing_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Sample two tokens that no stop string may end: all responses are truncated."""
    module = importlib.import_module("recipes.hierarchical_math")
    flags = ["--generation.max_tokens", "2", "--generation.min_tokens", "2", "--trainer.steps", "2"]
    flags += ["--generation.stop", "no response holds this"]
    masked = ["--algorithm.overlong.mask_truncated", "true", "--run.progress", "false"]
    directory = tmp_path / "run"
    flags += ["--run.directory", str(directory)]

    with pytest.raises(SystemExit) as end:
        run_recipe(module.hierarchical_math, [*SHORT, *TINY, *DIGITS, *flags, *masked])
    assert end.value.code == 0

    records = read_metrics(directory / "metrics.jsonl")
    steps = [record.values for record in records if record.kind == "train"]
    assert [step["trained/responses"] for step in steps] == [0.0, 0.0]
    assert all("policy/grad_norm" not in step for step in steps)
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search("(no response entered|masked out of) the loss", printed)


@pytest.mark.long
def test_gspo_on_two_ranks_with_vllm(tmp_path: Path):
    """Train the real model with a sharded policy."""
    flags = ("--preset", "gspo", "--policy.ranks", "2")
    steps = train("grpo", tmp_path / "run", *BOXES, *flags)
    assert steps[2]["sync/logprob_difference_mean"] < 0.15
    # The ratio of a response moves less than that of a token.
    assert max(abs(step["policy/ratio_max"] - 1) for step in steps) < 0.5


def test_hierarchical(tmp_path: Path):
    """Train on four mini-batches, with advantages recomputed before each, and diagnostics."""
    steps = train("hierarchical", tmp_path / "run", *TINY, *DIGITS)
    for step in steps:
        assert 0 < step["advantage/effective_fraction/at_100"] <= 1
        assert step["advantage/variance_ratio/leave_one_out"] == 1.0
    assert "Effective sample size of the ratios" in (tmp_path / "run" / "report.html").read_text()
