"""Verdicts and reward functions."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.config import RewardConfig, RewardFunctionConfig
from rlsys.registry import Registry, check_parameters
from rlsys.rewards import (
    RewardInput,
    available_reward_functions,
    format_boxed_reward,
    format_r1_zero_reward,
    get_reward_function,
    math_reward,
    repetition_reward,
    soft_overlong_reward,
    verify_math,
)
from rlsys.rewards.pool import RewardPool
from rlsys.rewards.scoring import run_functions

MATH = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "math"


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("42", "42"),
        ("42.0", "42"),
        ("1,000", "1000"),
        ("-7", "-7"),
        ("−7", "-7"),
        ("0.5", r"\frac{1}{2}"),
        (r"\dfrac{1}{2}", r"\frac12"),
        ("1/2", r"\frac{1}{2}"),
        (r"\frac{2}{4}", "0.5"),
        (r"\text{blue}", "blue"),
        (r"\left(1, 2\right)", "(1,2)"),
        (r"x^2 + 1", "1 + x^2"),
        (r"2\sqrt{3}", r"\sqrt{12}"),
        (r"90^\circ", "90"),
        (r"\$5", "5"),
        (r"\frac{\pi}{2}", r"0.5\pi"),
    ],
)
def test_equivalent_answers(answer: str, truth: str):
    assert verify_math(f"so it is \\boxed{{{answer}}}.", truth).score == 1.0


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("42", "-42"),
        ("41", "42"),
        ("0.33", r"\frac{1}{3}"),
        ("(2, 1)", "(1, 2)"),
        (r"x^2 - 1", "x^2 + 1"),
        (r"\sqrt{3}", r"\sqrt{12}"),
        ("red", "blue"),
        ("1000", "100"),
        (r"\frac{1}{0}", "1"),
        ("1 2", "12"),
        (r"3 \quad 4", "34"),
        ("2 1/2", r"\frac{21}{2}"),
    ],
)
def test_near_misses(answer: str, truth: str):
    verdict = verify_math(f"\\boxed{{{answer}}}", truth)
    assert verdict.score == 0.0
    assert verdict.reason in ("wrong", "unparsable")


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),  # the last counts
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{3}", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("<answer> 4 </answer>", "4"),
        (r"<answer>5</answer> \boxed{6}", "6"),
        (r"\boxed{7", None),  # never closed
        (r"\boxed{}", None),
        (r"\boxed{8} and \boxed{9", None),  # the last box decides, and it is none
        ("the answer is 10", None),
        ("", None),
    ],
)
def test_extraction(completion: str, answer: str | None):
    verdict = verify_math(completion, "0")
    assert verdict.answer == answer
    if answer is None:
        assert (verdict.score, verdict.reason) == (0.0, "no_answer")


@given(st.text(max_size=60), st.text(max_size=20))
@settings(max_examples=150, deadline=None)
def test_never_raises(completion: str, truth: str):
    for text in (completion, f"\\boxed{{{completion}}}"):
        assert verify_math(text, truth).score in (0.0, 1.0)


def test_nothing_is_evaluated(tmp_path: Path):
    target = tmp_path / "created"
    payloads = [
        f"__import__('pathlib').Path('{target}').touch()",
        f"open('{target}', 'w')",
        "(lambda: 1)()",
        "().__class__.__bases__",
    ]
    for payload in payloads:
        verify_math(f"\\boxed{{{payload}}}", "1")
        verify_math("\\boxed{1}", payload)
    assert not target.exists()


@pytest.mark.skipif(not MATH.exists(), reason="the MATH files are not beside the project")
def test_ground_truths_of_math_equal_themselves():
    import pyarrow.parquet

    answers = pyarrow.parquet.read_table(MATH / "math500.parquet")["answer"].to_pylist()
    assert [a for a in answers if math_reward(f"\\boxed{{{a}}}", a).score != 1.0] == []


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        (r"is \boxed{3}", 1.0),
        (r"is \fbox{3}", 1.0),
        (r"\fbox{1} \boxed{2}", 0.0),
        (r"\boxed{\fbox{2}}", 0.0),
        (r"\boxed{ }", 0.0),
        (r"\boxed{1} \boxed{2}", 0.0),
        (r"\boxed{}", 0.0),
        (r"\boxed{3", 0.0),
        ("3", 0.0),
    ],
)
def test_format_boxed(completion: str, score: float):
    assert format_boxed_reward(completion, "") == score


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("I think </think> <answer> 3 </answer>", 1.0),
        ("I think\nmore </think>\n<answer>3</answer>\n", 1.0),
        ("I think <answer> 3 </answer>", 0.0),
        ("a </think> b </think> <answer> 3 </answer>", 0.0),
        ("a </think> <answer> 3 </answer> and <answer> 4 </answer>", 0.0),
        ("<answer> 3 </answer> </think>", 0.0),
        ("a </think> <answer> 3 </answer> trailing", 0.0),
        ("<think> a </think> <answer> 3 </answer>", 0.0),  # the prompt has opened that tag already
    ],
)
def test_format_r1_zero(completion: str, score: float):
    assert format_r1_zero_reward(completion, "") == score


def test_registry_offers_the_nearest_and_refuses_a_second_owner():
    assert {"math", "format_boxed", "format_r1_zero"} <= set(available_reward_functions())
    with pytest.raises(
        ValueError,
        match=r"reward\.functions\.name: unknown reward function 'maths'\. Did you mean math",
    ):
        get_reward_function("maths")
    registry: Registry = Registry("thing")
    registry.register("a")(math_reward)
    registry.register("a")(math_reward)  # a module imported twice
    with pytest.raises(ValueError, match="'a' is already registered"):
        registry.register("a")(format_boxed_reward)


def test_parameters_are_checked():
    def reward(completion: str, ground_truth: str, *, limit: int, scale: float = 1.0) -> float:
        return limit * scale

    check_parameters(reward, {"limit": 3, "scale": 1}, field="f")
    for parameters, message in [
        ({}, "needs this parameter"),
        ({"limit": True}, "expects int"),
        ({"limit": 1, "scal": 2}, "Did you mean scale"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_parameters(reward, parameters, field="f")


@pytest.mark.parametrize(
    ("tokens", "score"), [(1, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (100, -1.0), (150, -1.0)]
)
def test_soft_overlong_falls_over_the_buffer(tokens: int, score: float):
    assert (
        soft_overlong_reward("", "", tokens, max_tokens=100, buffer_tokens=20) == score
    )  # (80 - tokens) / 20


@pytest.mark.parametrize("buffer", [0, -1, 100, 200])
def test_soft_overlong_refuses_a_buffer_that_leaves_no_room(buffer: int):
    with pytest.raises(
        ValueError,
        match=rf"buffer_tokens: {buffer} must be at least 1 and below max_tokens \(100\)",
    ):
        soft_overlong_reward("", "", 1, max_tokens=100, buffer_tokens=buffer)


def test_the_buffer_of_soft_overlong_is_a_quarter_unless_it_is_given():
    # (75 - tokens) / 25
    scores = [soft_overlong_reward("", "", n, max_tokens=100) for n in (75, 85, 100)]
    assert scores == [0.0, -0.4, -1.0]
    with pytest.raises(
        ValueError, match=r"max_tokens: null follows generation\.max_tokens in a run"
    ):
        soft_overlong_reward("", "", 1)


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("a b a b a b", -0.6),  # bigrams ab ba ab ba ab: 2 of 5 are distinct
        ("a b c d", 0.0),
        ("a", 0.0),
        ("", 0.0),
        ("a a a a a", -0.75),  # aa four times
    ],
)
def test_repetition_counts_repeated_ngrams(completion: str, score: float):
    assert repetition_reward(completion, "", ngram=2) == pytest.approx(score)
    assert repetition_reward(completion, "", ngram=2, scale=0.5) == pytest.approx(score / 2)


def test_scoring_hands_out_token_counts_and_parameters():
    functions = (
        RewardFunctionConfig(name="math", parameters={"extraction": "answer_tag"}),
        RewardFunctionConfig(
            name="soft_overlong", parameters={"max_tokens": 100, "buffer_tokens": 20}
        ),
        RewardFunctionConfig(name="repetition", parameters={"ngram": 1}),
    )
    score = run_functions(
        functions,
        RewardInput(completion="\\boxed{1} <answer> 2 </answer>", ground_truth="2", num_tokens=90),
    )
    assert score.components == (1.0, -0.5, 0.0)
    assert (score.reason, score.answer) == ("correct", "2")


def test_an_unknown_extraction_is_refused_before_a_run():
    with pytest.raises(
        ValueError,
        match=r"f\.extraction: 'box' is not accepted\. Choose one of boxed, boxes, "
        "answer_tag, after_hashes, lenient",
    ):
        check_parameters(get_reward_function("math"), {"extraction": "box"}, field="f")


def test_a_process_of_the_pool_may_not_grow_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "greedy_reward.py").write_text(
        "from rlsys.rewards import register_reward_function\n"
        "@register_reward_function('greedy')\n"
        "def greedy(completion, ground_truth):\n"
        "    return float(len(bytearray(int(completion)))) * 0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = RewardPool(
        RewardConfig(functions=(RewardFunctionConfig(name="greedy"),), memory_gb=0.5),
        ("greedy_reward",),
    )
    sizes = (1000, 2 * 1024**3, 1000)
    asked = [RewardInput(completion=str(size), ground_truth="") for size in sizes]
    assert [pool.submit(inputs).result().reason for inputs in asked] == [
        "ok",
        "error",
        "ok",
    ]
    pool.shutdown()
