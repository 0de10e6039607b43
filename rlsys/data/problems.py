"""A problem with its answer: what every source of data yields."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One verifiable problem."""

    problem_id: str
    problem: str
    answer: str
    level: int | None = None
    subject: str | None = None
