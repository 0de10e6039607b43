"""The digest of problems."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.data.problems import ChatMessage, Problem, problems_digest

PROBLEMS = st.lists(
    st.builds(
        Problem,
        problem_id=st.text(max_size=3),
        problem=st.text(max_size=3),
        answer=st.text(max_size=3),
    ),
    max_size=4,
)
ONE = Problem(problem_id="1", problem="What is 1 + 1?", answer="2")


@given(PROBLEMS, PROBLEMS)
def test_the_digest_is_equal_only_for_equal_problems_in_equal_order(
    first: list[Problem], second: list[Problem]
):
    assert (problems_digest(first) == problems_digest(second)) == (first == second)


@pytest.mark.parametrize(
    "changed",
    [
        replace(ONE, problem_id="2"),
        replace(ONE, problem="What is 1 + 2?"),
        replace(ONE, answer="3"),
        replace(ONE, messages=(ChatMessage(role="user", content=ONE.problem),)),
    ],
)
def test_the_digest_covers_every_field(changed: Problem):
    assert problems_digest([changed]) != problems_digest([ONE])


def test_the_digest_does_not_move_between_processes_and_versions():
    """Checkpoints hold the digest: a change needs another name in the state of the stream."""
    assert problems_digest([ONE]).startswith("fa7f86c6aa91722f")
