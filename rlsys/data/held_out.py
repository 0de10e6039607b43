"""Problems kept out of training, drawn by a hash of their text so that none is on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from rlsys.data.problems import Problem


@dataclass(frozen=True, kw_only=True)
class Split:
    """Training and held-out problems."""

    train: list[Problem]
    held_out: list[Problem]
    copies: int  # further copies of held-out problems, which are in neither list


def problem_key(problem: Problem) -> str:
    """Return the text of a problem, or its conversation, with white space normalized.

    Two problems are the same where their keys are equal.
    """
    turns = problem.messages or ()
    parts = [f"{turn.role}\n{turn.content}" for turn in turns] or [f"user\n{problem.problem}"]
    return "\n\n".join(" ".join(part.split()) for part in parts)


def hold_out(problems: Sequence[Problem], *, fraction: float, limit: int) -> Split:
    """Hold out the `fraction` of the different problems whose texts have the smallest hashes.

    At least one is held out and at most `limit` (0: no limit). Both lists keep the order of the
    file. The choice depends on the texts alone, not on seed, order or answers; a larger fraction
    holds out the same problems and more.

    Raises:
        ValueError: fewer than two different problems.
    """
    keys = [problem_key(problem) for problem in problems]
    different = sorted(set(keys), key=_hash)
    if len(different) < 2:
        raise ValueError(
            f"data.eval: 'auto' holds problems out of data.train, which has {len(different)} "
            "different one. Give data.eval a file, or set it to off."
        )
    size = min(max(1, round(fraction * len(different))), limit or len(different))
    chosen = set(different[: min(size, len(different) - 1)])

    train = [p for p, key in zip(problems, keys, strict=True) if key not in chosen]
    first_copies = {key: p for p, key in reversed(list(zip(problems, keys, strict=True)))}
    held_out = [first_copies[key] for key in dict.fromkeys(keys) if key in chosen]
    return Split(train=train, held_out=held_out, copies=len(problems) - len(train) - len(held_out))


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def shared_problems(train: Sequence[Problem], held_out: Sequence[Problem]) -> int:
    """Count the held-out problems that are training problems too."""
    trained = set(map(problem_key, train))
    return sum(problem_key(problem) in trained for problem in held_out)
