"""Which differences between a checkpoint and a configuration are told, and which refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlsys.config import RunConfig
from rlsys.driver.checkpoints import Checkpoint
from rlsys.driver.resume import check_resumable, describe_origin, differences


def checkpoint_of(config: RunConfig) -> Checkpoint:
    state = json.loads(json.dumps(describe_origin(config)))  # as it comes back from the disk
    return Checkpoint(step=20, path=Path("runs/a/checkpoints/step_000020"), state=state)


def config(**changes) -> RunConfig:
    return RunConfig.model_validate(changes)


def test_the_same_configuration_passes_in_silence() -> None:
    checkpoint = checkpoint_of(config())
    check_resumable(checkpoint, config())
    assert differences(checkpoint, config()) == []


def test_changes_are_listed_with_both_values() -> None:
    checkpoint = checkpoint_of(
        config(algorithm={"advantage": {"name": "grpo", "parameters": {"std_ddof": 1}}})
    )
    changed = config(
        algorithm={"advantage": {"name": "grpo", "parameters": {"eps": 1e-4}}},
        generation={"stop": ["</answer>"]},
        trainer={"steps": 80},
    )
    check_resumable(checkpoint, changed)
    assert differences(checkpoint, changed) == [
        "algorithm.advantage.parameters.eps: absent -> 0.0001",
        "algorithm.advantage.parameters.std_ddof: 1 -> absent",
        "generation.stop: [] -> ['</answer>']",
        "trainer.steps: 60 -> 80",
    ]


def test_where_a_run_is_shown_and_placed_makes_no_difference() -> None:
    moved = config(run={"directory": "elsewhere", "progress": False}, cluster={"address": "auto"})
    assert differences(checkpoint_of(config()), moved) == []


def test_other_libraries_are_told() -> None:
    checkpoint = checkpoint_of(config())
    present = checkpoint.state["versions"]["torch"]
    checkpoint.state["versions"]["torch"] = "1.0"
    assert differences(checkpoint, config()) == [f"torch: 1.0 -> {present}"]


def test_another_model_or_sharding_is_refused_with_a_remedy() -> None:
    other = config(model={"path": "tiny"}, policy={"ranks": 2})
    with pytest.raises(ValueError, match="checkpoint") as caught:
        check_resumable(checkpoint_of(config()), other)
    assert str(caught.value).splitlines() == [
        "model.path: 'tiny', but checkpoint runs/a/checkpoints/step_000020 was written with 'smollm2-135m'. Resume with --model.path "
        "smollm2-135m, or start a new run with --model.path runs/a/checkpoints/step_000020.",
        "policy.ranks: 2, but checkpoint runs/a/checkpoints/step_000020 was written with 1. Resume with --policy.ranks 1, or start a new run "
        "with --model.path runs/a/checkpoints/step_000020.",
    ]
