"""A rule-based verifier for mathematical answers.

Cheap exact rules decide most answers; the rest goes to `math-verify`, which parses LaTeX into SymPy. Nothing in a completion is evaluated as code.
Time is not limited here but by the reward worker, which runs this in a process that it can kill.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from rlsys.rewards.math_verifier.extraction import extract_answer, last_boxed
from rlsys.rewards.math_verifier.normal_form import as_number, normal_string

__all__ = ["MathVerdict", "extract_answer", "last_boxed", "verify_math"]

MAX_ANSWER_CHARACTERS = 2000  # no answer of MATH has more than a few hundred


@dataclass(frozen=True, kw_only=True)
class MathVerdict:
    """What was decided about one completion, and by which rule."""

    score: float  # 1 equal to the ground truth, else 0
    answer: str | None  # as extracted
    normal_form: str | None
    rule: str  # extraction | string | number | symbolic
    reason: str  # "correct", "wrong", "no_answer", "too_long", "unparsable"


def verify_math(completion: str, ground_truth: str) -> MathVerdict:
    """Whether the answer of `completion` equals `ground_truth`. Never raises, whatever the strings.

    The answer is the last box (or, without one, the last <answer> element). An empty or unclosed box is no answer.

    Example: `verify_math(r"... \\boxed{0.5}", r"\\frac{1}{2}").score == 1.0`.
    """
    answer = extract_answer(completion)
    if answer is None:
        return MathVerdict(score=0.0, answer=None, normal_form=None, rule="extraction", reason="no_answer")
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return MathVerdict(score=0.0, answer=answer[:MAX_ANSWER_CHARACTERS], normal_form=None, rule="extraction", reason="too_long")
    given, wanted = normal_string(answer), normal_string(ground_truth)

    def verdict(equal: bool, rule: str) -> MathVerdict:
        return MathVerdict(score=float(equal), answer=answer, normal_form=given, rule=rule, reason="correct" if equal else "wrong")

    if given == wanted:
        return verdict(True, "string")
    given_number, wanted_number = as_number(given), as_number(wanted)
    if given_number is not None and wanted_number is not None:
        return verdict(given_number == wanted_number, "number")
    equal = _symbolically_equal(answer, ground_truth)
    if equal is None:
        return MathVerdict(score=0.0, answer=answer, normal_form=given, rule="symbolic", reason="unparsable")
    return verdict(equal, "symbolic")


def _symbolically_equal(answer: str, ground_truth: str) -> bool | None:
    """math-verify's judgement; None where it cannot parse one side."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
    try:
        # Its own time limits use signals, which work in the main thread only; the reward worker's do not.
        gold = parse(f"\\boxed{{{ground_truth}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
        given = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
        return bool(verify(gold, given, timeout_seconds=None)) if gold and given else None
    except Exception:  # parsers of arbitrary text fail in arbitrary ways, all of which mean: not shown to be equal
        return None
