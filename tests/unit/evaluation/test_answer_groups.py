"""Groups of equal answers."""

from rlsys.evaluation.answer_groups import group_answers


def test_answers_are_grouped_by_the_verifier_and_not_by_their_text():
    answers = [r"\frac12", "0.5", "1/2", "2", "", "2.0"]
    assert group_answers(answers, [False] * 6) == [0, 0, 0, 1, None, 1]


def test_right_answers_are_one_group_whatever_their_text():
    """A reward may accept answers that the verifier cannot compare with each other."""
    answers = ["seven apples", "7", "8", "seven apples"]
    assert group_answers(answers, [True, True, False, True]) == [0, 0, 1, 0]


def test_one_text_is_one_group_also_where_it_was_judged_differently():
    """A reward that failed on one of two equal responses judged it wrong."""
    assert group_answers(["7", "7", "8"], [True, False, False]) == [0, 0, 1]


def test_a_wrong_answer_does_not_join_the_right_ones_by_its_text():
    assert group_answers(["5", "-5", "5.0"], [False, True, False]) == [0, 1, 0]
