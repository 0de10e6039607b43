"""Functions of a `RewardInput`, results with a reason, and their inputs from data and rollouts."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.config import RewardConfig, RewardFunctionConfig, RunConfig
from rlsys.data.batches import StopReason
from rlsys.data.prompt_stream import load_problems
from rlsys.rewards import (
    RewardInput,
    RewardResult,
    check_reward_function,
    math_reward,
    reads_metadata,
    register_reward_function,
)
from rlsys.rewards.pool import RewardPool
from rlsys.rewards.registry import Call, call_of
from rlsys.rewards.scoring import FunctionFailure, run_functions
from tests.support.rollout_examples import rollouts
from workers.reward_worker import reward_inputs

INPUT = RewardInput(
    completion="two words",
    ground_truth="2",
    prompt="<user> Count! ",
    problem="Count!",
    metadata={"unit": "words", "limits": [1, 3]},
    token_ids=(5, 6, 7),
    num_tokens=3,
    truncated=True,
)


def functions(*names: str) -> tuple[RewardFunctionConfig, ...]:
    return tuple(RewardFunctionConfig(name=name) for name in names)


def annotated(inputs: RewardInput, *, scale: float = 1.0) -> float:
    low, high = inputs.metadata["limits"]
    return scale * (low <= len(inputs.completion.split()) <= high)


def alone(inputs):
    return inputs.num_tokens + inputs.truncated


class WithAnObject:
    def __call__(self, inputs: RewardInput) -> RewardResult:
        return RewardResult(0.5, reason="half", answer=inputs.problem)


def pair(completion, ground_truth):
    return float(completion == ground_truth)


def pair_and_tokens(completion: str, ground_truth: str, completion_tokens: int) -> float:
    return completion_tokens


for name, function in {
    "annotated": annotated,
    "alone": alone,
    "object": WithAnObject(),
    "pair": pair,
    "pair_and_tokens": pair_and_tokens,
}.items():
    register_reward_function(f"{name}_for_inputs")(function)


@pytest.mark.parametrize(
    ("name", "call", "score"),
    [
        ("annotated", Call.INPUT, 1.0),
        ("alone", Call.INPUT, 4.0),
        ("object", Call.INPUT, 0.5),
        ("pair", Call.TEXTS, 0.0),
        ("pair_and_tokens", Call.TEXTS_AND_TOKENS, 3.0),
    ],
)
def test_each_kind_of_function_gets_its_arguments(name: str, call: Call, score: float):
    name = f"{name}_for_inputs"
    check_reward_function(name, {})
    assert call_of(name) is call
    assert reads_metadata(functions("math", name)) == (call is Call.INPUT)
    assert run_functions(functions(name), INPUT).components == (score,)


def test_parameters_of_a_function_of_an_input_are_checked():
    check_reward_function("annotated_for_inputs", {"scale": 2})
    with pytest.raises(ValueError, match=r"scal: annotated has no such parameter.*scale"):
        check_reward_function("annotated_for_inputs", {"scal": 2})


def test_a_function_that_wants_more_than_an_input_is_refused():
    def reward(inputs: RewardInput, judge) -> float:
        return judge(inputs)

    register_reward_function("wants_a_judge")(reward)
    with pytest.raises(ValueError, match=r"cannot be called: missing a required argument: 'judge'"):
        check_reward_function("wants_a_judge", {})


def test_a_result_has_a_reason_and_an_answer():
    score = run_functions(functions("object_for_inputs", "math"), INPUT)
    assert (score.reason, score.answer) == ("half", "Count!")
    assert math_reward(r"so \boxed{3}", "3") == RewardResult(1.0, reason="correct", answer="3")
    assert math_reward("so 3", "3") == RewardResult(0.0, reason="no_answer", answer=None)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (RewardResult(float("nan")), "ValueError: it returned nan"),
        (RewardResult(1.0, reason="two words"), "TypeError: its reason is 'two words' (str)"),
        (RewardResult(1.0, reason=""), "TypeError: its reason is '' (str)"),
        (
            RewardResult(1.0, answer=3),  # pyright: ignore[reportArgumentType]
            "TypeError: its answer is 3 (int)",
        ),
    ],
)
def test_results_that_cannot_be_used_are_failures(result: RewardResult, message: str):
    register_reward_function("result_for_inputs")(lambda inputs: result)
    (outcome,) = run_functions(functions("result_for_inputs"), INPUT).outcomes
    assert isinstance(outcome, FunctionFailure)
    assert outcome.message.startswith(message)


def test_a_function_in_the_pool_reads_metadata_and_is_warmed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "reads_metadata.py").write_text(
        "from rlsys.rewards import RewardInput, RewardResult, register_reward_function\n"
        "READY = []\n"
        "@register_reward_function('in_limits', warm_up=lambda: READY.append(1))\n"
        "def in_limits(inputs: RewardInput):\n"
        "    low, high = inputs.metadata['limits']\n"
        "    right = low <= len(inputs.token_ids) <= high\n"
        "    return RewardResult(right * len(READY), reason='inside' if right else 'outside')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = RewardConfig(functions=functions("in_limits"))
    pool = RewardPool(config, ("reads_metadata",))
    long = INPUT._replace(token_ids=range(9))
    found = [pool.submit(inputs).result() for inputs in (INPUT, long)]
    pool.shutdown()
    assert [(score.components, score.reason) for score in found] == [
        ((1.0,), "inside"),
        ((0.0,), "outside"),
    ]


def test_inputs_of_rollouts():
    batch = rollouts([([1, 2], [[3, 4, 5], [6]]), ([7], [[8, 9]])], holes={0: [1]})
    reasons = np.array([StopReason.LENGTH, StopReason.END, StopReason.END], dtype=np.int8)
    first, second, third = reward_inputs(replace(batch, stop_reasons=reasons))
    assert pickle.loads(pickle.dumps(first)) == first
    assert (first.prompt, first.problem, first.ground_truth) == ("prompt 0", "problem 0", "0")
    assert (list(first.token_ids), first.num_tokens, first.truncated) == ([3, 4, 5], 2, True)
    assert (list(second.token_ids), second.num_tokens, second.truncated) == ([6], 1, False)
    assert (third.completion, third.metadata) == ("response 2", {"of": 1})


def test_columns_of_the_data_come_along_only_where_they_are_asked_for(tmp_path: Path):
    source = tmp_path / "x.jsonl"
    rows = [{"problem": f"p{i}", "answer": i, "level": i, "tests": ["a"]} for i in range(9)]
    source.write_text("\n".join(map(json.dumps, rows)))
    data: Any = {"train": str(source), "where": {"level": [3, 4]}, "eval": "off"}
    config = RunConfig.model_validate({"data": data})
    assert [p.metadata for p in load_problems(config).train] == [{}, {}]
    assert [p.metadata for p in load_problems(config, metadata=True).train] == [
        {"level": 3, "tests": ["a"]},
        {"level": 4, "tests": ["a"]},
    ]
