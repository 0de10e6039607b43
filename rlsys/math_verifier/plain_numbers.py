"""The quick path: most answers are integers, decimals or fractions, and need no parser."""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER = re.compile(r"-?(?:\d{1,200}(?:\.\d{1,200})?|\.\d{1,200})", re.ASCII)
_FRACTION = re.compile(
    r"(-?)\\[dt]?frac\s?(?:\{(-?\d{1,200})\}\s?\{(-?\d{1,200})\}|(\d)(\d))", re.ASCII
)
_SLASH = re.compile(r"(-?\d{1,200})/(\d{1,200})", re.ASCII)


def plain_number(answer: str) -> Fraction | None:
    """The exact value of an integer, decimal or fraction without any dress; None for anything else."""
    if len(answer) > 450:
        return None
    if _NUMBER.fullmatch(answer):
        return Fraction(answer)
    if match := _FRACTION.fullmatch(answer):
        sign, above, below, first, second = match.groups()
        numerator, denominator = int(above or first), int(below or second)
        return Fraction(-numerator if sign else numerator, denominator) if denominator else None
    if (match := _SLASH.fullmatch(answer)) and int(match[2]):
        return Fraction(int(match[1]), int(match[2]))
    return None
