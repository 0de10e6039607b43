"""Overlap of problems by n-grams."""

import pytest

from rlsys.data.problems import ChatMessage, Problem
from rlsys.evaluation.overlap import find_overlap, tokens_of


def problem(name: str, text: str) -> Problem:
    return Problem(problem_id=name, problem=text, answer="1")


def test_signs_are_tokens_and_case_is_not():
    text = r"What is $\frac{1}{2} + x_1$?"
    words = ["what", "is", "$", "\\", "frac", "{", "1", "}", "{", "2", "}", "+"]
    assert tokens_of(problem("a", text)) == (*words, "x", "_", "1", "$", "?")


def test_a_problem_overlaps_from_n_shared_tokens_on():
    """Shared: `there are 3 red balls`, five tokens; the evaluation problem has 8, so 4 5-grams."""
    train = [problem("t0", "In a box there are 3 red balls."), problem("t1", "Nothing shared")]
    evaluation = [problem("e0", "Say there are 3 red balls and more")]

    (found,) = find_overlap(evaluation, train, 5).overlapping
    assert (found.problem_id, found.shared) == ("e0", "there are 3 red balls")
    assert found.fraction == pytest.approx(1 / 4)
    assert found.train_ids == ("t0",)
    assert not found.identical
    assert find_overlap(evaluation, train, 6).overlapping == ()

    exactly = find_overlap(evaluation, train, 5, fraction=0.25)
    assert (exactly.sharing, len(exactly.overlapping)) == (1, 1)
    above = find_overlap(evaluation, train, 5, fraction=0.26)
    assert (above.sharing, len(above.overlapping)) == (1, 0)


def test_a_short_problem_overlaps_where_it_is_contained_whole():
    train = [problem("t0", "First, what is 7 + 8? Then double it.")]
    evaluation = [problem("e0", "What is 7 + 8?"), problem("e1", "What is 7 + 9?")]
    overlap = find_overlap(evaluation, train, 13)
    assert [found.problem_id for found in overlap.overlapping] == ["e0"]
    assert overlap.overlapping[0].fraction == 1.0
    assert (overlap.problems, overlap.train_problems) == (2, 1)


def test_a_short_training_problem_is_not_an_n_gram():
    """It has fewer than n tokens, so it shares no n consecutive tokens."""
    assert find_overlap([problem("e", "a b c d e f")], [problem("t", "b c")], 3).overlapping == ()


def test_identical_problems_differ_in_white_space_at_most():
    train = [problem("t0", "What  is\n7 + 8?"), problem("t1", "what is 7 + 8?")]
    (found,) = find_overlap([problem("e0", "What is 7 + 8?")], train[:1], 3).overlapping
    assert found.identical
    (found,) = find_overlap([problem("e0", "What is 7 + 8?")], train[1:], 3).overlapping
    assert not found.identical  # the case of a letter differs
    assert found.fraction == 1.0


def test_all_turns_of_a_conversation_count():
    turns = (
        ChatMessage(role="system", content="Think about the seven dwarfs"),
        ChatMessage(role="user", content="How many?"),
    )
    chat = Problem(problem_id="e", problem="How many?", answer="7", messages=turns)
    train = [problem("t", "Think about the seven dwarfs and the mirror")]
    (found,) = find_overlap([chat], train, 5).overlapping
    assert found.shared == "think about the seven dwarfs"


def test_the_slow_definition_agrees():
    """Brute force: every window of one text against every window of the other."""
    texts = ["a b c d e", "b c d x y", "x y a b", "q", "c d e a b c", "y a"]
    for n in (1, 2, 3, 4, 6):
        evaluation = [problem(f"e{i}", text) for i, text in enumerate(texts)]
        train = [problem(f"t{i}", text) for i, text in enumerate(texts[::-1][:3])]
        expected = []
        for row in evaluation:
            mine = tokens_of(row)
            length = min(n, len(mine))
            windows = [mine[i : i + length] for i in range(len(mine) - length + 1)]
            others = [tokens_of(other) for other in train]
            if any(
                window == other[i : i + length]
                for window in windows
                for other in others
                for i in range(len(other) - length + 1)
            ):
                expected.append(row.problem_id)
        found = find_overlap(evaluation, train, n).overlapping
        assert [row.problem_id for row in found] == expected, n
