"""Problems kept out of training, drawn by a hash of their text so that none is on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rlsys.data.problems import Problem

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Split(Generic[T]):
    """Training and held-out items."""

    train: list[T]
    held_out: list[T]
    copies: int  # further copies of held-out items, which are in neither list


def problem_key(problem: Problem) -> str:
    """Return the text of a problem, or its conversation, with white space normalized.

    Two problems are the same where their keys are equal.
    """
    turns = problem.messages or ()
    parts = [f"{turn.role}\n{turn.content}" for turn in turns] or [f"user\n{problem.problem}"]
    return "\n\n".join(" ".join(part.split()) for part in parts)


def hold_out(problems: Sequence[Problem], *, fraction: float, limit: int) -> Split[Problem]:
    """Hold out a fraction of the different problems; see `hold_out_by`."""
    return hold_out_by(problem_key, problems, fraction=fraction, limit=limit)


def hold_out_by(
    key_of: Callable[[T], str], items: Sequence[T], *, fraction: float, limit: int
) -> Split[T]:
    """Hold out the `fraction` of the different items whose keys have the smallest hashes.

    At least one is held out and at most `limit` (0: no limit). Both lists keep the order of the
    file. The choice depends on the keys alone, not on seed, order or answers; a larger fraction
    holds out the same items and more.

    Raises:
        ValueError: fewer than two different items.
    """
    keys = list(map(key_of, items))
    different = sorted(set(keys), key=_hash)
    if len(different) < 2:
        raise ValueError(
            f"data.eval: 'auto' holds problems out of data.train, which has {len(different)} "
            "different one. Give data.eval a file, or set it to off."
        )
    size = min(max(1, round(fraction * len(different))), limit or len(different))
    chosen = set(different[: min(size, len(different) - 1)])

    train = [item for item, key in zip(items, keys, strict=True) if key not in chosen]
    first_copies = {key: item for item, key in reversed(list(zip(items, keys, strict=True)))}
    held_out = [first_copies[key] for key in dict.fromkeys(keys) if key in chosen]
    return Split(train=train, held_out=held_out, copies=len(items) - len(train) - len(held_out))


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def shared_problems(train: Sequence[Problem], held_out: Sequence[Problem]) -> int:
    """Count the held-out problems that are training problems too."""
    trained = set(map(problem_key, train))
    return sum(problem_key(problem) in trained for problem in held_out)
