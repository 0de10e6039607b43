"""The fast path: most answers are integers, decimals or fractions, and need no parser."""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER = re.compile(r"-?(?:\d{1,200}(?:\.\d{1,200})?|\.\d{1,200})", re.ASCII)
_FRACTION = re.compile(
    r"(-?)\\[dt]?frac\s?(?:\{(-?\d{1,200})\}\s?\{(-?\d{1,200})\}|(\d)(\d))", re.ASCII
)
_SLASH = re.compile(r"(-?\d{1,200})/(\d{1,200})", re.ASCII)


def plain_number(answer: str) -> Fraction | None:
    """Return the exact value of a bare integer, decimal or fraction; None for anything else."""
    if len(answer) > 450:
        return None
    if _NUMBER.fullmatch(answer):
        return Fraction(answer)

    match = _FRACTION.fullmatch(answer)
    if match:
        sign, above, below, first, second = match.groups()
        numerator = int(above or first)
        denominator = int(below or second)
        if denominator == 0:
            return None
        return Fraction(-numerator if sign else numerator, denominator)

    match = _SLASH.fullmatch(answer)
    if match and int(match[2]):
        return Fraction(int(match[1]), int(match[2]))
    return None
