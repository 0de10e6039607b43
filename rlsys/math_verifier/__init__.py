"""A rule-based verifier for mathematical answers in LaTeX.

```text
completion --extraction--> answer --same text?--same number?--choice, time?--+
                                                                              |
              +---------------------------------------------------------------+
              v
            parser --> tree --comparison--> equal or not
              |                    |
       words (as text)     evaluation (50 digits)
```

Cheap exact rules decide most answers. The rest are parsed by a grammar of our own, from a closed
list of tokens into a tree of plain values, and compared by kind and by value. Nothing in a
completion is ever evaluated as code. Every step is bounded by the sizes in `limits`. Wall-clock
time is limited by the reward worker, which runs the verifier in a process that it can kill.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlsys.math_verifier import words
from rlsys.math_verifier.comparison import (
    MIN_DIGITS_OF_ROUNDED,
    holds_matrix_product,
    same_answer,
)
from rlsys.math_verifier.extraction import (
    EXTRACTIONS,
    after_hashes,
    extract_answer,
    has_one_filled_box,
    last_boxed,
    last_boxes,
    rest_of_open_box,
)
from rlsys.math_verifier.lexer import unescaped
from rlsys.math_verifier.limits import (
    MAX_ANSWER_CHARACTERS,
    MAX_WORDS_OF_AN_ANSWER,
    TooLargeError,
    UndefinedError,
    UnparsableError,
)
from rlsys.math_verifier.nodes import Node
from rlsys.math_verifier.normal_form import normal_form
from rlsys.math_verifier.parser import readings
from rlsys.math_verifier.plain_numbers import plain_number
from rlsys.math_verifier.prose import announced_after

__all__ = [
    "EXTRACTIONS",
    "MathVerdict",
    "after_hashes",
    "extract_answer",
    "ground_truth_answer",
    "has_one_filled_box",
    "last_boxed",
    "last_boxes",
    "reads_ground_truth",
    "same_answer_text",
    "verify_math",
]


@dataclass(frozen=True, kw_only=True)
class MathVerdict:
    """The decision about one completion, and the rule that made it."""

    score: float  # 1 equal to the ground truth, else 0
    answer: str | None  # as extracted
    normal_form: str | None
    rule: str  # extraction | text | number | choice | time | expression | words
    reason: str  # "correct", "wrong", "no_answer", "too_long", "too_large", "unparsable"


def verify_math(
    completion: str,
    ground_truth: str,
    *,
    extraction: str = "boxed",
    decimal_comma: bool | None = None,
    matrix_products: bool | None = None,
) -> MathVerdict:
    """Decide whether the answer of `completion` equals `ground_truth`. Never raises.

    `extraction` says where the answer stands: see `extract_answer`. With `decimal_comma` the answer
    `2,74` equals 2.74 as well as the list of 2 and 74, and with `matrix_products` a product or
    power of matrices may be left uncomputed; None allows either in `lenient` only. Mathematical
    objects are compared, not their forms: an unsimplified fraction or an unexpanded product is
    right. `docs/math_verifier.md` has the conventions.

    Example: `verify_math(r"... \\boxed{0.5}", r"\\frac{1}{2}").score == 1.0`.
    """
    truth = ground_truth_answer(ground_truth)
    answer = extract_answer(completion, extraction, keep_equation="=" in truth)

    if answer is None:
        return MathVerdict(
            score=0.0, answer=None, normal_form=None, rule="extraction", reason="no_answer"
        )

    if len(answer) > MAX_ANSWER_CHARACTERS and answer != ground_truth.strip():
        return MathVerdict(
            score=0.0,
            answer=answer[:MAX_ANSWER_CHARACTERS],
            normal_form=None,
            rule="extraction",
            reason="too_long",
        )

    lenient = extraction == "lenient"
    equal, rule, reason = same_answer_text(
        answer,
        truth,
        decimal_comma=lenient if decimal_comma is None else decimal_comma,
        matrix_products=lenient if matrix_products is None else matrix_products,
    )
    return MathVerdict(
        score=float(equal),
        answer=answer,
        normal_form=normal_form(unescaped(answer)),
        rule=rule,
        reason="correct" if equal else reason,
    )


def ground_truth_answer(ground_truth: str) -> str:
    r"""Return the answer in a ground truth.

    It is what follows the last `####` (GSM8K), else the last box with the boxes joined to it, else
    the mathematics after "the final answer is", else the rest of a box that was cut off, else the
    whole text.

    Example: `ground_truth_answer("48 + 24 = 72\n#### 72")` and
    `ground_truth_answer(r"\boxed{72}")` are `"72"`.
    """
    marked = after_hashes(ground_truth)
    text = ground_truth if marked is None else marked
    return (last_boxes(text) or announced_after(text) or rest_of_open_box(text) or text).strip()


def reads_ground_truth(ground_truth: str) -> bool:
    """Return whether the verifier understands a ground truth.

    It understands a number, a choice, a time, an expression, or a few words. Any other text is
    right only where a completion repeats it, so a solution in prose, or LaTeX that the grammar
    does not know, gives False.
    """
    truth = unescaped(ground_truth_answer(ground_truth))
    if not truth or len(truth) > MAX_ANSWER_CHARACTERS:
        return False
    if plain_number(truth) is not None or words.clock(truth) or words.choice(truth):
        return True

    try:
        return bool(readings(words.meaning(truth)))
    except TooLargeError:
        return False
    except (UnparsableError, RecursionError):
        return _is_a_few_words(words.phrase(truth))


def _is_a_few_words(phrase: str) -> bool:
    letters = any(character.isalpha() for character in phrase)
    latex = any(character in "\\^_{}" for character in phrase)
    return letters and not latex and len(phrase.split()) <= MAX_WORDS_OF_AN_ANSWER


@dataclass(frozen=True, slots=True)
class _Allowed:
    """What is allowed besides the grammar; `verify_math` explains it."""

    decimal_comma: bool
    matrix_products: bool


def same_answer_text(
    answer: str, truth: str, *, decimal_comma: bool = False, matrix_products: bool = False
) -> tuple[bool, str, str]:
    """Compare two answers: (whether they are equal, the rule that decided, the reason if not).

    Symmetric; never raises.
    """
    return _same_text(answer, truth, _Allowed(decimal_comma, matrix_products))


def _same_text(answer: str, truth: str, allowed: _Allowed) -> tuple[bool, str, str]:
    answer, truth = unescaped(answer), unescaped(truth)
    if answer == truth:
        return True, "text", "correct"

    first, second = plain_number(answer), plain_number(truth)
    rounded = _may_be_rounded(answer) or _may_be_rounded(truth)
    if first is not None and second is not None and (first == second or not rounded):
        return first == second, "number", "wrong"

    same_time = _same_time(answer, truth)
    if same_time is not None:
        return same_time, "time", "wrong"

    same_choice = _same_choice(answer, truth, allowed)
    if same_choice is not None:
        return same_choice, "choice", "wrong"

    try:
        return _same_parsed(words.meaning(answer), words.meaning(truth), allowed)
    except (UnparsableError, RecursionError):
        return _same_words(answer, truth)


def _may_be_rounded(number: str) -> bool:
    return "." in number and len(number) > MIN_DIGITS_OF_ROUNDED


def _same_parsed(answer: str, truth: str, allowed: _Allowed) -> tuple[bool, str, str]:
    try:
        first = readings(answer, decimal_comma=allowed.decimal_comma)
        second = readings(truth, decimal_comma=allowed.decimal_comma)
        if not allowed.matrix_products and any(map(holds_matrix_product, (*first, *second))):
            return first == second, "expression", "wrong"
        pairs = [(a, b) for b in second for a in first]
        return any(_equal_or_undefined(a, b) for a, b in pairs), "expression", "wrong"
    except TooLargeError:
        return False, "expression", "too_large"
    except (UnparsableError, RecursionError):
        raise
    except Exception:
        # Numerical code fails in many ways at singularities. All of them mean: not shown to be
        # equal.
        return False, "expression", "unparsable"


def _equal_or_undefined(answer: Node, truth: Node) -> bool:
    try:
        return same_answer(answer, truth)
    except UndefinedError:
        return False


def _same_time(answer: str, truth: str) -> bool | None:
    first, second = words.clock(answer), words.clock(truth)
    if first is None and second is None:
        return None
    if first is None or second is None:
        _, half_of_day = first or second or (0, "")
        return False if half_of_day else None
    if not first[1] and not second[1]:
        return None  # 3:5 may be a ratio
    return first[0] == second[0] and (first[1] == second[1] or not first[1] or not second[1])


def _same_choice(answer: str, truth: str, allowed: _Allowed) -> bool | None:
    """Compare the letters of a multiple-choice question; None where the answers are not choices.

    A label and the text of its option may come together.
    """
    first, second = words.choice(answer), words.choice(truth)
    if first is not None and second is not None:
        return _same_labels(first, second, allowed)

    for labelled, other in ((first, truth), (second, answer)):
        if labelled is not None and labelled[1]:
            return _same_text(labelled[1], other, allowed)[0] or None
    return None


def _same_labels(
    first: tuple[str, str, bool], second: tuple[str, str, bool], allowed: _Allowed
) -> bool | None:
    """Compare two choices as `words.choice` returns them: letter, text, whether it is marked."""
    first_letter, first_text, first_marked = first
    second_letter, second_text, second_marked = second

    if first_letter == second_letter:
        if not first_text or not second_text:
            return True
        return _same_text(first_text, second_text, allowed)[0]

    # Letters that differ in case alone may be two variables, unless one is marked as a choice.
    if first_marked or second_marked:
        return (
            first_letter.upper() == second_letter.upper()
            and first_letter.upper() in "ABCDEFGHIJ"
            and not (first_text and second_text)
        )
    return None


def _only_letters(text: str) -> bool:
    return text.replace(" ", "").isalpha()


def _same_words(answer: str, truth: str) -> tuple[bool, str, str]:
    """Compare text that is not mathematics: equal words, or lists of the same words."""
    first, second = words.phrase(answer), words.phrase(truth)
    if not first or not second:
        return False, "words", "unparsable"

    if first == second:
        return True, "words", "correct"
    if _only_letters(first) and "".join(first.split()) == "".join(second.split()):
        return True, "words", "correct"

    # Commas do not matter between words, but they do between single letters and numbers.
    same_without_commas = first.replace(",", "").split() == second.replace(",", "").split()
    if re.search("[a-z]{3}", first) and same_without_commas:
        return True, "words", "correct"
    if words.items(answer) == words.items(truth) and len(words.items(truth)) > 1:
        return True, "words", "correct"

    has_letters = any(character.isalpha() for character in first)
    has_latex = any(character in "\\^_{}" for character in first)
    known = has_letters and not has_latex
    return False, "words", "wrong" if known else "unparsable"
