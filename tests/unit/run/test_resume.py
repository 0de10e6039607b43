"""Changes on a resume: accepted, printed or refused; and the state that the run continues with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlsys.config import ConfigError, RunConfig
from rlsys.config.command_line import all_fields, flat
from rlsys.config.expert_iteration import ExpertIterationRunConfig
from rlsys.config.offline import (
    PreferenceRunConfig,
    ProcessRewardModelRunConfig,
    RewardModelRunConfig,
    SupervisedRunConfig,
)
from rlsys.config.resume_rules import RULES, VERDICTS, rule_of
from rlsys.run.checkpoints import Checkpoint
from rlsys.run.resume import (
    advantage_state,
    already_complete,
    changes,
    check_resumable,
    describe_origin,
    differences,
    prompt_state,
)


def checkpoint_of(config: RunConfig, *, step: int = 20, **state: Any) -> Checkpoint:
    whole = json.loads(json.dumps(describe_origin(config) | state))  # as it comes from the disk
    return Checkpoint(step=step, path=Path("runs/a/checkpoints/step_000020"), state=whole)


def config(**changes: Any) -> RunConfig:
    return RunConfig.model_validate(changes)


def changed(name: str, value: Any) -> RunConfig:
    for part in reversed(name.split(".")):
        value = {part: value}
    return config(**value)


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


def test_ranks_of_deepspeed_stay_and_others_may_change() -> None:
    def run(backend: str, ranks: int, critic: Mapping[str, Any] = {}) -> RunConfig:
        return config(policy={"backend": backend, "ranks": ranks}, critic=critic)

    check_resumable(checkpoint_of(run("fsdp2", 2)), run("fsdp2", 4))
    check_resumable(checkpoint_of(run("deepspeed", 2)), run("deepspeed", 2))
    with pytest.raises(ConfigError, match=r"^policy.ranks: 4, but .* by 2 ranks.*deepspeed"):
        check_resumable(checkpoint_of(run("deepspeed", 2)), run("deepspeed", 4))

    # The critic has the policy's ranks where it has none of its own.
    before = checkpoint_of(run("deepspeed", 2, {"enabled": True}))
    check_resumable(before, run("deepspeed", 2, {"enabled": True, "ranks": 2}))
    with pytest.raises(ConfigError, match=r"^critic.ranks: 1, but .* by 2 ranks"):
        check_resumable(before, run("deepspeed", 2, {"enabled": True, "ranks": 1}))


def test_a_run_from_before_critics_and_texts_had_them_off() -> None:
    old = checkpoint_of(config())
    for section in ("critic", "ptx"):
        del old.state["config"][section]
    check_resumable(old, config())
    assert differences(old, config()) == []
    assert differences(old, changed("ptx.eval_limit", 7)) == ["ptx.eval_limit: 100 -> 7"]


def test_where_a_run_is_shown_and_placed_makes_no_difference() -> None:
    moved = config(run={"directory": "elsewhere", "progress": False}, cluster={"address": "auto"})
    assert differences(checkpoint_of(config()), moved) == []


def test_other_libraries_are_told() -> None:
    checkpoint = checkpoint_of(config())
    present = checkpoint.state["versions"]["torch"]
    checkpoint.state["versions"]["torch"] = "1.0"
    assert differences(checkpoint, config()) == [f"torch: 1.0 -> {present}"]


def test_another_model_or_seed_is_refused_with_reason_and_remedy() -> None:
    other = config(model={"path": "tiny"}, trainer={"seed": 2})
    with pytest.raises(ValueError, match="checkpoint") as caught:
        check_resumable(checkpoint_of(config()), other)
    assert str(caught.value).splitlines() == [
        "model.path: 'tiny', but checkpoint runs/a/checkpoints/step_000020 was written with "
        "'smollm2-135m'. The checkpoint holds the weights of that model. Resume with --model.path "
        "smollm2-135m, or start a new run with --model.path runs/a/checkpoints/step_000020.",
        "trainer.seed: 2, but checkpoint runs/a/checkpoints/step_000020 was written with 0. It "
        "decides the order of the data: some prompts would repeat, others never come. Resume with "
        "--trainer.seed 0, or start a new run with --model.path "
        "runs/a/checkpoints/step_000020.",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trainer.seed", 5),
        ("data.shuffle", False),
        ("algorithm.advantage.auxiliary.width", 8),
    ],
)
def test_what_would_make_the_result_meaningless_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        check_resumable(checkpoint_of(config()), changed(name, value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy.optimizer.learning_rate", 3e-6),
        ("trainer.steps", 100),
        ("trainer.prompts_per_step", 16),
        ("generation.samples_per_prompt", 4),
        ("generation.dtype", "bfloat16"),
        ("policy.compute_dtype", "bfloat16"),
        ("policy.ranks", 2),
        ("critic.ranks", 1),
        ("reward.functions", [{"name": "format_boxed"}]),
        ("data.train", "moved.parquet"),  # the hash of the problems decides
    ],
)
def test_what_may_change_is_told(name: str, value: Any) -> None:
    checkpoint, other = checkpoint_of(config()), changed(name, value)
    check_resumable(checkpoint, other)
    assert [line.split(": ")[0] for line in differences(checkpoint, other)] == [name]


def test_every_field_has_a_rule_and_every_rule_a_field() -> None:
    offline = (SupervisedRunConfig, PreferenceRunConfig, RewardModelRunConfig)
    kinds = (RunConfig, *offline, ProcessRewardModelRunConfig, ExpertIterationRunConfig)
    names = [name for kind in kinds for name, _ in all_fields(kind)]
    used = {rule_of(name).field for name in names}
    assert used == {rule.field for rule in RULES}
    assert {rule.verdict for rule in RULES} == set(VERDICTS)
    assert all(rule.reason for rule in RULES if rule.verdict == "refused")
    assert rule_of("algorithm.advantage.parameters.eps").field == "algorithm."


def test_a_field_that_an_older_version_did_not_write_is_told_and_not_refused() -> None:
    checkpoint = checkpoint_of(config())
    del checkpoint.state["config"]["policy"]["ranks"]
    del checkpoint.state["config"]["generation"]["top_k"]
    check_resumable(checkpoint, config())
    assert differences(checkpoint, config()) == [
        "generation.top_k: absent -> 0",
        "policy.ranks: absent -> 1",
    ]


def test_changes_take_a_flat_or_a_nested_configuration() -> None:
    nested = config().model_dump(mode="json")
    other = config(trainer={"steps": 80})
    assert changes(nested, other) == changes(flat(nested), other) == ["trainer.steps: 60 -> 80"]


def test_the_position_in_the_data_of_a_checkpoint_that_counted_batches() -> None:
    old = checkpoint_of(
        config(trainer={"prompts_per_step": 12}), prompts={"batches_taken": 5, "prompts": 99}
    )
    assert prompt_state(old) == {"batches_taken": 5, "prompts": 99, "prompts_taken": 60}
    new = {"batches_taken": 5, "prompts_taken": 7, "prompts": 99, "problems_digest": "x"}
    assert prompt_state(checkpoint_of(config(), prompts=new)) == new


def test_what_was_adapted_goes_on_unless_its_start_was_changed() -> None:
    kept = {"kl_coefficient": 0.3, "entropy_temperature": 0.2, "estimator": {"average": 1.0}}
    checkpoint = checkpoint_of(config(), advantages=kept)
    assert advantage_state(checkpoint, config()) == kept
    assert advantage_state(checkpoint, changed("trainer.steps", 80)) == kept
    for name, value, dropped in (
        ("algorithm.kl.coefficient", 0.1, "kl_coefficient"),
        ("algorithm.entropy.temperature", 0.1, "entropy_temperature"),
        ("algorithm.advantage.name", "reinforce_baseline", "estimator"),
    ):
        rest = {key: value for key, value in kept.items() if key != dropped}
        assert advantage_state(checkpoint, changed(name, value)) == rest


@pytest.mark.parametrize(
    ("step", "steps", "evaluated", "complete"),
    [
        (60, 60, 60, True),
        (60, 40, 60, True),  # fewer steps than were taken
        (60, 80, 60, False),
        (60, 60, 40, False),  # stopped before its last evaluation, which is made up
    ],
)
def test_a_complete_run_has_nothing_left_to_do(
    step: int, steps: int, evaluated: int, complete: bool
) -> None:
    checkpoint = checkpoint_of(config(), step=step, evaluated_step=evaluated)
    target = config(trainer={"steps": steps})
    assert already_complete(checkpoint, target, evaluates=True) == complete


def test_without_evaluations_the_steps_alone_decide() -> None:
    checkpoint = checkpoint_of(config(), step=60, evaluated_step=-1)
    never = config(trainer={"evaluation": {"every": 0}})
    assert already_complete(checkpoint, never, evaluates=True)
    assert already_complete(checkpoint, config(), evaluates=False)  # data.eval is off
