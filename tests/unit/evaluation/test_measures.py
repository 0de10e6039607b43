"""Measures of responses, written down by hand."""

import numpy as np
import pytest

from rlsys.evaluation.measures import (
    Measure,
    columns_to_break_down,
    difference_of,
    measures_of,
    prompts_by_value,
)
from rlsys.evaluation.responses import ModelResponses


def responses(**changes) -> ModelResponses:
    """Return two prompts with four samples each: right are 2 and 0 of 4."""
    right = np.array([[True, True, False, False], [False] * 4])
    lengths = np.array([[2, 4, 6, 8], [1, 1, 1, 1]])
    given = {
        "places": np.array([0, 3]),
        "problem_ids": ("a", "b"),
        "metadata": ({"level": 1}, {"level": 2}),
        "correct": right,
        "answered": np.array([[True] * 4, [True, False, False, False]]),
        "truncated": np.array([[False, False, False, True], [False] * 4]),
        "failed": np.zeros((2, 4), dtype=np.bool_),
        "lengths": lengths,
        "log_probs": -0.5 * lengths,
        "rewards": right.astype(np.float64),
        "components": {"math": right.astype(np.float64)},
        "answers": (("7", "7.0", "8", "9"), ("5", "", "", "")),
    }
    return ModelResponses(**(given | changes))


def values(of: ModelResponses, *, with_entropy: bool = True) -> dict[str, list[float]]:
    measures = measures_of(of, pass_at=(1, 2, 4), majority_at=(4,), with_entropy=with_entropy)
    return {measure.name: measure.values.tolist() for measure in measures}


def test_every_measure_by_hand():
    found = values(responses())
    assert list(found) == [
        *("accuracy", "pass@2", "pass@4", "majority@4"),
        *("format_rate", "truncated", "length", "entropy"),
    ]
    assert found["accuracy"] == [0.5, 0.0]
    assert found["pass@2"] == pytest.approx([5 / 6, 0.0])  # 1 - C(2, 2) / C(4, 2)
    assert found["pass@4"] == [1.0, 0.0]
    assert found["majority@4"] == [1.0, 0.0]  # 7 and 7.0 are two votes; the only vote is wrong
    assert found["format_rate"] == [1.0, 0.25]
    assert found["truncated"] == [0.25, 0.0]
    assert found["length"] == [5.0, 1.0]
    assert found["entropy"] == [0.5, 0.5]  # 0.5 nats for each token


def test_the_entropy_of_a_prompt_weights_its_tokens_equally():
    """One token of 3 nats and 3 tokens of 1 nat each: 6 nats / 4 tokens, not (3 + 1) / 2."""
    one = responses(
        lengths=np.array([[1, 3, 1, 3], [1, 1, 1, 1]]),
        log_probs=np.array([[-3.0, -3.0, -3.0, -3.0], [0.0] * 4]),
    )
    assert values(one)["entropy"] == [1.5, 0.0]
    assert "entropy" not in values(one, with_entropy=False)


def test_a_reward_is_shown_where_it_is_not_the_accuracy():
    assert "reward" not in values(responses())
    rewards = np.array([[1.0, 0.5, np.nan, np.nan], [np.nan] * 4])
    components = {"math": rewards, "mine": np.array([[2.0] * 4, [0.0, 0.0, 1.0, 1.0]])}
    failed = np.isnan(rewards)
    found = values(responses(rewards=rewards, components=components, failed=failed))
    # A reward that failed and was dropped does not count in its prompt's mean.
    assert found["reward"] == [0.75, pytest.approx(np.nan, nan_ok=True)]
    assert found["reward/mine"] == [2.0, 0.5]
    assert found["failed"] == [0.5, 1.0]


def test_no_vote_where_the_reward_extracts_no_answers():
    """It neither returned an answer nor said that there is none."""
    silent = {"answers": (("",) * 4,) * 2}
    everywhere = np.ones((2, 4), dtype=np.bool_)
    assert "majority@4" not in values(responses(**silent, answered=everywhere))
    nowhere = np.zeros((2, 4), dtype=np.bool_)
    assert values(responses(**silent, answered=nowhere))["majority@4"] == [0.0, 0.0]


def test_an_estimate_leaves_out_prompts_without_a_value():
    measure = Measure(name="reward", values=np.array([1.0, np.nan, 3.0]))
    assert measure.estimate(0.95).value == 2.0
    chosen = np.array([True, True, False])
    assert measure.estimate(0.95, chosen).value == 1.0
    with pytest.raises(ValueError, match="reward has no value"):
        measure.estimate(0.95, np.array([False, True, False]))


def test_a_difference_is_over_the_prompts_of_both():
    first = Measure(name="accuracy", values=np.array([0.5, np.nan, 1.0, 0.0]), trials=2)
    second = Measure(name="accuracy", values=np.array([1.0, 1.0, 0.5, np.nan]), trials=2)
    found = difference_of(first, second, 0.95)
    assert found is not None
    assert (found.prompts, found.estimate.value) == (2, 0.0)
    assert (found.test.higher, found.test.lower, found.test.p_value) == (1, 1, 1.0)
    only_last = np.array([False, False, False, True])
    assert difference_of(first, second, 0.95, only_last) is None


def test_the_columns_of_a_breakdown():
    metadata = [{"level": 1, "source": "a"}, {"type": "algebra"}]
    assert columns_to_break_down(metadata, None) == ("level", "type")
    assert columns_to_break_down(metadata, ("source",)) == ("source",)
    assert columns_to_break_down(metadata, ()) == ()
    with pytest.raises(ValueError, match=r"no column .topic.*Their columns are level, source"):
        columns_to_break_down(metadata, ("topic",))


def test_numbers_come_first_and_in_their_order():
    metadata = [{"level": level} for level in (10, 2, "Level 3", None, 2)]
    found = prompts_by_value(metadata, "level")
    assert list(found) == ["2", "10", "(none)", "Level 3"]
    assert found["2"].tolist() == [False, True, False, False, True]
    with pytest.raises(ValueError, match="51 different values"):
        prompts_by_value([{"level": i} for i in range(51)], "level")
