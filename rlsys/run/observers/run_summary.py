"""Figures over the steps of a run, for its summary on the console and its report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rlsys.run.observers.metrics_log import MetricsRecord
from rlsys.run.observers.step_notes import step_notes


def numbers(records: Iterable[MetricsRecord], name: str) -> list[float]:
    """The finite values of one metric."""
    found = (record.values.get(name, math.nan) for record in records)
    return [value for value in found if math.isfinite(value)]


def sampled_tokens(records: Sequence[MetricsRecord]) -> float:
    """All tokens that the engines sampled for training."""
    return sum(numbers(records, "rollout/tokens")) + sum(numbers(records, "rollout/greedy_tokens"))


def share(records: Sequence[MetricsRecord], part: str, whole: str) -> float:
    """One metric over another, both added up."""
    return sum(numbers(records, part)) / max(sum(numbers(records, whole)), 1e-9)


def trained_differs(records: Iterable[MetricsRecord]) -> bool:
    """Whether some responses that were sampled were not trained."""
    return any(
        record.values.get("trained/responses", math.nan)
        < record.values.get("rollout/responses", math.nan)
        for record in records
    )


def first_to_last(records: Sequence[MetricsRecord], name: str, steps: int) -> str:
    """Means of a metric over the first and the last so many steps; "-" where it has no value."""
    ends = [numbers(part, name) for part in (records[:steps], records[-steps:])]
    return " -> ".join(f"{sum(end) / len(end):.3f}" if end else "-" for end in ends)


def counted_notes(records: Iterable[MetricsRecord]) -> dict[str, tuple[str, str]]:
    """Of each kind of warning the newest text, and how many steps had one: "3 steps, 5 to 9"."""
    steps: dict[str, list[int]] = {}
    texts: dict[str, str] = {}
    for record in records:
        for note in step_notes(record.values):
            if note.warning:
                steps.setdefault(note.kind, []).append(record.step)
                texts[note.kind] = note.text
    return {kind: (texts[kind], _step_range(found)) for kind, found in steps.items()}


def _step_range(steps: Sequence[int]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]}"
    return f"{len(steps)} steps, {steps[0]} to {steps[-1]}"
