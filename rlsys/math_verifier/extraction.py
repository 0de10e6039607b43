"""The search for the answer in a completion. Every search is linear in the completion's length."""

from __future__ import annotations

import re

from rlsys.math_verifier.limits import MAX_LIST_ITEMS
from rlsys.math_verifier.prose import announced, announced_after, answer_at_the_end

EXTRACTIONS = ("boxed", "boxes", "answer_tag", "after_hashes", "lenient")

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*(\{)?")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace does not count
_BARE = re.compile(r"[^\s${}\\]+")
# What stands between two boxes that are one answer: a comma, "and", "for part (a) and", "and y =",
# "papers and", "(b)". Words that say more about the first answer may take it back.
_NO_NOUN = (
    r"(?:is|was|are|were|has|have|but|no|not|wrong|in\w*correct|instead|so|then|hence|thus|which|that|"
    r"since|because|if|when|by|from|to|after|before|first|final\w*|actually|wait|rather|check)\b"
)
_BETWEEN_BOXES = re.compile(
    rf"(?:for [\w() ]{{1,30}}?|(?:(?!{_NO_NOUN})[a-z]{{1,15}}\b ?){{1,3}})?"
    r"(?:[,;]|(?:[,;] ?)?(?:\b(?:and|or|as well as|and also)\b|&))"
    r"(?: ?[a-z](?:\w{0,2}|_\{?\w{1,3}\}?) ?=)?"
    r"|[,;.]? ?\((?:[b-h]|[2-9]|ii|iii|iv|v)\)",
    re.IGNORECASE,
)
_OR = re.compile(r"\bor\b", re.IGNORECASE)
_LABEL = re.compile(r"(?<![\w\\])([A-Za-z](?:\w{0,2}|_\{?\w{1,3}\}?))\s*=\s*$")
_TEXT_BETWEEN = re.compile(r"\\+(?:text|mbox|textrm|mathrm)\s*\{([^{}]*)\}")
_SPACING_BETWEEN = re.compile(r"\\+(?:quad|qquad|[,;:! ])|[\s~]")
_DELIMITER = re.compile(r"\$+|\\+[()\[\]]")
MAX_BETWEEN_BOXES = 80


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` or `\fbox{...}`, with its braces balanced.

    None where there is no box or where it never closes.
    `\boxed 5`, without braces, holds what follows up to the next space, brace or command.

    Example: `last_boxed(r"so \boxed{\frac{1}{2}}")` is `\frac{1}{2}`.
    """
    match = _last_box(text)
    return None if match is None else _content(text, match)


def _content(text: str, box: re.Match[str]) -> str | None:
    if box[1]:
        return _balanced(text, box.end())
    bare = _BARE.match(text, box.end())
    return bare[0].rstrip(".,;:") if bare else None


def last_boxes(text: str) -> str | None:
    r"""Return the last box together with the boxes that it is joined to, as one list.

    Boxes are joined by a comma, a semicolon, "and" or "or" between them, or by nothing; a noun may
    stand before it, and the label of a part, (b), instead of it. Boxes with other text between them
    are separate, and the last one counts, as in `last_boxed`. The names of `x = \\boxed{1}` and
    `y = \\boxed{2}` belong to the answer.

    Example: `last_boxes(r"so \boxed{-2} and \boxed{1}")` is `-2, 1`.
    """
    box = _last_box(text)
    content = None if box is None else _content(text, box)
    if box is None or content is None or not content.strip():
        return content

    contents = [content.strip()]
    labels = [_label(text, box)]
    alternatives = True  # every joint is an "or"
    while len(contents) < MAX_LIST_ITEMS:
        before = _last_box(text, box.start())
        inner = None if before is None else _content(text, before)
        if before is None or inner is None or not inner.strip():
            break
        end = before.end() + len(inner) + (1 if before[1] else 0)
        if end > box.start() or not _joins(text[end : box.start()]):
            break
        alternatives = alternatives and _OR.search(text, end, box.start()) is not None
        contents.append(inner.strip())
        labels.append(_label(text, before))
        box = before

    if len(contents) > 1 and all(labels) and not any("=" in content for content in contents):
        contents = [f"{label} = {content}" for label, content in zip(labels, contents, strict=True)]
    return (" or " if alternatives else ", ").join(reversed(contents))


def _label(text: str, box: re.Match[str]) -> str:
    """Return the name x of `x = \\boxed{1}`, empty where there is none."""
    before = _DELIMITER.sub(" ", text[max(box.start() - MAX_BETWEEN_BOXES, 0) : box.start()])
    label = _LABEL.search(before.rstrip("\\"))
    return label[1] if label else ""


def _joins(between: str) -> bool:
    """Return whether the text between two boxes makes one answer of them."""
    if len(between) > MAX_BETWEEN_BOXES:
        return False
    between = between.rstrip("\\")  # of a box whose backslash is escaped
    text = _SPACING_BETWEEN.sub(" ", _TEXT_BETWEEN.sub(r" \1 ", between))
    if not text.strip():
        return "\n" not in between
    words = " ".join(_DELIMITER.sub(" ", text).split())
    return _BETWEEN_BOXES.fullmatch(words) is not None


def rest_of_open_box(text: str) -> str | None:
    """Return what follows a last box that never closes; None where it closes."""
    box = _last_box(text)
    if box is None or not box[1] or _balanced(text, box.end()) is not None:
        return None
    return text[box.end() :]


def has_one_filled_box(text: str) -> bool:
    """Return whether there is exactly one box, closed and not empty."""
    boxes = sum(1 for _ in _BOX.finditer(text))
    content = last_boxed(text) if boxes == 1 else None
    return bool(content and content.strip())


def _last_box(text: str, end: int | None = None) -> re.Match[str] | None:
    """Return the start of the last box that begins before `end`."""
    end = len(text) if end is None else end
    while True:
        start = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
        if start < 0:
            return None
        match = _BOX.match(text, start)
        if match:
            return match
        end = start


def _balanced(text: str, start: int) -> str | None:
    depth = 1
    for match in _BRACE.finditer(text, start):
        token = match[0]
        if token == "{":
            depth += 1
        elif token == "}":
            depth -= 1
        if depth == 0:
            return text[start : match.start()]
    return None


def last_answer_tag(text: str) -> str | None:
    """Return the content of the last `<answer>...</answer>`; None where there is none."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if start < 0 or text.find("<answer>", end) >= 0:  # a last tag that never closes is no answer
        return None
    return text[start + len("<answer>") : end]


def after_hashes(text: str) -> str | None:
    """Return what follows the last `####` on its line, as in GSM8K; None where there is none.

    Example: `after_hashes("48 + 24 = 72 clips\\n#### 72")` is `"72"`.
    """
    _, found, rest = text.rpartition("####")
    if not found:
        return None
    lines = rest.strip().splitlines()
    return lines[0].strip() if lines else ""


def extract_answer(
    completion: str, extraction: str = "boxed", *, keep_equation: bool = False
) -> str | None:
    """Return the answer of a completion; None where it has none.

    A last box that is empty or never closes is no answer.

    - `boxed`: the last box; in a completion without any box, the last <answer> element.
    - `boxes`: as `boxed`, but boxes with a comma or "and" between them are one list.
    - `answer_tag`: the last <answer> element; a box inside it is unpacked.
    - `after_hashes`: what follows the last `####` on its line, as in GSM8K.
    - `lenient`: as `boxes`, unless "the final answer is" follows them; then as `after_hashes`; then
      what follows the last "the answer is"; then the last formula or number of the last sentence.
      Of an equation that is the right side, but all of it with `keep_equation` (the ground truth is
      an equation).

    Raises:
        ValueError: an unknown `extraction`.
    """
    if extraction not in EXTRACTIONS:
        raise ValueError(
            f"extraction: {extraction!r} is unknown. Choose one of {', '.join(EXTRACTIONS)}."
        )
    if extraction == "answer_tag":
        return _cleaned(last_answer_tag(completion))
    if extraction == "after_hashes":
        return _cleaned(after_hashes(completion))

    if _last_box(completion) is not None:
        return _cleaned(_of_boxes(completion, extraction))
    tag = last_answer_tag(completion)
    if tag is not None or extraction != "lenient" or "<answer>" in completion:
        return _cleaned(tag)

    marked = after_hashes(completion)
    if marked is not None:
        return _cleaned(marked)
    in_prose = announced(completion)
    return _cleaned(in_prose or answer_at_the_end(completion, keep_equation=keep_equation))


def _of_boxes(completion: str, extraction: str) -> str | None:
    if extraction == "boxed":
        return last_boxed(completion)
    boxes = last_boxes(completion)
    if boxes is None or extraction == "boxes":
        return boxes
    start = max(completion.rfind("\\boxed"), completion.rfind("\\fbox"))
    return announced_after(completion, start) or boxes


def _cleaned(answer: str | None) -> str | None:
    """Strip white space, and boxes around the whole answer."""
    if answer is None:
        return None
    answer = answer.strip()
    for _ in range(3):
        match = _last_box(answer)
        if match is None:
            break
        inner = last_boxed(answer)
        if inner is None:
            return None
        answer = inner.strip()
    return answer or None
