"""Holding problems out of a training file."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.data.held_out import hold_out, problem_key, shared_problems
from rlsys.data.problems import ChatMessage, Problem


def problem(text: str, answer: str = "1") -> Problem:
    return Problem(problem_id="0", problem=text, answer=answer)


PROBLEMS = st.lists(
    st.builds(problem, st.sampled_from([f"p {i}" for i in range(30)]), st.sampled_from("12")),
    min_size=2,
    max_size=60,
).filter(lambda problems: len({p.problem for p in problems}) > 1)
FRACTIONS = st.floats(0.01, 0.99)


def texts(problems: list[Problem]) -> list[str]:
    return [p.problem for p in problems]


@given(PROBLEMS, FRACTIONS, st.integers(0, 5))
def test_no_problem_is_on_both_sides_and_none_is_lost(
    problems: list[Problem], fraction: float, limit: int
):
    split = hold_out(problems, fraction=fraction, limit=limit)
    train, held_out = set(texts(split.train)), set(texts(split.held_out))
    assert train
    assert held_out
    assert not train & held_out
    assert train | held_out == set(texts(problems))
    assert len(held_out) == len(split.held_out)  # each once
    assert len(split.train) + len(split.held_out) + split.copies == len(problems)
    assert not limit or len(held_out) <= limit
    assert split.train == [p for p in problems if p.problem in train]  # in the order of the file


@given(PROBLEMS, FRACTIONS, FRACTIONS, st.randoms(use_true_random=False))
def test_the_choice_depends_on_the_texts_alone_and_grows_with_the_fraction(
    problems: list[Problem], low: float, high: float, random
):
    low, high = sorted((low, high))
    shuffled = [replace(p, answer="3", problem_id="7") for p in problems]
    random.shuffle(shuffled)
    few = hold_out(problems, fraction=low, limit=0).held_out
    many = hold_out(shuffled, fraction=high, limit=0).held_out
    assert set(texts(few)) <= set(texts(many))


def test_the_size_is_the_fraction_of_the_different_problems_but_at_least_one():
    problems = [problem(f"p{i}") for i in range(200)]
    assert len(hold_out(problems, fraction=0.1, limit=0).held_out) == 20
    assert len(hold_out(problems * 2, fraction=0.1, limit=0).held_out) == 20
    assert len(hold_out(problems, fraction=0.1, limit=7).held_out) == 7
    assert len(hold_out(problems[:2], fraction=0.01, limit=0).held_out) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_one_problem_cannot_be_split(count: int):
    message = (
        r"data\.eval: 'auto' holds problems out .* has 1 different one\. Give data\.eval a file"
    )
    with pytest.raises(ValueError, match=message):
        hold_out([problem("the only one")] * count, fraction=0.5, limit=0)


def test_white_space_makes_no_other_problem_and_an_earlier_turn_does():
    assert problem_key(problem("What is\n 1 + 1?")) == problem_key(problem("What is 1 + 1? "))
    last = ChatMessage(role="user", content="And now?")
    chats = [
        replace(problem("And now?"), messages=(ChatMessage(role="user", content=text), last))
        for text in ("1 + 1", "1 + 2")
    ]
    assert problem_key(chats[0]) != problem_key(chats[1])
    assert problem_key(replace(problem("And now?"), messages=(last,))) == problem_key(
        problem("And now?")
    )


def test_shared_problems_are_counted():
    train = [problem("a"), problem("b"), problem("c")]
    assert shared_problems(train, [problem("b "), problem("x"), problem("b")]) == 2
    assert shared_problems(train, []) == 0
