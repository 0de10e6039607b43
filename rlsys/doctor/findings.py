"""The result of one check."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failure", "skipped"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found, in a line.

    A "failure" stops runs, a "warning" slows them down or stops some of them. "skipped" is what
    was not asked for.
    """

    check: str
    status: Status
    text: str
    remedy: str = ""

    def line(self) -> str:
        """Return the finding as it is printed."""
        remedy = f" {self.remedy}" if self.remedy else ""
        return f"{self.status:<8} {self.check:<18} {self.text}{remedy}"


def ok(check: str, text: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding(check=check, status="ok", text=text)


def warning(check: str, text: str, remedy: str) -> Finding:
    """Return a finding that slows runs down, or stops some of them."""
    return Finding(check=check, status="warning", text=text, remedy=remedy)


def failure(check: str, text: str, remedy: str) -> Finding:
    """Return a finding that stops runs."""
    return Finding(check=check, status="failure", text=text, remedy=remedy)


def skipped(check: str, text: str) -> Finding:
    """Return the finding of a check that was not made."""
    return Finding(check=check, status="skipped", text=text)


def passes(findings: Iterable[Finding]) -> bool:
    """Return whether no finding is a failure."""
    return all(finding.status != "failure" for finding in findings)
