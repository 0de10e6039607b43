"""Rankings of generated problems: a right answer before wrong ones, a boxed one before a bare one.

    rank 0   right and boxed      7 + 8 = 15. \\boxed{15}
    rank 1   right, not boxed     7 + 8 = 15.                  (with 3 responses and more)
    rank 2   wrong, but boxed     7 + 8 = 13. \\boxed{13}
    rank 3   wrong, not boxed     7 + 8 = 13.                  (with 4 responses)

With 2 responses: the first and the third.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from rlsys.data.examples import Ranking
from rlsys.data.synthetic_problems import SolvedProblem

LARGEST_ERROR = 5


def generated_rankings(
    problems: Sequence[SolvedProblem], *, responses: int, seed: int
) -> list[Ranking]:
    """Return a ranking of `responses` (2 to 4) answers to each problem.

    The wrong answer differs by 1 to 5; it depends on the seed and the problem alone. The order of
    the responses is random, so that a model cannot learn it.
    """
    return [_ranking(solved, responses, seed) for solved in problems]


def _ranking(solved: SolvedProblem, responses: int, seed: int) -> Ranking:
    problem = solved.problem
    rng = random.Random(f"{seed} {problem.problem_id}")
    wrong = _with_answer(solved, _wrong_answer(int(problem.answer), rng))
    right_bare, wrong_bare = (text.split(" \\boxed")[0] for text in (solved.solution, wrong))

    by_rank = [solved.solution, right_bare, wrong, wrong_bare]
    chosen = [by_rank[0], by_rank[2]] if responses == 2 else by_rank[:responses]
    order = list(range(responses))
    rng.shuffle(order)
    return Ranking(
        example_id=problem.problem_id,
        prompt=problem.problem,
        responses=tuple(chosen[place] for place in order),
        ranks=tuple(order),
        answer=problem.answer,
    )


def _wrong_answer(answer: int, rng: random.Random) -> int:
    near = range(answer - LARGEST_ERROR, answer + LARGEST_ERROR + 1)
    return rng.choice([value for value in near if value != answer and value >= 0])


def _with_answer(solved: SolvedProblem, answer: int) -> str:
    """Return the worked answer with another result."""
    derivation = solved.solution.rpartition(" = ")[0]
    return f"{derivation} = {answer}. \\boxed{{{answer}}}"
