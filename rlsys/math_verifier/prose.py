"""The answer in a completion without a box: what a sentence announces, or the text ends with.

Only the extraction `lenient` looks for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from rlsys.math_verifier.lexer import FUNCTIONS, WORD_NAMES, unescaped
from rlsys.math_verifier.limits import MAX_LIST_ITEMS, TooLargeError, UnparsableError
from rlsys.math_verifier.parser import FILLERS, readings
from rlsys.math_verifier.units import UNIT_WORDS

_ANNOUNCED = re.compile(
    r"(?:answers?\s+(?:is|are)|answer\s*:|answer\s*=|final\s+answer\W{0,6}\n)[\s:]*", re.IGNORECASE
)
_FINAL = re.compile(r"final\s+answer\s*(?:is|:)[\s:]*", re.IGNORECASE)
_VERB = re.compile(r"\b(?:is|are|equals?(?: to)?)\s")
_DISPLAYED = re.compile(
    r"\$\$([^$]{1,500})\$\$|(?<!\\)\$((?:[^$\\\n]|\\.){1,500})\$|\\\((.{1,500}?)\\\)"
    r"|\\\[(.{1,500}?)\\\]",
    re.DOTALL,
)
_END_OF_SENTENCE = re.compile(r"(?<=\S)[.!?](?=\s|$)")
_NEW_SENTENCE = re.compile(r"(?<=\S)[.!?]\s+(?=[A-Z])")
# After the answer: "I hope it is correct." and the tokens of a chat template.
_CLOSING = re.compile(r"(?:\s|i hope (?:it|this) is correct\.?|<\|\w+\|>\w*)+$", re.IGNORECASE)
_NUMBER_IN_TEXT = re.compile(
    r"(?<![\w.,])[-−]?"
    r"(?:(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?!\d)(?:\.\d+|,\d+)?|\.\d+)"
    r"(?: \d+/\d+|/\d+)?(?:\s?(?:%|pct\b|percent))?"
)
_EXPLAINED = re.compile(
    rf"({_NUMBER_IN_TEXT.pattern}),?\s(?:because|since|as|not|which|so|where|if|when)\b"
)
_QUOTES = re.compile(r"^(?:[ *_`\"]|\\\")+|(?:[ *_`]|\\?\")+$")  # \" where escaped for JSON
_LATEX = re.compile(r"\$|\\[A-Za-z(\[]")
_UNKNOWN_VALUE = re.compile(r"\\(?:sum|prod)(?![A-Za-z])")  # formulas that are not evaluated
_CHOICE_LETTER = re.compile(r"(?<![\w$\\'])(?:[B-E]|A(?! (?!or |and )[a-z]))(?![\w$'])")
_LABELLED = re.compile(r"\(?[A-Z][.):]")  # "A. Because B is not valid" is the choice A
_DENIED = re.compile(r"\b(?:not|cannot|no|wrong|incorrect|false|impossible)\b|n't\b", re.IGNORECASE)
_NAME = re.compile(r"\(?[A-Za-z]{1,8}(?:_\w)?(?:\([a-z]\)|,\s*[A-Za-z]\))?")  # x, f(x), ABC, (x, y)
_SEPARATOR = re.compile(r"[,;]|(?<![A-Za-z])(?:and|or)(?![a-z])")
_EQUALS = re.compile(r"[{}]|(?<![<>!=:\\])=(?!=)")
# Not x, AB, \frac or sin(x).
_WORD = re.compile(r"(?<![\w\\{])(?=[A-Z]*[a-z])[A-Za-z][A-Za-z']+(?![\w(])")
_LONG_FILLERS = frozenset(word for word in FILLERS if len(word) > 3)  # "so" is s times o
_WORDS_OF_ANSWERS = UNIT_WORDS | _LONG_FILLERS | frozenset(WORD_NAMES) | FUNCTIONS
_ANOTHER = re.compile(r"\s*(?:,?\s*or\b|(?:,|,?\s*and)\s*(?:\$|\\\())", re.IGNORECASE)
_NO_VALUE_AFTER = re.compile(r"(?:\b(?:than|not|never)|n't)\s*$", re.IGNORECASE)
_JOINED = re.compile(r",?\s*(?:or|and)", re.IGNORECASE)
LONG_SENTENCE = 5  # words; "Final Answer: Jane started 3 hours ago" holds its answer, and is none
MAX_LINE = 1000
MAX_NOTE = 20  # characters before a value that may take it back


def announced(completion: str) -> str | None:
    """Return what follows the last "the answer is", or stands in the sentence after "Answer:"."""
    last = None
    for match in _ANNOUNCED.finditer(completion):
        last = match
    if last is None:
        return None
    rest = completion[last.end() : last.end() + MAX_LINE].strip()
    display = _DISPLAYED.match(rest)  # which may have several lines
    if display and rest.startswith(("$$", "\\[")):
        return _inside(display)
    sentence = _first_sentence(rest)
    answer = _answer_of_sentence(sentence)
    following = rest[len(sentence) :]
    goes_on = bool(following.strip(" .!?*\n"))
    if answer and goes_on and (following.startswith("?") or _is_no_value(answer)):
        return None
    return answer


def _is_no_value(answer: str) -> bool:
    """Return whether an answer is LaTeX that the grammar does not know, or cannot evaluate."""
    if _LATEX.search(answer) is None:
        return False
    return _UNKNOWN_VALUE.search(answer) is not None or not _is_mathematics(answer)


def announced_after(completion: str, start: int = 0) -> str | None:
    """Return the mathematics that a "final answer is" behind `start` announces."""
    if _FINAL.search(completion, start) is None:
        return None
    answer = announced(completion[start:])
    return answer if answer and _is_mathematics(answer) else None


def _first_sentence(text: str) -> str:
    """Return the first line up to the end of its first sentence, outside formulas."""
    line = text.split("\n")[0]
    formulas = [match.span() for match in _DISPLAYED.finditer(line)]
    for match in _END_OF_SENTENCE.finditer(line):
        if not any(start <= match.start() < end for start, end in formulas):
            return line[: match.start()]
    return line


def _last_sentence(line: str) -> str:
    """Return what follows the last end of a sentence; it may be inside a formula: $x = 2.$"""
    line = line.rstrip(" .!?")
    formulas = list(_DISPLAYED.finditer(line))
    ends = [match.end() for match in formulas if _inside(match).rstrip().endswith((".", "!", "?"))]
    for match in _END_OF_SENTENCE.finditer(line):
        if not any(formula.start() <= match.start() < formula.end() for formula in formulas):
            ends.append(match.end())
    return line[max((end for end in ends if end < len(line)), default=0) :]


def _answer_of_sentence(sentence: str) -> str | None:
    """Return the answer in a sentence that was announced as one: all of it, or its end."""
    sentence = _QUOTES.sub("", sentence)
    formula = _DISPLAYED.match(sentence)
    if _is_mathematics(sentence) and not (formula and formula.end() == len(sentence)):
        return sentence
    if formula:
        return _only_formula(sentence, formula)
    explained = _EXPLAINED.match(sentence)
    if explained:
        return explained[1]

    verbs = list(_VERB.finditer(sentence))
    if verbs:
        said = sentence[verbs[-1].end() :]
        formula = _DISPLAYED.match(said)
        if formula:
            return _only_formula(said, formula)
        if _is_mathematics(said):
            return said
    if len(sentence.split()) >= LONG_SENTENCE:
        return _last_value(sentence) or sentence
    return sentence or None


def _only_formula(text: str, formula: re.Match[str]) -> str:
    """Return a formula at the beginning of a text, or all of the text where another is joined."""
    return text if _ANOTHER.match(text, formula.end()) else _inside(formula)


def _inside(formula: re.Match[str]) -> str:
    return next(group for group in formula.groups() if group is not None)


def _is_mathematics(text: str) -> bool:
    """Return whether a text as a whole is an expression of the grammar, and no prose."""
    words = _WORD.findall(_DISPLAYED.sub(" ", text))
    if any(word.lower() not in _WORDS_OF_ANSWERS for word in words):
        return False
    try:
        return bool(text.strip()) and bool(readings(unescaped(text)))
    except (UnparsableError, TooLargeError, RecursionError):
        return False


def _last_value(text: str) -> str | None:
    """Return the last formula of a text that is more than a name, else its last number."""
    formulas = list(_DISPLAYED.finditer(text))
    values = [match for match in formulas if not _NAME.fullmatch(_inside(match).strip())]
    if values:
        return _last_joined(text, values, _inside)
    plain = _DISPLAYED.sub(" ", text)
    numbers = list(_NUMBER_IN_TEXT.finditer(plain))
    if numbers:
        return _last_joined(plain, numbers, lambda number: number[0])
    return _inside(formulas[-1]) if formulas else None


def _last_joined(
    text: str, found: list[re.Match[str]], content: Callable[[re.Match[str]], str]
) -> str | None:
    """Return the last of the values found, with those that an "or" or "and" joins to it.

    None where it is no value of anything: "fewer than 70", "not 70".
    """
    joined = [found[-1]]
    if _NO_VALUE_AFTER.search(text[: joined[0].start()][-MAX_NOTE:]):
        return None
    for before in reversed(found[-MAX_LIST_ITEMS:-1]):
        between = text[before.end() : joined[-1].start()].strip()
        if not _JOINED.fullmatch(between) and not (between == "," and len(joined) > 1):
            break
        joined.append(before)
    return ", ".join(content(match) for match in reversed(joined))


def answer_at_the_end(completion: str, *, keep_equation: bool) -> str | None:
    """Return the formula or number that the completion ends with."""
    text = _CLOSING.sub("", completion.rstrip()[-MAX_LINE:])
    line = text.split("\n")[-1].strip(" *_`")
    if "\n" not in text and len(completion) > MAX_LINE:  # the line is longer
        begin = _NEW_SENTENCE.search(line)
        line = line[begin.end() :] if begin else ""

    value = line if _is_mathematics(line) else _last_display(text)
    value = value or _last_value(_last_sentence(line)) or _last_value(line)
    if value is not None:
        return _right_side(value, keep_equation=keep_equation)
    letters = set(_CHOICE_LETTER.findall(_last_sentence(line)))
    if len(letters) == 1 and not _LABELLED.match(line) and not _DENIED.search(line):
        return letters.pop()  # "so B is right"
    return line if 0 < len(line) <= 30 and not line.endswith(":") else None


def _last_display(completion: str) -> str | None:
    """Return the displayed formula that ends the completion, which may have several lines."""
    text = completion.rstrip(" .,*")
    for opening, closing in (("$$", "$$"), ("\\[", "\\]")):
        start = text.rfind(opening, 0, max(len(text) - 2, 0)) if text.endswith(closing) else -1
        if start >= 0:
            return text[start + 2 : -2].strip()
    return None


def _right_side(formula: str, *, keep_equation: bool) -> str | None:
    """Return what follows the last equals sign of a formula; with `keep_equation` one may stay."""
    depth = 0
    equals: list[int] = []
    for match in _EQUALS.finditer(formula):
        if match[0] == "=":
            equals += [match.end()] * (depth == 0)
        else:
            depth += 1 if match[0] == "{" else -1

    between = formula[equals[0] : equals[-1]] if equals else ""
    is_list = _SEPARATOR.search(between) is not None  # x = 1, y = 2
    if not equals or is_list or (keep_equation and len(equals) == 1):
        return formula.strip() or None
    return formula[equals[-1] :].strip(" $") or None
