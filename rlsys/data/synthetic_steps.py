"""Worked answers to generated problems in steps, right or with one wrong step, and their labels.

    (12 + 35) * 4 = 47 * 4       true        (12 + 35) * 4 = 45 * 4     false
    47 * 4 = 188                 true        45 * 4 = 180               false
    \\boxed{188}                  true        \\boxed{180}                false

About one half of the answers is right. In the others one step is wrong, each equally often, and the
steps after it go on from there: the labels are true before the wrong step, and false from it on.
"""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Sequence

from rlsys.data.examples import StepLabels
from rlsys.data.synthetic_problems import SolvedProblem

LARGEST_ERROR = 5
RIGHT_FRACTION = 0.5
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


def generated_step_labels(problems: Sequence[SolvedProblem], *, seed: int) -> list[StepLabels]:
    """Return an answer in steps to each problem, with a label for each step.

    Which step is wrong, and by how much, depends on the seed and the problem alone.
    """
    return [_labelled(solved, random.Random(f"{seed} {_id(solved)}")) for solved in problems]


def _id(solved: SolvedProblem) -> str:
    return solved.problem.problem_id


def _labelled(solved: SolvedProblem, rng: random.Random) -> StepLabels:
    chain = solved.solution.split(". \\boxed")[0].split(" = ")
    steps = len(chain)  # an equation for each `=`, and the boxed answer
    wrong = None
    if rng.random() >= RIGHT_FRACTION:
        wrong = rng.randrange(steps)
        chain = _with_error(chain, wrong, rng)

    equations = [f"{left} = {right}" for left, right in itertools.pairwise(chain)]
    boxed = chain[-1] if wrong != steps - 1 else _near(chain[-1], rng)
    return StepLabels(
        example_id=_id(solved),
        prompt=solved.problem.problem,
        steps=(*equations[: steps - 1], f"\\boxed{{{boxed}}}"),
        labels=tuple(wrong is None or step < wrong for step in range(steps)),
        answer=solved.problem.answer,
    )


def _with_error(chain: list[str], wrong: int, rng: random.Random) -> list[str]:
    """Return a chain whose equation `wrong` has a wrong right side, with what follows from it."""
    if wrong == len(chain) - 1:
        return chain  # only the boxed answer is wrong

    before, right = chain[: wrong + 1], chain[wrong + 1]
    first, _, rest = right.partition(" ")
    changed = " ".join(part for part in (_near(first, rng), rest) if part)
    after = [] if wrong + 2 == len(chain) else [str(_value(changed))]
    return [*before, changed, *after]


def _near(number: str, rng: random.Random) -> str:
    """Return another number, from 1 to 5 larger or smaller; never a negative one."""
    value = int(number)
    near = range(max(0, value - LARGEST_ERROR), value + LARGEST_ERROR + 1)
    return str(rng.choice([other for other in near if other != value]))


def _value(expression: str) -> int:
    """Return the value of two numbers with an operator between them."""
    left, sign, right = expression.split(" ")
    return _OPERATIONS[sign](int(left), int(right))
