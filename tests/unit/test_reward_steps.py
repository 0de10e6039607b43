"""Steps of responses: where they end, what they earn, and their way to the estimators."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recipes.make_rankings import make_rankings, prepare
from rlsys.algorithms.advantages import available_advantage_estimators, estimator_spec
from rlsys.config import (
    AdvantageConfig,
    AlgorithmConfig,
    DynamicSamplingConfig,
    EntropyConfig,
    GenerationConfig,
    KLConfig,
    RewardConfig,
    RewardFunctionConfig,
    RunConfig,
)
from rlsys.config.hardware import Hardware
from rlsys.data.batches import RewardBatch, RolloutBatch, ScoredBatch, StepRewards, TrainBatch
from rlsys.data.response_text import text_after_each_token
from rlsys.data.rollout_files import read_rollouts, write_rollouts
from rlsys.driver.batch_metrics import batch_metrics
from rlsys.driver.credit_assignment import CreditAssigner, LiveLogprobs, recomputed
from rlsys.metrics import values
from rlsys.models import resolve_model
from rlsys.models.loading import load_tokenizer
from rlsys.rewards import (
    RewardInput,
    RewardResult,
    arithmetic_steps_reward,
    register_reward_function,
    split_steps,
)
from rlsys.rewards.arithmetic import equations
from rlsys.rewards.scoring import (
    CompletionOutcomes,
    FunctionFailure,
    FunctionReward,
    run_functions,
)
from rlsys.rewards.steps import Split, tokens_at
from rlsys.run.directory import RunDirectory
from rlsys.run.preflight import config_mistakes
from tests.support.advantage_examples import OUTCOME_ONLY
from tests.support.rollout_examples import rollouts
from workers.reward_worker import (
    RewardWorker,
    outcomes_in_tokens,
    reward_batch,
    step_rewards,
)

TOKENIZER: Any = load_tokenizer(resolve_model("tiny"))
CPU = Hardware(cpus=4, memory_gib=16.0, gpus=0, gpu_memory_gib=0.0)


def tokens(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


# --- splitting ---


def test_steps_end_before_the_delimiter_and_join_to_the_text():
    text = "3 + 4 = 7.\n\n7 * 2 = 14."
    first, second = split_steps(text)
    assert first == ("3 + 4 = 7.\n\n", 10)
    assert second == ("7 * 2 = 14.", 23)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", []),
        (" \n\n ", []),
        ("a", [("a", 1)]),
        ("\n\na\n\n\n\nb\n\n", [("\n\na\n\n\n\n", 3), ("b\n\n", 8)]),
        ("a\n\n\nb", [("a\n\n", 1), ("\nb", 5)]),
    ],
)
def test_blank_parts_are_no_steps(text: str, steps: list):
    assert split_steps(text) == steps


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Add 3.5 and 4. Then stop! Really? Yes", ["Add 3.5 and 4. ", "Then stop! ", "Really? "]),
        ("1. Add.\n2. Then \\boxed{15}. End", ["1. Add.\n", "2. Then \\boxed{15}. "]),
        ("So, e.g. 7, (cf. 2) and i.e. 3. Dr. No", ["So, e.g. 7, (cf. 2) and i.e. 3. "]),
        ('He said "no." Then $x = 3.$ And', ['He said "no." ', "Then $x = 3.$ "]),
        ("好。是的！对", ["好。", "是的！"]),
        ("no mark\nbut lines\n\n", ["no mark\n", "but lines\n\n"]),
    ],
)
def test_sentences(text: str, parts: list[str]):
    found = [step.text for step in split_steps(text, "sentences")]
    assert found[: len(parts)] == parts
    assert "".join(found) == text


@pytest.mark.parametrize("by", ["delimiter", "sentences"])
def test_steps_are_a_partition_of_any_text(by: Split):
    rng = np.random.default_rng(3)
    for _ in range(300):
        text = "".join(rng.choice(list("ab. \n!?1"), size=rng.integers(0, 25)))
        steps = split_steps(text, by)
        assert "".join(step.text for step in steps) == (text if text.strip() else "")
        assert [step.end for step in steps] == sorted({step.end for step in steps})
        for step in steps:
            assert not text[step.end - 1].isspace()
            assert step.text.rstrip().endswith(text[step.end - 1])


def test_an_empty_delimiter_is_refused():
    with pytest.raises(ValueError, match="delimiter: '' does not separate"):
        split_steps("a", delimiter="")


# --- from characters to tokens ---


def slow_token_of(ids: list[int], end: int) -> int:
    """Return the token with which the first `end` characters are complete, by decoding prefixes."""
    for n in range(1, len(ids) + 1):
        text = TOKENIZER.decode(ids[:n], skip_special_tokens=True)
        if len(text.rstrip("\ufffd")) >= end:
            return n - 1
    raise AssertionError("the response is shorter")


@pytest.mark.parametrize(
    "text",
    [
        "3 + 4 = 7.\n\nSo 7 * 2 = 14.\n\nDone",
        "Größe: 5 €.\n\nDas kostet 3 €\n\n\u00bd + \u00bd = 1",
        "数学。\n\n🙂🙂 und ∑ x²\n\né",
    ],
)
def test_ends_are_at_the_token_that_completes_the_last_character(text: str):
    ids = [*tokens(text), TOKENIZER.eos_token_id]
    decoded, lengths = text_after_each_token(TOKENIZER, tokens("2 + 2?"), ids)
    assert decoded == text
    assert len(lengths) == len(ids)

    ends = list(range(1, len(text) + 1))
    assert tokens_at(ends, lengths) == [slow_token_of(ids, end) for end in ends]


def test_a_character_of_several_tokens_belongs_to_the_last_of_them():
    ids = tokens("a€")
    assert len(ids) > 2  # the bytes of the sign are several tokens
    _, lengths = text_after_each_token(TOKENIZER, [], ids)
    assert tokens_at([1, 2], lengths) == [0, len(ids) - 1]
    assert tokens_at([2, 3, 7], [2, 5, 7]) == [0, 1, 2]


def scored(*outcomes: FunctionReward | FunctionFailure) -> list[CompletionOutcomes]:
    """Return responses with one function each."""
    return [CompletionOutcomes(outcomes=(one,)) for one in outcomes]


def with_text(batch: RolloutBatch, *texts: str) -> RolloutBatch:
    return replace(batch, response_texts=texts)


def test_the_worker_places_steps_behind_prompts_of_other_lengths():
    one, two = "ab\n\n€", "€€."
    batch = with_text(
        rollouts([(tokens("a longer prompt €"), [tokens(one)]), (tokens("b"), [tokens(two)])]),
        one,
        two,
    )
    outcomes = scored(
        FunctionReward(reward=0.0, step_rewards=(1.0, 0.5), step_ends=(2, 5)),
        FunctionReward(reward=0.0, step_rewards=(2.0,), step_ends=(2,)),
    )
    placed = outcomes_in_tokens(batch, outcomes, TOKENIZER)
    expected = [
        (slow_token_of(tokens(one), 2), slow_token_of(tokens(one), 5)),
        (slow_token_of(tokens(two), 2),),
    ]
    found = [response.outcomes[0] for response in placed]
    assert [one.step_ends for one in found if isinstance(one, FunctionReward)] == expected


def test_a_text_that_was_cut_within_its_last_token_is_the_responses():
    ids = tokens("3 + 4")
    batch = with_text(rollouts([([1], [ids])]), "3 + ")
    outcomes = scored(FunctionReward(reward=0.0, step_rewards=(1.0,), step_ends=(3,)))
    (placed,) = outcomes_in_tokens(batch, outcomes, TOKENIZER)
    assert isinstance(placed.outcomes[0], FunctionReward)
    assert placed.outcomes[0].step_ends == (slow_token_of(ids, 3),)


def test_steps_of_another_text_than_the_tokens_are_a_failure():
    batch = with_text(rollouts([([1], [tokens("abc"), tokens("abc")])]), "xyz", "xyz")
    outcomes = scored(
        FunctionReward(reward=1.0, step_rewards=(1.0,), step_ends=(3,)), FunctionReward(reward=1.0)
    )
    first, second = outcomes_in_tokens(batch, outcomes, TOKENIZER)
    assert isinstance(first.outcomes[0], FunctionFailure)
    assert "decode to another text" in first.outcomes[0].message
    assert second == outcomes[1]  # without steps nothing has to be placed


# --- results of functions ---


@register_reward_function("steps_for_test", steps=True)
def steps_for_test(inputs: RewardInput) -> RewardResult | float:
    """Return what the metadata say."""
    result = inputs.metadata["result"]
    return RewardResult(**result) if isinstance(result, dict) else result


@register_reward_function("undeclared_steps_for_test")
def undeclared_steps_for_test(inputs: RewardInput) -> RewardResult:
    return RewardResult(1.0, step_rewards=(1.0,), step_ends=(1,))


def outcome_of(name: str, result: Any = None, *, weight: float = 1.0) -> Any:
    inputs = RewardInput("abcd", "", metadata={"result": result})
    functions = [RewardFunctionConfig(name=name, weight=weight)]
    return run_functions(functions, inputs).outcomes[0]


def test_step_rewards_may_be_numbers_of_any_kind():
    result = {"score": 1, "step_rewards": (True, np.float32(0.5)), "step_ends": np.array([1, 4])}
    outcome = outcome_of("steps_for_test", result)
    assert outcome.step_rewards == (1.0, 0.5)
    assert outcome.step_ends == (1, 4)
    assert outcome_of("steps_for_test", {"score": 2.0}).step_ends == ()


@pytest.mark.parametrize(
    ("rewards", "ends", "message"),
    [
        ((1.0,), (), "it returned 1 step_rewards and 0 step_ends"),
        ((1.0, 1.0), (2, 2), "its step_ends have 2 after 2"),
        ((1.0,), (0,), "its step_ends have 0 after 0"),
        ((1.0,), (5,), "its step_ends have 5 after 0; ends rise, from 1 to the 4 characters"),
        ((1.0,), (1.5,), "its step_ends are (1.5,) (tuple); an end is a number of characters"),
        ((float("nan"),), (1,), "it returned nan"),
        ((None,), (1,), "it returned None"),
        ((1e38, 1e38, 1e38, 1e38), (1, 2, 3, 4), "beyond float32"),
    ],
)
def test_steps_that_cannot_be_used_are_failures(rewards: tuple, ends: tuple, message: str):
    result = {"score": 0.0, "step_rewards": rewards, "step_ends": ends}
    outcome = outcome_of("steps_for_test", result)
    assert isinstance(outcome, FunctionFailure)
    assert message in outcome.message


def test_steps_without_the_declaration_and_the_declaration_without_steps_are_failures():
    assert "register it with steps=True" in outcome_of("undeclared_steps_for_test").message
    assert "returns a RewardResult with step_rewards" in outcome_of("steps_for_test", 1.0).message


def test_a_failed_function_gives_no_steps_and_the_others_theirs():
    config = RewardConfig(functions=(RewardFunctionConfig(name="steps_for_test", weight=2.0),))
    outcomes = scored(
        FunctionReward(reward=0.5, step_rewards=(1.0, 0.0), step_ends=(3, 7)),
        FunctionFailure(kind="error", message="on purpose"),
        FunctionReward(reward=0.0),
        FunctionReward(reward=0.0, step_rewards=(0.25,), step_ends=(1,)),
    )
    steps = step_rewards(config, outcomes)["steps_for_test"]
    assert steps.offsets.tolist() == [0, 2, 2, 2, 3]
    assert steps.ends.tolist() == [3, 7, 1]
    assert steps.rewards.tolist() == [1.0, 0.0, 0.25]
    assert steps.rows.tolist() == [0, 0, 3]
    # The outcome is the weighted score alone.
    assert reward_batch(0, config, outcomes).rewards.tolist() == [1.0, 0.0, 0.0, 0.0]


# --- the arithmetic rule ---


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("So 2 * 3 + 1 = 6 + 1 = 7 apples", [("2 * 3 + 1", "6 + 1"), ("6 + 1", "7")]),
        ("7 + 8 = 15. \\boxed{15}", [("7 + 8", "15")]),
        ("$3 \\times 4 = 12$.", [("3 \\times 4", "12")]),
        ("\\boxed{3+4=7}", [("3+4", "7")]),
        ("1,000 + 5 = 1,005, and", [("1,000 + 5", "1,005")]),
        ("3, 4 + 5 = 9", [("4 + 5", "9")]),
        ("x = 12 / 4 = 3", [("12 / 4", "3")]),
        ("(2 + 3) * 4 = 20", [("(2 + 3) * 4", "20")]),
        ("3 + 4 = 7 = 8", [("3 + 4", "7"), ("7", "8")]),
        ("-3 + 4 = 1", [("-3 + 4", "1")]),
    ],
)
def test_equations_between_numbers(text: str, pairs: list):
    assert list(equations(text)) == pairs


@pytest.mark.parametrize(
    "text",
    [
        *("x + 3 = 7", "2x + 3 = 7 + 1", "3 + 4 = 7x", "3 + 4 = 7 x", "3 + 4 = 7\\pi"),
        *("f(2) = 4 + 1", "10% of 20 - 2 = 0", "half of 20 - 2 = 8", "5 = 5", "5! + 1 = 121"),
        *("\\frac{1}{2} + 3 = 3.5", "3 + 4", "three plus 4 = 7", "3 + 4 =", ""),
    ],
)
def test_what_is_not_an_equation_between_numbers_is_left_alone(text: str):
    assert list(equations(text)) == []


def test_arithmetic_steps():
    text = "I add.\n\n3 + 4 = 7.\n\nSo 2 * 7 = 15.\n\nThe end"
    found = arithmetic_steps_reward(text, "")
    assert found.score == 0.0
    assert found.step_rewards == [1.0, 0.0]
    assert found.step_ends == [18, 34]  # 8 + 10, and 20 + 14
    assert arithmetic_steps_reward(text, "", average=True).step_rewards == [0.5, 0.0]
    assert arithmetic_steps_reward("nothing", "").step_rewards == []

    line = "3 + 4 = 7. 10 / 3 = 3.33. 2 + 2 = 4 = 5."
    assert arithmetic_steps_reward(line, "").step_rewards == [0.0]
    assert arithmetic_steps_reward(line, "", split="sentences").step_rewards == [1.0, 0.0, 0.0]


# --- the way to the estimators ---


def config_of(
    estimator: str, *functions: RewardFunctionConfig, parameters: dict | None = None, **more: Any
) -> RunConfig:
    advantage = AdvantageConfig(name=estimator, parameters=parameters or {})
    return RunConfig(
        generation=GenerationConfig(max_tokens=6, min_tokens=0, samples_per_prompt=2),
        reward=RewardConfig(functions=functions),
        algorithm=AlgorithmConfig(advantage=advantage, **more),
    )


OUTCOME = RewardFunctionConfig(name="math")
STEPS = RewardFunctionConfig(name="steps_for_test", weight=2.0)


def rewards_with(
    outcomes: list[float], ends: list[list[int]], step_values: list[list[float]]
) -> RewardBatch:
    """Return rewards of `math`, and steps of the function `steps_for_test`, whose scores are 0."""
    array = np.asarray(outcomes, dtype=np.float32)
    return RewardBatch(
        batch_id=0,
        rewards=array,
        accuracies=array,
        components={"math": array, "steps_for_test": np.zeros_like(array)},
        reasons=("ok",) * len(array),
        extracted_answers=("",) * len(array),
        step_rewards={"steps_for_test": StepRewards.of(ends, step_values)},
    )


def advantages_of(batch: ScoredBatch) -> list[list[float]]:
    assert isinstance(batch, TrainBatch)
    made = batch.rollouts
    ends, starts = made.sequence_offsets[1:], made.sequence_offsets[:-1] + made.prompt_lengths
    return [batch.advantages[start:end].tolist() for start, end in zip(starts, ends, strict=True)]


def pair_of_responses(**more: Any) -> RolloutBatch:
    """Return one group with responses of four tokens and of two."""
    return rollouts([([9, 9], [[1, 2, 3, 4], [5, 6]])], **more)


def test_rewards_of_steps_are_weighted_and_added_to_the_outcome():
    """Weight 2: rewards to go of (0, 2*1, 0, 2*0.5 + 1) and of (2*-1, 0), gae without a critic."""
    given = rewards_with([1, 0], [[1, 3], [0]], [[1.0, 0.5], [-1.0]])
    batch, _ = CreditAssigner(config_of("gae", OUTCOME, STEPS)).assign(
        pair_of_responses(), given, [], []
    )
    assert advantages_of(batch) == [[4.0, 4.0, 2.0, 2.0], [-2.0, 0.0]]


def test_the_steps_of_a_group_are_compared_also_where_their_reward_is_zero():
    """Steps (0, 2 + 1) and (0): the last ones end with their responses. Mean 1, std sqrt(2)."""
    given = rewards_with([1, 0], [[1, 2], [0]], [[0.0, 1.0], [0.0]])
    config = config_of("grpo_process", OUTCOME, STEPS, parameters={"eps": 0.0})
    batch, _ = CreditAssigner(config).assign(pair_of_responses(), given, [], [])
    root = 2**0.5
    first, second = advantages_of(batch)
    assert first == pytest.approx([1 / root, 1 / root, 2 / root, 2 / root])
    assert second == pytest.approx([-1 / root, -1 / root])


def test_two_steps_in_one_token_add_up():
    given = rewards_with([0, 0], [[2, 2], []], [[1.0, 0.5], []])
    batch, _ = CreditAssigner(config_of("reinforce", OUTCOME, STEPS)).assign(
        pair_of_responses(), given, [], []
    )
    assert advantages_of(batch) == [[3.0, 3.0, 3.0, 0.0], [0.0, 0.0]]


def test_a_step_that_ends_outside_the_mask_counts_for_a_sampled_token():
    """Tokens 0 and 2 were not sampled: steps that end there count for tokens 1 and 1."""
    given = rewards_with([0, 0], [[0, 2], []], [[1.0, 0.5], []])
    batch, _ = CreditAssigner(config_of("reinforce", OUTCOME, STEPS)).assign(
        pair_of_responses(holes={0: [0, 2]}), given, [], []
    )
    assert advantages_of(batch)[0] == [0.0, 3.0, 0.0, 0.0]


def test_a_response_without_a_reward_takes_its_steps_with_it():
    given = rewards_with([np.nan, 1], [[1], [0]], [[5.0], [1.0]])
    batch, metrics = CreditAssigner(config_of("gae", OUTCOME, STEPS)).assign(
        pair_of_responses(), given, [], []
    )
    assert advantages_of(batch) == [[0.0] * 4, [3.0, 1.0]]
    assert values(metrics)["reward/dropped"] == 1


def test_the_greedy_response_of_remax_counts_with_its_steps():
    """The sampled responses total 2 and 1; the greedy one 0.5 + 2 * 0.25 = 1."""
    given = rewards_with([0, 1], [[3], []], [[1.0], []])
    greedy = rewards_with([0.5], [[0]], [[0.25]])
    batch, _ = CreditAssigner(config_of("remax", OUTCOME, STEPS)).assign(
        pair_of_responses(), given, [], [], greedy
    )
    assert advantages_of(batch) == [[1.0] * 4, [0.0] * 2]


def test_against_a_slow_loop_with_two_functions_and_a_kl_in_the_reward():
    from rlsys.data.batches import LogprobBatch

    rng = np.random.default_rng(5)
    made = rollouts([([7], [[1] * 5, [2] * 3]), ([7, 7], [[3] * 4, [4]])])
    lengths = [5, 3, 4, 1]
    base = rewards_with([1, 0, 0.5, 0.25], [[]] * 4, [[]] * 4)
    names = {"steps_for_test": 2.0, "arithmetic_steps": -0.5}
    steps = {}
    for name in names:
        ends = [sorted(rng.integers(0, n, 3).tolist()) for n in lengths]
        steps[name] = StepRewards.of(ends, rng.normal(size=(4, 3)).tolist())
    given = replace(base, step_rewards=steps)

    old = rng.normal(size=len(made.token_ids)).astype(np.float32) * made.response_mask
    ref = rng.normal(size=len(made.token_ids)).astype(np.float32) * made.response_mask

    def flat(logprobs: np.ndarray) -> list[LogprobBatch]:
        return [LogprobBatch(batch_id=0, rows=np.arange(4), logprobs=logprobs)]

    config = config_of(
        "reinforce",
        OUTCOME,
        *(RewardFunctionConfig(name=name, weight=weight) for name, weight in names.items()),
        kl=KLConfig(coefficient=0.1, placement="reward", kind="k1"),
    )
    batch, _ = CreditAssigner(config).assign(made, given, flat(old), flat(ref))

    for row, found in enumerate(advantages_of(batch)):
        start = int(made.sequence_offsets[row] + made.prompt_lengths[row])
        expected = []
        for t in range(lengths[row]):
            total = float(given.rewards[row])
            for name, weight in names.items():
                for of, end, reward in zip(
                    steps[name].rows, steps[name].ends, steps[name].rewards, strict=True
                ):
                    total += weight * float(reward) * (of == row and end >= t)
            for s in range(t, lengths[row]):
                total -= 0.1 * float(old[start + s] - ref[start + s])
            expected.append(total)
        assert found == pytest.approx(expected, abs=1e-5)


def test_steps_of_parts_join_in_order():
    one = rewards_with([1], [[0, 2]], [[1.0, 2.0]])
    two = rewards_with([0, 1], [[], [1]], [[], [3.0]])
    joined = RewardBatch.concatenate([one, two]).step_rewards["steps_for_test"]
    assert joined.offsets.tolist() == [0, 2, 2, 3]
    assert joined.ends.tolist() == [0, 2, 1]
    assert joined.rewards.tolist() == [1.0, 2.0, 3.0]
    assert joined.offsets.dtype == np.int64


def test_metrics_and_columns_of_steps(tmp_path: Path):
    """Three steps of rewards 1, 0 and 0.5 on the response that was scored, none on the other."""
    given = rewards_with([1, 0], [[0, 1, 3], []], [[1.0, 0.0, 0.5], []])
    failed = np.array([0.0, np.nan], dtype=np.float32)
    given = replace(given, components={**given.components, "steps_for_test": failed})
    batch = ScoredBatch(rollouts=pair_of_responses(), rewards=given)

    found = values(batch_metrics(batch))
    assert found["reward/steps/steps_for_test"] == 3
    assert found["reward/step_mean/steps_for_test"] == 0.5
    assert found["reward/mean"] == 0.5  # of the outcomes alone

    write_rollouts(batch, tmp_path / "step.parquet", dropped=batch)
    rows = read_rollouts(tmp_path / "step.parquet")
    assert [row["step_ends_steps_for_test"] for row in rows] == [[0, 1, 3], None] * 2
    assert [row["step_rewards_steps_for_test"] for row in rows] == [[1.0, 0.0, 0.5], None] * 2


# --- refusals before a run ---


def mistakes(config: RunConfig, tmp_path: Path) -> str:
    directory = RunDirectory(tmp_path / "run")
    return "\n".join(config_mistakes(config, directory, CPU, resume=False))


def test_grpo_process_without_steps_is_refused(tmp_path: Path):
    found = mistakes(config_of("grpo_process", OUTCOME), tmp_path)
    assert "'grpo_process' compares the rewards of steps" in found
    assert "reward.functions (math)" in found
    assert "arithmetic_steps" in found
    assert "compares the rewards" not in mistakes(
        config_of("grpo_process", OUTCOME, STEPS), tmp_path
    )


@pytest.mark.parametrize(
    "more",
    [
        {"kl": KLConfig(coefficient=0.1, placement="reward", kind="k1")},
        {"entropy": EntropyConfig(temperature=0.1)},
    ],
)
def test_grpo_process_with_a_cost_of_every_token_is_refused(tmp_path: Path, more: dict):
    found = mistakes(config_of("grpo_process", OUTCOME, STEPS, **more), tmp_path)
    assert "'grpo_process' is defined for the rewards of the reward functions alone" in found


@pytest.mark.parametrize("estimator", OUTCOME_ONLY)
def test_steps_with_an_estimator_of_outcomes_are_refused(tmp_path: Path, estimator: str):
    found = mistakes(config_of(estimator, OUTCOME, STEPS), tmp_path)
    assert f"'steps_for_test' rewards steps, and the estimator '{estimator}'" in found


def test_the_declarations_are_those_of_the_estimators():
    uses = {name: estimator_spec(name).step_rewards for name in available_advantage_estimators()}
    assert {name for name, use in uses.items() if use == "refused"} == set(OUTCOME_ONLY)
    assert [name for name, use in uses.items() if use == "needed"] == ["grpo_process"]


def test_dynamic_sampling_by_outcomes_would_lose_steps(tmp_path: Path):
    sampling = DynamicSamplingConfig(max_rounds=2, by="reward")
    found = mistakes(config_of("gae", OUTCOME, STEPS, dynamic_sampling=sampling), tmp_path)
    assert "algorithm.dynamic_sampling.by: 'reward'" in found
    by_accuracy = DynamicSamplingConfig(max_rounds=2, by="accuracy")
    found = mistakes(config_of("gae", OUTCOME, STEPS, dynamic_sampling=by_accuracy), tmp_path)
    assert "dynamic_sampling" not in found


def test_a_function_without_a_score_decides_no_accuracy(tmp_path: Path):
    alone = RewardFunctionConfig(name="arithmetic_steps")
    message = "reward.functions: 'arithmetic_steps' is first, where it decides accuracy"
    assert message in mistakes(config_of("gae", alone, OUTCOME), tmp_path)
    assert message not in mistakes(config_of("gae", OUTCOME, alone), tmp_path)


def test_rankings_refuse_rewards_of_which_they_would_compare_a_part():
    def refusal(name: str) -> str:
        reward = RewardConfig(functions=(OUTCOME, RewardFunctionConfig(name=name)))
        config = make_rankings(CPU).model_copy(update={"reward": reward})
        with pytest.raises(ValueError, match="Leave it out") as error:
            prepare(config, CPU)
        return str(error.value)

    assert "'steps_for_test' rewards steps, and rankings compare the scores" in refusal(
        "steps_for_test"
    )
    assert "'arithmetic_steps' rewards steps alone, which RL training reads" in refusal(
        "arithmetic_steps"
    )


def test_an_empty_delimiter_of_the_arithmetic_rule_is_refused(tmp_path: Path):
    function = RewardFunctionConfig(name="arithmetic_steps", parameters={"delimiter": ""})
    found = mistakes(config_of("gae", OUTCOME, function), tmp_path)
    assert "reward.functions.parameters.delimiter: '' does not separate" in found


def test_estimators_see_the_ends_of_steps_as_a_mask():
    from rlsys.driver.advantage_estimation import EstimatorContext, TokenArrays, advantage_inputs

    given = rewards_with([1, 0], [[1, 3], [0]], [[0.0, 0.5], [0.0]])
    inputs = advantage_inputs(
        AlgorithmConfig(),
        pair_of_responses(),
        given,
        TokenArrays(),
        EstimatorContext(reward_weights={"math": 1.0, "steps_for_test": 2.0}),
    )
    assert inputs.step_ends is not None
    assert inputs.token_rewards is not None
    assert inputs.step_ends.int().tolist() == [[0, 1, 0, 1], [1, 0, 0, 0]]
    assert inputs.token_rewards.tolist() == [[0.0, 0.0, 0.0, 1.0], [0.0] * 4]
    assert inputs.token_rewards.dtype == torch.float32


async def test_a_worker_scores_steps_in_its_processes_and_places_them():
    """Half of the weight of `arithmetic_steps`; the score of `math` is the outcome."""
    text = "2 * 3 = 6.\n\n6 + 1 = 8.\n\nSo \\boxed{0}"
    ids = [*tokens(text), TOKENIZER.eos_token_id]
    batch = with_text(rollouts([(tokens("2 * 3 + 1?"), [ids, tokens("no")])]), text, "no")
    config = config_of("gae", OUTCOME, RewardFunctionConfig(name="arithmetic_steps", weight=0.5))

    worker = RewardWorker(config, str(resolve_model("tiny")))
    try:
        given = await worker.score(batch)
    finally:
        await worker.shutdown()

    steps = given.step_rewards["arithmetic_steps"]
    assert given.rewards.tolist() == [1.0, 0.0]
    assert steps.rewards.tolist() == [1.0, 0.0]
    assert steps.offsets.tolist() == [0, 2, 2]
    assert steps.ends.tolist() == [slow_token_of(ids, 10), slow_token_of(ids, 22)]

    credited, _ = CreditAssigner(config).assign(batch, given, [], [])
    first, second = advantages_of(credited)
    end = int(steps.ends[0])
    assert first == [1.5] * (end + 1) + [1.0] * (len(ids) - end - 1)
    assert second == [0.0] * len(second)


async def test_without_a_tokenizer_only_responses_are_scored():
    worker = RewardWorker(config_of("gae", OUTCOME, RewardFunctionConfig(name="arithmetic_steps")))
    try:
        given = await worker.score(with_text(rollouts([([1], [[2]])]), "1 + 1 = 2"))
    finally:
        await worker.shutdown()
    assert given.step_rewards == {}
    assert given.components["arithmetic_steps"].tolist() == [0.0]


def test_advantages_that_are_estimated_again_have_the_rewards_of_steps():
    """As before a mini-batch of `algorithm.advantage.recompute`, of the second response alone."""
    made = pair_of_responses()
    given = rewards_with([1, 0], [[1, 3], [0]], [[1.0, 0.5], [-1.0]])
    live = LiveLogprobs(
        logprobs=np.zeros(len(made.token_ids), dtype=np.float32),
        squared_score_norms=np.ones(len(made.token_ids), dtype=np.float32),
    )
    found = recomputed(
        config_of("reinforce", OUTCOME, STEPS),
        ScoredBatch(rollouts=made, rewards=given),
        np.array([1]),
        live,
        {},
    )
    assert advantages_of(found.batch) == [[0.0] * 4, [-2.0, 0.0]]
