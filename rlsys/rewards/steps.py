"""The steps of a response: where they end in its text, and at which token.

    3 + 4 = 7.\n\n7 * 2 = 14.      text
    -- step 1 ----  -- step 2 -
              10              23   ends, in characters

A reward function gives the ends in characters, since it sees a text. The reward worker turns them
into tokens, with the ids that were sampled.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

Split = Literal["delimiter", "sentences"]

DELIMITER = "\n\n"
# A full stop, question or exclamation mark with what may close after it, before white space. The
# marks of Chinese and Japanese have no white space after them.
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]}$]*(?=\s)|[。！？]+[”’」』）]*|\n")
# Words before a full stop that do not end a sentence.
_ABBREVIATIONS = frozenset(
    ("e.g", "i.e", "cf", "vs", "dr", "mr", "mrs", "ms", "prof", "fig", "eq", "approx")
)


class Step(NamedTuple):
    """A step of a response."""

    text: str  # with the delimiter or white space after it
    # Characters of the whole text up to the step's last one that is not white space: the space
    # after a sentence is often a part of the next word's token.
    end: int


def split_steps(text: str, by: Split = "delimiter", *, delimiter: str = DELIMITER) -> list[Step]:
    """Return the steps of `text`; joined they are the text.

    by: `delimiter` ends a step after each `delimiter`. `sentences` ends one after `.`, `!` or `?`
        before white space, after the marks of Chinese and Japanese, and at the end of a line. A
        full stop in a number, after a line's number ("2. Add them") or after a common abbreviation
        ("e.g.") ends none.

    Conventions: a step contains the delimiter or the white space that ends it. A part without any
    other character is no step of its own: it belongs to the step before, at the beginning of the
    text to the first. A text of white space has no steps.

    Example: "a\\n\\nb" has the steps "a\\n\\n", which ends at 1, and "b", which ends at 4.

    Raises:
        ValueError: the delimiter is empty.
    """
    if not delimiter:
        raise ValueError("delimiter: '' does not separate anything. Give at least one character.")

    parts: list[str] = []
    start = 0
    borders = _delimited(text, delimiter) if by == "delimiter" else _sentence_ends(text)
    for border in (*borders, len(text)):
        part = text[start:border]
        if part.strip():
            parts.append(part)
        elif parts:
            parts[-1] += part
        else:
            continue  # white space at the beginning
        start = border

    steps: list[Step] = []
    before = 0
    for part in parts:
        steps.append(Step(part, before + len(part.rstrip())))
        before += len(part)
    return steps


def _delimited(text: str, delimiter: str) -> Iterator[int]:
    found = text.find(delimiter)
    while found >= 0:
        yield found + len(delimiter)
        found = text.find(delimiter, found + len(delimiter))


def _sentence_ends(text: str) -> Iterator[int]:
    for match in _SENTENCE_END.finditer(text):
        if match.group().startswith(".") and _is_inside(text, match.start()):
            continue
        end = match.end()
        while end < len(text) and text[end].isspace():
            end += 1
        yield end


def _is_inside(text: str, stop: int) -> bool:
    """Return whether the full stop at `stop` belongs to a line's number or an abbreviation."""
    line = text[text.rfind("\n", 0, stop) + 1 : stop].strip()
    if line.isdecimal():
        return True
    word = line.split()[-1].lstrip("([\"'") if line else ""
    return word.lower() in _ABBREVIATIONS


def tokens_at(ends: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Return for each end in characters the token that contains the last character before it.

    Args:
        ends: characters of the text up to and with each step, at least 1.
        lengths: characters of the text after each token, as `text_after_each_token` returns them.

    Conventions: a character of several tokens belongs to the token that completes it.

    Example: with tokens "ab", "c d" and " e" the lengths are 2, 5, 7; the ends 2, 3 and 7 are in
    the tokens 0, 1 and 2.
    """
    return [bisect_left(lengths, end) for end in ends]
