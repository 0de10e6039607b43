"""Finding the answer in a completion."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` or `\fbox{...}` with its braces balanced; None where there is none or it never closes.

    Example: `last_boxed(r"so \boxed{\frac{1}{2}}")` is `\frac{1}{2}`.
    """
    matches = list(_BOX.finditer(text))
    return _balanced(text, matches[-1].end()) if matches else None


def _balanced(text: str, start: int) -> str | None:
    depth = 1
    position = start
    while position < len(text):
        character = text[position]
        if character == "\\":  # an escaped brace does not count
            position += 2
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[start:position]
        position += 1
    return None


def extract_answer(completion: str) -> str | None:
    """The answer of a completion: its last box, else its last <answer> element; None where neither holds anything."""
    boxed = last_boxed(completion)
    if boxed is None and not _BOX.search(completion):
        tags = _ANSWER_TAG.findall(completion)
        boxed = tags[-1] if tags else None
    return boxed.strip() or None if boxed is not None else None
