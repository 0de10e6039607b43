"""Answers that are words, letters or times: compared as text, without commands and punctuation."""

from __future__ import annotations

import re

from rlsys.math_verifier.lexer import NUMBER_WORDS, SCALE_WORDS

_WRAPPER = re.compile(
    r"\\(?:text|mbox|hbox|textnormal|textrm|textbf|textit|textsf|texttt|emph"
    r"|mathrm|mathbf|mathit|mathsf|boldsymbol|bf|rm)\s*\{([^{}]*)\}"
)
_SPACING = re.compile(
    r"\\(?:left|right|quad|qquad|displaystyle|bf|rm)(?![a-zA-Z])|\\[,;:! ]|~|\$|\\[()\[\]]"
)
_CHOICE = re.compile(r"\(?\s*([A-Za-z])\s*\)?[.:)]?")
_LABELLED = re.compile(r"(?:\(\s*([A-J])\s*\)|([A-J])\s*[).:])\s*(\S.*)", re.DOTALL)
# An answer that lists several options is not a choice.
_ANOTHER_LABEL = re.compile(r"(?:^|[\s,;])(?:\(\s*[A-J]\s*\)|[A-J]\s*[).:])")
_CHOICE_WORDS = re.compile(
    r"^(?:the\s+)?(?:(?:correct\s+)?(?:answer|option|choice|statement)s?)(?:\s+is)?\s*:?\s*"
    r"(?=\(?[A-Za-z]\)?[.:)]?$)",
    re.IGNORECASE,
)
_CLOCK = re.compile(r"(\d{1,2})(?::(\d\d))?\s*([ap])\.?\s*m\.?", re.IGNORECASE)
_PLAIN_CLOCK = re.compile(r"(\d{1,2}):(\d\d)")
_DOTS = re.compile(r"\.\.\.|\\l?dots\b|\\cdots\b")  # a list that goes on is another list
_PUNCTUATION = " .,;:!\"'`“”‘’"
_NO_SOLUTION = re.compile(
    r"(?:there (?:is|are|exists?) )?no (?:real |integer |such |valid |possible )?"
    r"(?:solutions?|roots?)(?: exists?)?"
)
_EXCEPT = re.compile(
    r"(?:all )?real (?:numbers|values|x) (?:except|but|other than)(?: for)? "
    r"(?:x ?(?:=|\\ne) ?)?([^a-z]+(?: and [^a-z]+)?)"
)
_ARTICLES = re.compile(r"^(?:the|an|a|on|it is|is)\s+")
_ALIASES = {
    "none": "no solution", "empty set": "no solution", "empty": "no solution",
    "the empty set": "no solution", "dne": "undefined", "does not exist": "undefined",
    "not defined": "undefined",
}  # fmt: skip
_MEANINGS = {
    "no solution": r"\emptyset", "infinity": r"\infty", "negative infinity": r"-\infty",
    "positive infinity": r"\infty", "minus infinity": r"-\infty",
    "all real numbers": r"\mathbb{R}", "all reals": r"\mathbb{R}", "all real": r"\mathbb{R}",
    "any real number": r"\mathbb{R}", "reals": r"\mathbb{R}", "real numbers": r"\mathbb{R}",
    "all real x": r"\mathbb{R}", "the real numbers": r"\mathbb{R}",
    "set of all real numbers": r"\mathbb{R}",
}  # fmt: skip


def plain(answer: str) -> str:
    """Strip text commands, spacing and dollar signs from an answer."""
    text = answer
    for _ in range(3):
        unwrapped = _WRAPPER.sub(r" \1 ", text)
        if unwrapped == text:
            break
        text = unwrapped
    text = _SPACING.sub(" ", text)
    return " ".join(text.split())


def _alias(text: str) -> str:
    return "no solution" if _NO_SOLUTION.fullmatch(text) else _ALIASES.get(text, text)


def _number_in_words(text: str) -> int | None:
    """Read seven, twenty-one, one hundred, three million; None for anything else."""
    parts = text.replace("-", " ").split()
    scale = 1
    if len(parts) > 1 and parts[-1] in SCALE_WORDS:
        scale = 10 ** SCALE_WORDS[parts.pop()]
        parts = ["one"] if parts == ["a"] else parts

    values = [NUMBER_WORDS[part] for part in parts if part in NUMBER_WORDS]
    if len(values) < len(parts):
        return None
    if len(values) == 1:
        return values[0] * scale
    if len(values) == 2 and values[0] in range(20, 100, 10) and values[1] in range(1, 10):
        return (values[0] + values[1]) * scale
    return None


def meaning(answer: str) -> str:
    """Translate a number or a set in words to LaTeX; return other answers unchanged."""
    if not any(c.isalpha() for c in answer) or len(answer) > 80:
        return answer

    text = _alias(plain(answer).strip(_PUNCTUATION).lower())
    number = _number_in_words(text)
    if number is not None:
        return str(number)

    match = _EXCEPT.fullmatch(text)
    if match:
        return r"\mathbb{R}\setminus\{" + match[1].replace(" and ", ",") + r"\}"
    return _MEANINGS.get(text, answer)


def phrase(answer: str) -> str:
    """Return words as they are compared: lower case, no article, no punctuation at the ends."""
    text = plain(_DOTS.sub("…", answer)).replace("{", "").replace("}", "").lower().strip()
    while len(text) > 2 and text[0] == "(" and text[-1] == ")":
        text = text[1:-1].strip()
    text = _ARTICLES.sub("", text.strip(_PUNCTUATION)).strip(_PUNCTUATION)
    return _alias(" ".join(text.split()))


def items(answer: str) -> list[str]:
    """Return the items of a list of words, sorted."""
    parts = re.split(r",\s*and\s+|,|;|\s+and\s+|&", plain(_DOTS.sub("…", answer)).strip(" .{}\\"))
    return sorted(phrase(part) for part in parts if part.strip())


def choice(answer: str) -> tuple[str, str, bool] | None:
    """Read a multiple-choice answer: (letter, text after it, whether it is marked as a choice).

    None where it is not one.

    Example: `choice(r"\\textbf{(C)}\\ 12")` is `("C", "12", True)`.
    """
    if len(answer) > 300:
        return None
    text = plain(answer).strip()
    stripped = _CHOICE_WORDS.sub("", text)
    letter = _CHOICE.fullmatch(stripped)
    if letter:
        marked = stripped != text or "(" in text or "\\" in answer or text[-1:] in ".:)"
        return letter[1], "", marked

    labelled = _LABELLED.fullmatch(text)
    if not labelled:
        return None
    in_brackets, with_mark, rest = labelled.groups()
    # (A) followed by anything but a space or a text command may be a factor: (A)B.
    if in_brackets and not (re.search(r"\)\s", text) or "\\text" in answer):
        return None
    if rest[0] in "+-*/^=,()<>|_" or rest.startswith(("and ", "or ")):
        return None
    if _ANOTHER_LABEL.search(rest):
        return None
    return in_brackets or with_mark, rest, True


def clock(answer: str) -> tuple[int, str] | None:
    """Read a time of day: (minutes since midnight or noon, "a", "p" or ""); None if it is none."""
    if len(answer) > 60 or not any(c in answer for c in "mM:"):
        return None
    text = plain(answer).strip(" .")
    text = re.sub(r"\s*:\s*", ":", text)

    match = _CLOCK.fullmatch(text) or _CLOCK.fullmatch(text + ".")
    if match:
        return int(match[1]) % 12 * 60 + int(match[2] or 0), match[3].lower()

    match = _PLAIN_CLOCK.fullmatch(text)
    if match:
        return int(match[1]) % 12 * 60 + int(match[2]), ""
    return None
