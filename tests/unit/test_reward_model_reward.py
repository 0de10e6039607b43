"""A reward that is a model: what is refused, how its scores join the others, what is reported.

That the scores are right is shown on real ranks (tests/integration/test_reward_model_reward.py).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from docs.generate.metrics import documented
from recipes.evaluate_math import evaluate_math
from recipes.grpo_math import grpo_math
from recipes.make_rankings import run_rankings
from recipes.process_reward_model_math import process_reward_model_math
from recipes.reward_model_math import reward_model_math
from recipes.rlhf import rlhf
from recipes.run_evaluation import run_evaluation
from recipes.run_offline import run_offline
from recipes.run_recipe import run_recipe
from recipes.run_rlhf import run_rlhf
from recipes.sft_math import sft_math
from rlsys.config import ConfigError, RewardConfig, RewardFunctionConfig, RunConfig
from rlsys.config.command_line import evolve
from rlsys.config.hardware import Hardware
from rlsys.data.batches import ScoreBatch, ScoredBatch
from rlsys.data.rollout_files import read_rollouts, write_rollouts
from rlsys.driver.batch_metrics import batch_metrics
from rlsys.driver.credit_assignment import CreditAssigner
from rlsys.driver.evaluation import Evaluator
from rlsys.driver.sampling import Sampler
from rlsys.metrics import values
from rlsys.models import resolve_model
from rlsys.rewards import reward_model_role
from rlsys.rewards.scoring import CompletionOutcomes, FunctionFailure, FunctionReward
from rlsys.run.checkpoints import Checkpoint
from rlsys.run.compute_dtype import ProductSpeed
from rlsys.run.ineffective_options import ineffective_options
from rlsys.run.resume import REWARD_MODEL_STATE, registered_states
from rlsys.run.reward_model_identity import reward_model_identity
from rlsys.run.step_time import estimate_step
from tests.support.in_process_fakes import (
    FirstTokenScorer,
    Stage,
    TableGenerator,
    held_out_prompts,
)
from tests.support.reward_models import build_reward_model
from tests.support.rollout_examples import rollouts
from workers.cluster import bundles_of
from workers.reward_worker import join_scores, reward_batch

CPU = Hardware(cpus=2, memory_gib=24.0, gpus=0, gpu_memory_gib=0.0)
MATH = RewardFunctionConfig(name="math")


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_reward_model(tmp_path_factory.mktemp("models") / "reward_model", mean=0.25)


def model(path: object = "somewhere", *, weight: float = 1.0, **parameters: Any) -> Any:
    return RewardFunctionConfig(
        name="model", weight=weight, parameters={"path": str(path), **parameters}
    )


def flag(*functions: RewardFunctionConfig) -> str:
    return json.dumps([function.model_dump() for function in functions])


Command = Callable[..., tuple[Any, str, str]]


@pytest.fixture
def dry_run(capsys: pytest.CaptureFixture[str]) -> Command:
    """Return a function that makes a dry run and returns exit code, stdout and stderr."""

    def run(functions: str, *flags: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as end:
            run_recipe(
                grpo_math,
                ["--model.path", "tiny", "--dry-run", "--reward.functions", functions, *flags],
            )
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return run


# --- configuration --------------------------------------------------------------------------------


def test_the_plan_lists_the_ranks_of_the_model(dry_run: Command, reward_model: Path):
    code, out, err = dry_run(flag(MATH, model(reward_model, weight=0.5, compute_dtype="bfloat16")))
    assert code == 0, err
    assert "rewards      1 processes: math\n" in out
    assert "reward model 1 ranks beside the policy; 0.00 GiB weights (bfloat16), " in out
    _, out, _ = dry_run("math")
    assert "reward model none (no reward is a model)\n" in out


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "reward.functions.parameters.path: model_reward needs this parameter"),
        ({"path": ""}, "reward.functions.parameters.path: it is empty."),
        ({"path": "./nowhere"}, "reward.functions.parameters.path: './nowhere' is neither"),
        ({"path": "tiny", "scale": 2.0}, "parameters.scale: model_reward has no such parameter"),
        ({"path": "tiny", "ranks": 0}, "reward.functions.parameters.ranks: 0 must be at least 1."),
        ({"path": "tiny", "ranks": 2}, "parameters.ranks: 2 is above policy.ranks 1"),
        (
            {"path": "tiny", "compute_dtype": "float16"},
            "parameters.compute_dtype: 'float16' is not accepted. Choose one of float32, bfloat16",
        ),
        ({"path": "tiny", "microbatch_tokens": 0}, "parameters.microbatch_tokens: 0 must be at"),
        ({"path": "tiny"}, "parameters.path: 'tiny': it is a reward model without a head. Give"),
    ],
)
def test_parameters_that_cannot_work_are_refused(
    parameters: dict[str, Any], message: str, dry_run: Command
):
    function = RewardFunctionConfig(name="model", parameters=parameters)
    code, _, err = dry_run(flag(MATH, function))
    assert code == 2
    assert len(err.splitlines()) == 1
    assert message in err


def test_two_models_are_refused(dry_run: Command, reward_model: Path):
    code, _, err = dry_run(flag(model(reward_model), model(reward_model)))
    assert code == 2
    assert "reward.functions: model, model names a function twice" in err


def changed_model(source: Path, target: Path, **fields: Any) -> Path:
    """Copy a model and change its config.json."""
    shutil.copytree(source, target)
    file = target / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return target


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 100}, "has embeddings for 100 tokens and model.path 'tiny' for 381"),
        ({"max_position_embeddings": 100}, "+ 1 for an end token exceed the 100 positions of"),
        ({"id2label": {"0": "A", "1": "B"}}, "has 2 labels, and a value is one number"),
        (
            {"architectures": ["LlamaForTokenClassification"]},
            "it is saved as ForTokenClassification, as a critic is",
        ),
        ({"architectures": ["LlamaForCausalLM"]}, "it is a reward model without a head."),
        # What started from a reward model, or has no other layout, is saved as one.
        ({"value_role": "critic"}, "it is a critic, whose values are no rewards."),
        ({"value_role": "process_reward_model"}, "it is a process reward model, whose values"),
        # 160 tokens of prompt, 16 of response and an end token.
        (
            {"rope_parameters": {"type": "dynamic", "original_max_position_embeddings": 176}},
            "changes the frequencies of sequences beyond 176 tokens",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    fields: dict[str, Any], message: str, dry_run: Command, reward_model: Path, tmp_path: Path
):
    changed = changed_model(reward_model, tmp_path / "changed", **fields)
    code, _, err = dry_run(flag(MATH, model(changed)))
    assert code == 2
    assert err.startswith("error: reward.functions.parameters.path: ")
    assert message in err


@pytest.mark.parametrize("field", ["model.path", "reference.path"])
def test_a_reward_model_is_no_policy_and_no_reference(
    field: str, dry_run: Command, reward_model: Path
):
    kl = ["--algorithm.kl.coefficient", "0.1"]
    code, _, err = dry_run(flag(MATH), f"--{field}", str(reward_model), *kl)
    assert code == 2
    assert f"{field}: '{reward_model}': it is saved as LlamaForSequenceClassification" in err


def test_a_reward_model_starts_from_no_process_reward_model(
    capsys: pytest.CaptureFixture[str], reward_model: Path, tmp_path: Path
):
    fields = {"architectures": ["LlamaForTokenClassification"]}
    steps = changed_model(reward_model, tmp_path / "steps", **fields)
    for recipe, start, saved in (
        (reward_model_math, steps, "ForTokenClassification"),
        (process_reward_model_math, reward_model, "ForSequenceClassification"),
    ):
        with pytest.raises(SystemExit) as end:
            run_offline(recipe, ["--model.path", str(start), "--dry-run"])
        assert end.value.code == 2
        assert f"model.path: '{start}': it is saved as {saved}, and" in capsys.readouterr().err


def test_a_model_of_another_tokenizer_is_refused(
    dry_run: Command, reward_model: Path, tmp_path: Path
):
    other = changed_model(reward_model, tmp_path / "other")
    file = other / "tokenizer.json"
    facts = json.loads(file.read_text())
    vocabulary = facts["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    file.write_text(json.dumps(facts))
    code, _, err = dry_run(flag(MATH, model(other)))
    assert code == 2
    assert f"reward.functions.parameters.path: the tokenizer of {str(other)!r} differs" in err
    assert "and the reward model reads the policy's token ids" in err


def test_a_model_without_an_end_token_is_refused(
    dry_run: Command, reward_model: Path, tmp_path: Path
):
    endless = changed_model(reward_model, tmp_path / "endless", eos_token_id=None)
    file = endless / "tokenizer_config.json"
    facts = json.loads(file.read_text())
    del facts["eos_token"]
    file.write_text(json.dumps(facts))
    generation = endless / "generation_config.json"
    generation.unlink(missing_ok=True)
    code, _, err = dry_run(flag(MATH, model(endless)))
    assert code == 2
    assert "names an end token, at which a response is scored" in err


def test_dynamic_sampling_by_accuracy_needs_one(dry_run: Command, reward_model: Path):
    flags = ("--algorithm.dynamic_sampling.max_rounds", "2")
    code, _, err = dry_run(flag(model(reward_model)), *flags)
    assert code == 2
    assert "algorithm.dynamic_sampling.by: 'accuracy' needs right and wrong responses" in err
    assert dry_run(flag(MATH, model(reward_model)), *flags)[0] == 0
    by_reward = (*flags, "--algorithm.dynamic_sampling.by", "reward")
    assert dry_run(flag(model(reward_model)), *by_reward)[0] == 0


def test_a_pipeline_refuses_rewards_before_it_trains_their_model(
    capsys: pytest.CaptureFixture[str],
):
    functions = flag(RewardFunctionConfig(name="model", parameters={"ranks": 7}), MATH)
    rounds = ["--ppo.algorithm.dynamic_sampling.max_rounds", "2"]
    rewards = ["--ppo.reward.functions", functions]
    with pytest.raises(SystemExit) as end:
        run_rlhf(rlhf, ["--model.path", "tiny", "--dry-run", *rounds, *rewards])
    assert end.value.code == 2
    ranks, accuracy = capsys.readouterr().err.splitlines()
    assert "ppo.reward.functions.parameters.ranks: 7 is above ppo.policy.ranks 1" in ranks
    assert "ppo.algorithm.dynamic_sampling.by: 'accuracy' needs right and wrong" in accuracy


def test_a_warning_tells_where_accuracy_could_be_measured(dry_run: Command, reward_model: Path):
    _, out, err = dry_run(flag(model(reward_model), MATH))
    assert "no accuracy is measured, although 'math' could decide it. Name 'math' first." in (
        " ".join((out + err).split())
    )
    _, out, err = dry_run(flag(MATH, model(reward_model)))
    assert "no accuracy is measured" not in out + err


def test_options_that_only_functions_read_have_no_effect_beside_a_model_alone():
    config = evolve(grpo_math(CPU), {"reward.functions": [model().model_dump()]})
    explicit = ["reward.timeout_s", "trainer.evaluation.samples_per_prompt"]
    config = evolve(config, {"trainer.evaluation.samples_per_prompt": 4})
    found = list(ineffective_options(config, explicit, CPU))
    assert [line.split(":")[0] for line in found] == sorted(explicit)
    both = evolve(config, {"reward.functions": [MATH.model_dump(), model().model_dump()]})
    assert list(ineffective_options(both, explicit, CPU)) == []


def test_other_commands_refuse_it(
    capsys: pytest.CaptureFixture[str], reward_model: Path, tmp_path: Path
):
    flags = ["--model.path", "tiny", "--generation.engine", "transformers"]
    flags += ["--reward.functions", flag(MATH, model(reward_model)), "--dry-run"]
    commands: dict[str, Callable[[], object]] = {
        "recipes.evaluate_math": lambda: run_evaluation(evaluate_math, flags),
        "recipes.make_rankings": lambda: run_rankings(
            [*flags, "--output", str(tmp_path / "rankings.parquet")]
        ),
        "a run on examples": lambda: run_offline(sft_math, flags),
    }
    for name, command in commands.items():
        with pytest.raises(SystemExit) as end:
            command()
        assert end.value.code == 2, name
        assert f"'model' is a reward of RL training, and {name} starts no reward model." in (
            capsys.readouterr().err
        )


def test_the_role_is_that_of_the_policy_with_the_parameters_that_are_given():
    config = evolve(grpo_math(CPU), {"policy.ranks": 2, "policy.microbatch_tokens": 99})
    config = evolve(config, {"reward.functions": [model(ranks=1).model_dump()]})
    role = reward_model_role(config)
    assert (role.ranks, role.microbatch_tokens) == (1, 99)
    assert role.compute_dtype == config.policy.compute_dtype
    assert not hasattr(role, "optimizer"), "it is frozen"


def test_the_ranks_of_the_model_are_guests_of_the_policy():
    alone = bundles_of(evolve(grpo_math(CPU), {"algorithm.kl.coefficient": 0.0}), with_gpus=True)
    config = evolve(grpo_math(CPU), {"reward.functions": [model().model_dump()]})
    beside = bundles_of(evolve(config, {"algorithm.kl.coefficient": 0.0}), with_gpus=True)
    assert [bundle.guests for bundle in alone if bundle.role == "policy"] == [0]
    assert [bundle.guests for bundle in beside if bundle.role == "policy"] == [1]


def test_the_estimate_of_a_step_counts_a_forward_pass_of_the_model():
    """6 for the update of the policy, without old and reference; 2 for the scores. 8 / 6."""
    speed = ProductSpeed(float32=100.0, bfloat16=100.0)
    changes = {
        "algorithm.kl.coefficient": 0.0,
        "policy.num_mini_batches": 1,
        "policy.compute_dtype": "float32",
        "generation.dtype": "float32",
    }
    config = evolve(grpo_math(CPU), changes)
    sizes: dict[str, Any] = {"parameters": 1_000_000, "prompt_tokens": 50.0, "speed": speed}
    scored = evolve(config, {"reward.functions": [model().model_dump()]})
    with_model, without = estimate_step(scored, CPU, **sizes), estimate_step(config, CPU, **sizes)
    assert with_model is not None
    assert without is not None
    assert with_model.training_s == pytest.approx(8 / 6 * without.training_s)


# --- joining --------------------------------------------------------------------------------------


def outcomes(*rows: tuple[float | str, ...]) -> list[CompletionOutcomes]:
    """Return the outcomes of the pool, with a row of numbers and failure kinds per response."""

    def outcome(value: float | str) -> FunctionReward | FunctionFailure:
        if isinstance(value, str):
            kind: Any = value
            return FunctionFailure(kind=kind, message=f"{value}!")
        return FunctionReward(reward=value, reason="judged", answer="7")

    return [CompletionOutcomes(outcomes=tuple(map(outcome, row))) for row in rows]


def test_the_score_joins_the_others_by_weight_at_its_place():
    """1 + 0.5 * 3 - 0.1 * 2 = 2.3, and 0 + 0.5 * -1 - 0.1 * 0 = -0.5."""
    functions = (MATH, model(weight=0.5), RewardFunctionConfig(name="repetition", weight=-0.1))
    config = RewardConfig(functions=functions)
    scores = np.array([3.0, -1.0], dtype=np.float32)
    joined = join_scores(config, outcomes((1.0, 2.0), (0.0, 0.0)), scores)
    batch = reward_batch(5, config, joined)

    np.testing.assert_allclose(batch.rewards, [2.3, -0.5], rtol=1e-6)
    assert list(batch.components) == ["math", "model", "repetition"]
    assert batch.components["model"].tolist() == [3.0, -1.0]
    assert batch.components["repetition"].tolist() == [2.0, 0.0]
    assert batch.has_accuracy
    assert batch.correct.tolist() == [True, False]
    assert (batch.reasons, batch.extracted_answers) == (("judged", "judged"), ("7", "7"))


@pytest.mark.parametrize("on_failure", ["zero", "drop"])
def test_a_failure_of_either_leaves_the_other(on_failure: Any):
    """Row 0: the function timed out; row 1: the score is NaN; row 2: the score is too large."""
    functions = (MATH, model(weight=2.0))
    config = RewardConfig(functions=functions, on_failure=on_failure)
    scores = np.array([1.5, math.nan, 3e38], dtype=np.float32)
    rows = outcomes(("timeout",), (1.0,), (1.0,))
    batch = reward_batch(0, config, join_scores(config, rows, scores))

    expected = [3.0, 1.0, 1.0] if on_failure == "zero" else [math.nan] * 3
    np.testing.assert_array_equal(batch.rewards, np.array(expected, dtype=np.float32))
    np.testing.assert_array_equal(batch.components["model"], [1.5, math.nan, math.nan])
    np.testing.assert_array_equal(batch.components["math"], [math.nan, 1.0, 1.0])
    found = [(failure.row, failure.function, failure.kind) for failure in batch.failures]
    assert found == [(0, "math", "timeout"), (1, "model", "error"), (2, "model", "error")]
    assert batch.failures[1].message == "ValueError: its score is nan; a reward must be finite"


def test_scores_of_ranks_are_put_in_the_order_of_the_responses():
    parts = [
        ScoreBatch(
            batch_id=0, rows=np.array([2, 0]), scores=np.array([0.2, 0.0], dtype=np.float32)
        ),
        ScoreBatch(batch_id=0, rows=np.array([1]), scores=np.array([0.1], dtype=np.float32)),
    ]
    np.testing.assert_allclose(ScoreBatch.scatter(parts, 3), [0.0, 0.1, 0.2], rtol=1e-6)
    with pytest.raises(AssertionError, match="exactly one rank"):
        ScoreBatch.scatter(parts, 4)


# --- without an accuracy --------------------------------------------------------------------------


def model_first(on_scores: list[float]) -> tuple[ScoredBatch, RewardConfig]:
    config = RewardConfig(functions=(model(),))
    rows = [CompletionOutcomes(outcomes=())] * len(on_scores)
    scores = np.array(on_scores, dtype=np.float32)
    rewards = reward_batch(0, config, join_scores(config, rows, scores))
    made = rollouts([([9], [[1, 2], [3]]), ([8], [[5], [5, 6]])])
    return ScoredBatch(rollouts=made, rewards=rewards), config


def test_a_model_alone_says_neither_right_nor_wrong(tmp_path: Path):
    batch, reward = model_first([1.0, 2.0, -1.0, 0.9])
    assert not batch.rewards.has_accuracy
    assert not batch.rewards.correct.any()
    numbers = values(batch_metrics(batch))
    assert numbers["reward/mean"] == pytest.approx(0.725)
    assert numbers["reward/component/model"] == pytest.approx(0.725)
    assert not {"reward/accuracy", "trained/accuracy", "reward/format_rate"} & {*numbers}

    config = RunConfig(reward=reward)
    train, _ = CreditAssigner(config).assign(batch.rollouts, batch.rewards, [], [])
    write_rollouts(train, tmp_path / "step.parquet")
    rows = read_rollouts(tmp_path / "step.parquet")
    assert [row["correct"] for row in rows] == [None] * 4
    assert all(math.isnan(row["accuracy"]) for row in rows)
    assert [row["reward_model"] for row in rows] == pytest.approx([1.0, 2.0, -1.0, 0.9])


@pytest.mark.parametrize("first", [MATH, model()])
async def test_an_evaluation_reports_the_mean_rewards(first: RewardFunctionConfig):
    """All logits are equal, so a greedy response begins with token 0, and its score is 0.75."""

    class WithModel(FirstTokenScorer):
        async def _score(self, rollouts):
            rewards = await super()._score(rollouts)
            scores = np.full(len(rewards), 0.75, dtype=np.float32)
            return replace(
                rewards,
                rewards=rewards.rewards + scores,
                components={"math": rewards.rewards, "model": scores},
                has_accuracy=first is MATH,
            )

    functions = (MATH, model()) if first is MATH else (model(), MATH)
    config = RunConfig.model_validate(
        {
            "generation": {"min_tokens": 0, "max_tokens": 2},
            "reward": {"functions": functions},
            "trainer": {"evaluation": {"samples_per_prompt": 4, "pass_at": [1], "every": 1}},
        }
    )
    stage = Stage()
    generator = TableGenerator(stage, config)
    generator.logits = np.zeros_like(generator.logits)
    sampler = Sampler(config, generator, WithModel(stage))
    found = await Evaluator(config, held_out_prompts(), sampler).evaluate()

    assert found["eval/component/model"] == 0.75
    assert found["eval/reward"] == pytest.approx(0.75 + found["eval/component/math"])
    measures_accuracy = first is MATH
    assert ("eval/accuracy" in found) == measures_accuracy
    assert ("eval/mean@4" in found) == measures_accuracy
    assert len(generator.requests) == 1 + measures_accuracy, "nothing is sampled in vain"
    assert [name for name in found if documented(name) is None] == []


# --- resume ---------------------------------------------------------------------------------------


def test_a_resumed_run_must_have_the_same_model(reward_model: Path, tmp_path: Path):
    def of(path: Path) -> RunConfig:
        return RunConfig(reward=RewardConfig(functions=(MATH, model(path))))

    def resumed(path: Path, **state: Any) -> Any:
        checkpoint = Checkpoint(step=1, path=tmp_path / "step_000001", state=state)
        return reward_model_identity(of(path), checkpoint)

    identity = reward_model_identity(of(reward_model), None)
    assert identity is not None
    assert identity.directory == reward_model
    state = {REWARD_MODEL_STATE: json.loads(json.dumps(identity.state()))}

    moved = tmp_path / "moved"
    shutil.copytree(reward_model, moved)
    assert resumed(moved, **state) is not None
    assert resumed(reward_model) is not None, "a run may get its first reward model"
    other = build_reward_model(tmp_path / "other", mean=0.25, seed=1)
    with pytest.raises(ConfigError, match="holds another model than the one whose rewards"):
        resumed(other, **state)
    mean = changed_model(reward_model, tmp_path / "mean", reward_mean=0.5)
    with pytest.raises(ConfigError, match=r"^reward\.functions\.parameters\.path: "):
        resumed(mean, **state)


def test_a_checkpoint_without_a_reward_model_can_be_continued(tmp_path: Path):
    checkpoint = Checkpoint(step=1, path=tmp_path, state={"metrics_position": 3})
    found = registered_states(checkpoint, RunConfig(), ["metrics_position", REWARD_MODEL_STATE])
    assert found == {"metrics_position": 3, REWARD_MODEL_STATE: None}
    assert reward_model_identity(RunConfig(), checkpoint) is None


def test_the_tiny_model_has_no_head():
    """So that the refusals above are about what they name."""
    facts = json.loads((resolve_model("tiny") / "config.json").read_text())
    assert facts["architectures"] == ["LlamaForCausalLM"]
