"""Cheap exact comparison: most answers are integers, decimals or fractions, and need no symbolic algebra."""

from __future__ import annotations

import re
from fractions import Fraction

_DROPPED = re.compile(r"\\(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])|\\[!,;:]|(?<!\\)\\ |~|\$")
# Space means nothing beside a sign, but "1 2" is not "12", and "2 1/2" is not "21/2".
_IDLE_SPACE = re.compile(r"(?<!\w)\s+|\s+(?!\w)")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"^(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}$")
_SHORT_FRACTION = re.compile(r"\\frac\s*(\d)\s*(\d)(?!\d)")
_NUMBER = re.compile(r"^-?\d+(?:\.\d+)?$|^-?\.\d+$")
_PLAIN_FRACTION = re.compile(r"^(-?\d+)/(\d+)$")
_THOUSANDS = re.compile(r"^-?\d{1,3}(?:,\d{3})+(?:\.\d+)?$")
MAX_DIGITS = 200  # longer numbers are compared as text


def normal_string(answer: str) -> str:
    """`answer` without what never changes its meaning: spacing commands, dollar signs, \\left and \\right, \\dfrac against \\frac."""
    text = _DROPPED.sub(" ", answer.strip())
    text = _TEXT.sub(r"\1", text)
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("−", "-")
    text = text.replace("^\\circ", "").replace("^{\\circ}", "").replace("\\%", "").replace("\\degree", "")
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text)
    return _IDLE_SPACE.sub("", re.sub(r"\s+", " ", text).strip()).rstrip(".")


def as_number(normal: str) -> Fraction | None:
    """The exact value of an integer, decimal or plain fraction; None for anything else."""
    if len(normal) > MAX_DIGITS:
        return None
    if _THOUSANDS.match(normal):
        normal = normal.replace(",", "")
    if _NUMBER.match(normal):
        return Fraction(normal)
    if match := _FRACTION.match(normal):
        sign, numerator, denominator = match.groups()
        if int(denominator) == 0:
            return None
        value = Fraction(int(numerator), int(denominator))
        return -value if sign else value
    if match := _PLAIN_FRACTION.match(normal):
        return Fraction(int(match[1]), int(match[2])) if int(match[2]) else None
    return None
