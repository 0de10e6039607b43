"""The records of a check. The standard library suffices to read and write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["passed", "failed", "skipped"]


class SkippedError(Exception):
    """The check cannot run on this machine; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number."""

    name: str
    value: float
    unit: str = ""  # "s", "tokens/s", "GiB", "%"; "" for a plain number


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found: it has passed if there is no fault."""

    figures: tuple[Figure, ...] = ()
    faults: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)  # that are no numbers


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """The outcome of one check."""

    name: str
    status: Status
    reason: str = ""  # why it failed or was skipped
    figures: tuple[Figure, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @staticmethod
    def of(name: str, finding: Finding, seconds: float) -> CheckResult:
        """Return the outcome of a check that came to its end."""
        return CheckResult(
            name=name,
            status="failed" if finding.faults else "passed",
            reason="; ".join(finding.faults),
            figures=finding.figures,
            facts=finding.facts,
            seconds=seconds,
        )

    def to_json(self) -> str:
        """Return the record as JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def of_json(text: str) -> CheckResult:
        """Read what `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        figures = tuple(Figure(**figure) for figure in fields.pop("figures"))
        return CheckResult(figures=figures, **fields)


def within(name: str, value: float, limit: float) -> tuple[str, ...]:
    """Return the fault that `value` is above `limit`, if it is; NaN is above every limit."""
    if value <= limit:
        return ()
    return (f"{name} is {value:.3g}, above {limit:.3g}",)


def at_least(name: str, value: float, limit: float) -> tuple[str, ...]:
    """Return the fault that `value` is below `limit`, if it is; NaN is below every limit."""
    if value >= limit:
        return ()
    return (f"{name} is {value:.3g}, below {limit:.3g}",)
