"""A critic that could not work is refused before anything starts, and the plan shows one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipes.grpo_math import grpo_math
from recipes.ppo_math import ppo_math
from recipes.run_recipe import run_recipe
from rlsys.algorithms.advantages import (
    AdvantageInputs,
    AdvantageOutput,
    contract,
    register_advantage_estimator,
)
from rlsys.config import ConfigError, RunConfig
from rlsys.config.command_line import evolve, parse
from rlsys.config.hardware import Hardware
from rlsys.models import resolve_model
from rlsys.run.compute_dtype import ProductSpeed
from rlsys.run.model_checks import ModelDirectories, check_model
from rlsys.run.step_time import estimate_step

CPU = Hardware(cpus=2, memory_gib=24.0, gpus=0, gpu_memory_gib=0.0)


def dry_run(capsys: pytest.CaptureFixture[str], recipe: Any, *flags: str) -> tuple[Any, str, str]:
    """Return exit code, stdout and stderr of a dry run on the tiny model."""
    with pytest.raises(SystemExit) as end:
        run_recipe(recipe, ["--model.path", "tiny", "--dry-run", *flags])
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


@pytest.fixture
def needs_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register an estimator that needs values, for one test."""
    names = contract._ESTIMATORS
    monkeypatch.setattr(names, "_entries", dict(names._entries))

    def estimator(inputs: AdvantageInputs) -> AdvantageOutput:
        return AdvantageOutput(advantages=inputs.response_mask.float())

    register_advantage_estimator("needs_values_for_a_test", needs=("values",))(estimator)


def test_the_recipe_has_a_critic_in_its_plan(capsys: pytest.CaptureFixture[str]):
    code, out, _ = dry_run(capsys, ppo_math)
    assert code == 0
    peaks = "GiB of memory at the peak of each phase: set-up 0.00, log-probs 0.01, update 0.03"
    assert f"critic       1 ranks beside the policy; {peaks}" in out
    _, out, _ = dry_run(capsys, grpo_math)
    assert "critic       none (critic.enabled is false)" in out


@pytest.mark.usefixtures("needs_values")
def test_an_estimator_that_needs_values_needs_a_critic(capsys: pytest.CaptureFixture[str]):
    flags = ("--algorithm.advantage.name", "needs_values_for_a_test")
    code, _, err = dry_run(capsys, grpo_math, *flags)
    assert code == 2
    assert "'needs_values_for_a_test' needs values, which no part of this run computes. Set " in err
    assert dry_run(capsys, grpo_math, *flags, "--critic.enabled", "true")[0] == 0


def test_a_critic_that_nothing_reads_is_refused(capsys: pytest.CaptureFixture[str]):
    code, _, err = dry_run(capsys, grpo_math, "--critic.enabled", "true")
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith(
        "error: critic.enabled: true trains a critic that the estimator 'grpo' does not read. Set "
        "it to false, or choose --algorithm.advantage.name gae"
    )


def test_a_bootstrap_without_a_critic_is_refused(capsys: pytest.CaptureFixture[str]):
    flags = (
        "--algorithm.advantage.name",
        "gae",
        "--algorithm.advantage.parameters.bootstrap_truncated",
        "true",
    )
    code, _, err = dry_run(capsys, grpo_math, *flags)
    assert code == 2
    assert "parameters.bootstrap_truncated: true takes the value after a truncated" in err


def directories(critic: Path) -> ModelDirectories:
    return replace(ModelDirectories.same(resolve_model("tiny")), critic=critic)


def config(critic: Path) -> RunConfig:
    changes = {"model.path": "tiny", "critic.path": str(critic), "preset": "ppo"}
    return evolve(grpo_math(CPU), changes)


def copied(target: Path) -> Path:
    shutil.copytree(resolve_model("tiny"), target)
    return target


def change_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_critic_with_the_same_tokenizer_is_accepted(tmp_path: Path):
    critic = copied(tmp_path / "critic")
    change_json(
        critic / "config.json",
        architectures=["LlamaForSequenceClassification"],
        id2label={"0": "LABEL_0"},
        vocab_size=600,
    )
    check_model(config(critic), directories(critic))


def test_a_critic_that_reads_tokens_as_others_is_refused(tmp_path: Path):
    critic = copied(tmp_path / "critic")
    file = critic / "tokenizer.json"
    facts = json.loads(file.read_text())
    vocabulary = facts["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    file.write_text(json.dumps(facts))
    message = r"^critic\.path: the tokenizer of .* differs .*: token '[AB]' is \d+ there and \d+"
    with pytest.raises(ConfigError, match=message):
        check_model(config(critic), directories(critic))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 100}, "has embeddings for 100 tokens"),
        ({"max_position_embeddings": 100}, "exceed the 100 positions"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "has 2 labels"),
        ({"model_type": "granite"}, "no model of type 'granite' with a head"),
    ],
)
def test_a_critic_that_does_not_fit_is_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
):
    critic = copied(tmp_path / "critic")
    change_json(critic / "config.json", **fields)
    with pytest.raises(ConfigError, match=f"^critic.path: .*{message}"):
        check_model(config(critic), directories(critic))


def test_a_critic_without_a_tokenizer_is_refused(tmp_path: Path):
    critic = copied(tmp_path / "critic")
    for file in critic.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"^critic\.path: .* has no tokenizer to compare"):
        check_model(config(critic), directories(critic))


def test_the_preset_has_a_critic_and_a_flag_takes_it_away():
    assert parse(grpo_math(CPU), ["--preset", "ppo"]).config.critic.enabled
    off = parse(grpo_math(CPU), ["--preset", "ppo", "--critic.enabled", "false"]).config
    assert not off.critic.enabled
    assert not evolve(ppo_math(CPU), {"preset": "grpo"}).critic.enabled
    assert RunConfig.model_validate({"preset": "ppo"}).critic.enabled


def test_the_estimate_of_a_step_counts_the_critic():
    """Policy: 6 for its update + 2 for old + 2 for ref; the critic: 2 for values + 6. 18 / 10."""
    speed = ProductSpeed(float32=100.0, bfloat16=100.0)
    changes = {"preset": "ppo", "policy.compute_dtype": "float32", "generation.dtype": "float32"}
    ppo = evolve(grpo_math(CPU), changes)
    sizes: dict[str, Any] = {"parameters": 1_000_000, "prompt_tokens": 50.0, "speed": speed}
    one = estimate_step(ppo, CPU, **sizes)
    other = estimate_step(evolve(ppo, {"critic.enabled": False}), CPU, **sizes)
    assert one is not None
    assert other is not None
    assert one.training_s == pytest.approx(1.8 * other.training_s)
