"""The embedded generator: integer problems in symbols and in words, at five levels of difficulty.

    level 1   one-digit sums and differences                    7 + 8, "Ann has 7 pens and ..."
    level 2   two-digit sums and differences                    34 + 57
    level 3   one-digit products, and three one-digit terms     6 * 7, 4 + 9 - 3
    level 4   two-digit by one-digit products, exact quotients  34 * 6, 91 / 7
    level 5   two operations with two-digit numbers             (12 + 35) * 4

Train and held-out problems are disjoint by the arithmetic itself: if 7 + 8 is held out, no wording
of 7 + 8 is trained on.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rlsys.data.problems import Problem

SYMBOLIC = (
    "What is {}?",
    "Compute {}.",
    "Find the value of {}.",
    "{} = ?",
    "Work out {}.",
    "How much is {}?",
)
NAMES = ("Ann", "Ben", "Eva", "Leo", "Mia", "Tom")
THINGS = ("apples", "books", "coins", "pens", "shells")


@dataclass(frozen=True)
class _Expression:
    """An arithmetic expression before it becomes a question."""

    symbols: str
    answer: int
    story: str | None = None  # a word problem with {name} and {things}
    middle: str | None = None  # what the expression is after its first operation

    @property
    def solution(self) -> str:
        """The answer with its derivation: "(12 + 35) * 4 = 47 * 4 = 188. \\boxed{188}"."""
        chain = [self.symbols, self.middle, str(self.answer)]
        derivation = " = ".join(part for part in chain if part is not None)
        return f"{derivation}. \\boxed{{{self.answer}}}"


def _sums_and_differences(low: int, high: int) -> Iterator[_Expression]:
    for a, b in itertools.product(range(low, high + 1), repeat=2):
        yield _Expression(
            f"{a} + {b}",
            a + b,
            f"{{name}} has {a} {{things}} and gets {b} more. "
            "How many {things} does {name} have?",
        )
        if a >= b:
            yield _Expression(
                f"{a} - {b}",
                a - b,
                f"{{name}} has {a} {{things}} and gives away {b}. How many {{things}} are left?",
            )


def _level_3() -> Iterator[_Expression]:
    for a, b in itertools.product(range(2, 10), repeat=2):
        yield _Expression(
            f"{a} * {b}",
            a * b,
            f"{{name}} has {a} bags with {b} {{things}} each. "
            "How many {things} does {name} have?",
        )
    for a, b, c in itertools.product(range(1, 10), repeat=3):
        yield _Expression(f"{a} + {b} + {c}", a + b + c, middle=f"{a + b} + {c}")
        if a + b >= c:
            yield _Expression(f"{a} + {b} - {c}", a + b - c, middle=f"{a + b} - {c}")


def _level_4() -> Iterator[_Expression]:
    for a, b in itertools.product(range(11, 100), range(2, 10)):
        yield _Expression(
            f"{a} * {b}",
            a * b,
            f"{{name}} has {b} boxes with {a} {{things}} each. "
            "How many {things} does {name} have?",
        )
        yield _Expression(
            f"{a * b} / {b}",
            a,
            f"{{name}} shares {a * b} {{things}} equally among {b} friends. "
            "How many does each get?",
        )


def _level_5() -> Iterator[_Expression]:
    for a, b, c in itertools.product(range(10, 50), range(10, 50), range(2, 10)):
        yield _Expression(f"({a} + {b}) * {c}", (a + b) * c, middle=f"{a + b} * {c}")
        yield _Expression(f"{a} * {c} - {b}", a * c - b, middle=f"{a * c} - {b}")


LEVELS: dict[int, Callable[[], Iterator[_Expression]]] = {
    1: lambda: _sums_and_differences(1, 9),
    2: lambda: _sums_and_differences(10, 99),
    3: _level_3,
    4: _level_4,
    5: _level_5,
}


@dataclass(frozen=True, kw_only=True)
class SolvedProblem:
    """A generated problem with its worked answer."""

    problem: Problem
    solution: str


def _wordings(expression: _Expression, level: int, rng: random.Random) -> list[SolvedProblem]:
    """Return all wordings of one expression: symbols and words alternate while both last."""
    symbols = [form.format(expression.symbols) for form in SYMBOLIC]
    stories = []
    if expression.story:
        stories = [
            expression.story.format(name=name, things=things)
            for name, things in itertools.product(NAMES, THINGS)
        ]
    rng.shuffle(symbols)
    rng.shuffle(stories)

    turns = itertools.chain.from_iterable(itertools.zip_longest(symbols, stories))
    texts = [text for text in turns if text is not None]
    key = f"synthetic-{level}-{expression.symbols.replace(' ', '')}"
    return [
        SolvedProblem(
            problem=Problem(
                problem_id=f"{key}-{i}",
                problem=text,
                answer=str(expression.answer),
                metadata={"level": level},
            ),
            solution=expression.solution,
        )
        for i, text in enumerate(texts)
    ]


def generate_problems(
    levels: Sequence[int], *, train_size: int, eval_size: int, seed: int
) -> tuple[list[Problem], list[Problem]]:
    """Return training and held-out problems, always the same for the same arguments.

    A fifth of all expressions is held out. Problems come in symbols and in words about equally
    often, as long as the wordings last.

    Raises:
        ValueError: an unknown level, or more problems requested than the levels hold.
    """
    training, evaluation = generate_solved_problems(
        levels, train_size=train_size, eval_size=eval_size, seed=seed
    )
    return [solved.problem for solved in training], [solved.problem for solved in evaluation]


def generate_solved_problems(
    levels: Sequence[int], *, train_size: int, eval_size: int, seed: int
) -> tuple[list[SolvedProblem], list[SolvedProblem]]:
    """Return the problems of `generate_problems` with their worked answers.

    Raises:
        ValueError: as `generate_problems`.
    """
    unknown = sorted(set(levels) - set(LEVELS))
    if unknown:
        known = ", ".join(map(str, LEVELS))
        raise ValueError(f"data.synthetic.levels: unknown level {unknown[0]}. Choose from {known}.")

    rng = random.Random(seed)
    expressions = [
        (expression, level) for level in sorted(set(levels)) for expression in LEVELS[level]()
    ]
    rng.shuffle(expressions)

    held_out = len(expressions) // 5
    evaluation = _draw(expressions[:held_out], eval_size, "eval_size", rng)
    training = _draw(expressions[held_out:], train_size, "train_size", rng)
    return training, evaluation


def _draw(
    expressions: Sequence[tuple[_Expression, int]], size: int, field: str, rng: random.Random
) -> list[SolvedProblem]:
    """Draw `size` different problems, in rounds over the expressions so that all are as frequent.

    Raises:
        ValueError: the expressions have fewer wordings.
    """
    pools = [_wordings(expression, level, rng) for expression, level in expressions]
    available = sum(map(len, pools))
    if size > available:
        raise ValueError(
            f"data.synthetic.{field}: {size} problems were requested, the levels hold {available}. "
            "Lower it, or add levels to data.synthetic.levels."
        )

    # One round over the expressions then holds about half symbols and half words.
    for i, pool in enumerate(pools):
        if i % 2 and len(pool) > 1:
            pool[0], pool[1] = pool[1], pool[0]

    drawn: list[SolvedProblem] = []
    for rank in itertools.count():
        round_of_problems = [pool[rank] for pool in pools if rank < len(pool)]
        drawn += round_of_problems[: size - len(drawn)]
        if len(drawn) == size:
            return drawn
    raise AssertionError("unreachable")
