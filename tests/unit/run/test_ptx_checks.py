"""Pretraining text that could not be used is refused before anything starts; the plan shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.grpo_math import grpo_math
from recipes.run_recipe import run_recipe
from rlsys.config.command_line import evolve
from rlsys.config.hardware import Hardware
from rlsys.run.compute_dtype import ProductSpeed
from rlsys.run.observers.step_notes import step_notes
from rlsys.run.step_time import estimate_step

CPU = Hardware(cpus=2, memory_gib=24.0, gpus=0, gpu_memory_gib=0.0)
ON = ("--ptx.coefficient", "0.5", "--ptx.train", "synthetic")


def dry_run(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[Any, str, str]:
    """Return exit code, stdout and stderr of a dry run on the tiny model."""
    with pytest.raises(SystemExit) as end:
        run_recipe(grpo_math, ["--model.path", "tiny", "--dry-run", *flags])
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


def test_the_plan_names_the_texts(capsys: pytest.CaptureFixture[str]):
    code, out, _ = dry_run(capsys, *ON, "--ptx.max_tokens", "64")
    assert code == 0
    line = (
        "text         900 texts from synthetic, 32 a step of at most 64 tokens, coefficient 0.5; "
        "the loss of 100 held-out texts"
    )
    assert line in out
    _, out, _ = dry_run(capsys)
    assert "text         none (ptx.coefficient is 0)" in out
    _, out, _ = dry_run(capsys, "--ptx.train", "synthetic")
    assert "none is trained on (ptx.coefficient is 0); the loss of 100 held-out texts" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ptx.coefficient", "0.5"), "ptx.coefficient: 0.5 without a text to train on"),
        (("--ptx.coefficient", "-1"), "ptx.coefficient: -1 does not fit"),
        (("--ptx.train", "auto"), "ptx.train: 'auto' is a value of ptx.eval"),
        (
            (*ON, "--ptx.examples_per_step", "3", "--policy.num_mini_batches", "4"),
            "ptx.examples_per_step: 3 texts for the 4 optimizer steps",
        ),
        ((*ON, "--ptx.max_tokens", "100000"), "ptx.max_tokens: 100000 and the token before them"),
        (("--ptx.coefficient", "1", "--ptx.train", "no.jsonl"), "ptx.train: "),
        (("--ptx.eval", "no.jsonl"), "ptx.eval: "),
        ((*ON, "--ptx.held_out", "1"), "ptx.held_out: 1 does not fit"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
):
    code, _, err = dry_run(capsys, *flags)
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith(f"error: {message}")


def test_the_limit_of_the_model_counts_only_where_text_is_read(
    capsys: pytest.CaptureFixture[str],
):
    code, out, _ = dry_run(capsys, "--ptx.max_tokens", "100000")
    assert code == 0
    assert "warning: ptx.max_tokens: 100000 has no effect because ptx.coefficient is 0" in out


def test_mistakes_in_problems_and_texts_are_reported_together(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"body": "a"}) + "\n")
    flags = ("--data.train", "no.jsonl", "--ptx.coefficient", "1", "--ptx.train", str(file))
    code, _, err = dry_run(capsys, *flags)
    assert code == 2
    first, second = err.splitlines()
    assert "data.train: " in first
    assert "ptx.train: " in second
    assert "--ptx.columns.text" in second


def test_the_estimate_of_a_step_counts_the_texts():
    """6 operations for each parameter and token of 10 texts of 50 tokens."""
    speed = ProductSpeed(float32=100.0, bfloat16=100.0)
    changes = {
        "policy.compute_dtype": "float32",
        "generation.dtype": "float32",
        "ptx.coefficient": 1.0,
        "ptx.train": "synthetic",
        "ptx.examples_per_step": 10,
    }
    config = evolve(grpo_math(CPU), changes)
    sizes: dict[str, Any] = {"parameters": 10**9, "prompt_tokens": 50.0, "speed": speed}
    without = estimate_step(config, CPU, **sizes)
    texts = estimate_step(config, CPU, text_tokens=50.0, **sizes)
    assert without is not None
    assert texts is not None
    # 6 * 1e9 * 500 operations at 2 * 100 GFLOP/s
    assert texts.training_s - without.training_s == pytest.approx(15.0)


def test_a_step_of_text_alone_is_not_called_one_without_training():
    (note,) = step_notes({"trained/responses": 0.0})
    assert note.text.endswith("nothing was trained")
    (note,) = step_notes({"trained/responses": 0.0, "policy/ptx_loss": 2.0})
    assert note.text.endswith("only the pretraining text was trained")
