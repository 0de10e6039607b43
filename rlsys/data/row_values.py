"""Conversion of a row's values for each role: prompt, answer, id, filter, metadata.

Text is used as it is. A number becomes text without an exponent and without trailing zeros, so that
4, 4.0 and 4.00 are all "4", and 0.5 is "0.5". A value without exactly one right text is unfit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from rlsys.data.problems import ChatMessage

ROLES = ("system", "developer", "user", "assistant")
MAX_NUMBER_DIGITS = 1000  # of a number that is written out without an exponent
SHOWN_CHARACTERS = 60  # of a value in a message
PLAIN_NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,99})(?:\.\d{1,99})?")  # no code with leading zeros


class Unfit(ValueError):  # noqa: N818  (one row's defect, gathered by the reader)
    """A value that cannot be used: the reason, the remedy, and later the column that holds it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy
        self.column: str | None = None


class Blank(Unfit):
    """No value at all: null, NaN, or text of white space only."""

    def __init__(self, value: object) -> None:
        reason = "NaN"
        if value is None:
            reason = "null"
        elif isinstance(value, str):
            reason = "blank"
        super().__init__(f"is {reason}", "Fill in the values or drop the rows.")


def lookup(row: Mapping[str, Any], name: str) -> Any:
    """Return the value of a column, or of a field inside one: `reward_model.ground_truth`.

    Raises:
        KeyError: the row has no such column.
    """
    if name in row:
        return _plain(row[name])
    value: Any = row
    for part in name.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise KeyError(name)
        value = value[part]
    return _plain(value)


def _plain(value: Any) -> Any:
    """Convert NumPy's scalars and arrays to Python's own values."""
    if isinstance(value, np.floating):
        return Decimal(str(value))  # the shortest digits of its own precision
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return value


def describe(value: Any) -> str:
    """Return the words for a value in a message, such as "null" or "a list (['4'])"."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"text ({_shortened(repr(value))})" if value.strip() else "blank"
    if isinstance(value, int | float | Decimal):
        return f"a number ({_shortened(str(value))})"
    if isinstance(value, Mapping):
        return f"an object (with {', '.join(map(str, value)) or 'nothing in it'})"
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return f"a list ({_shortened(repr(list(value)))})"
    return f"a value of type {type(value).__name__}"


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def is_missing(value: Any) -> bool:
    """Return whether a value is null, or NaN, as which pandas writes null."""
    return value is None or (isinstance(value, float | Decimal) and value != value)


def number_text(value: int | float | Decimal) -> str:
    """Write a number in full, without trailing zeros.

    4.0 becomes "4", 0.50 becomes "0.5" and 1e-7 becomes "0.0000001".

    Raises:
        Unfit: NaN, infinite, or of more than 1000 digits.
    """
    number = Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
    if not number.is_finite():
        raise Unfit(f"is {value}", "Fix or drop the rows.")
    if number == 0:
        return "0"

    exponent = number.as_tuple().exponent
    assert isinstance(exponent, int)
    if number.adjusted() > MAX_NUMBER_DIGITS or exponent < -MAX_NUMBER_DIGITS:
        raise Unfit(f"is a number of more than {MAX_NUMBER_DIGITS} digits", "Write it as text.")
    text = format(number, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _checked_text(value: str) -> str:
    """Return text that a tokenizer can take, or refuse it."""
    if not value.strip():
        raise Blank(value)
    return _encodable(value)


def _encodable(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Unfit(
            f"holds half of a surrogate pair at character {error.start}", "Fix the text."
        ) from None
    return value


def answer_text(value: Any) -> str:
    """Return the ground truth as text.

    Raises:
        Unfit: neither text that is not blank nor a finite number.
    """
    if isinstance(value, str):
        return _checked_text(value)
    if is_missing(value):
        raise Blank(value)
    if _is_number(value):
        return number_text(value)
    if isinstance(value, bool):
        raise Unfit(f"is {describe(value)}", "Write the text that a model should answer.")
    if isinstance(value, Mapping):
        raise Unfit(
            f"is {describe(value)}",
            "Name the field inside the object, as in data.columns.answer "
            "reward_model.ground_truth.",
        )
    raise Unfit(f"is {describe(value)}", "Write one answer as text.")


def prompt_parts(value: Any) -> tuple[str, tuple[ChatMessage, ...]]:
    """Return a problem's text, and the messages if it is a conversation.

    Raises:
        Unfit: neither text nor a list of messages that ends with the user's.
    """
    if isinstance(value, str):
        return _checked_text(value), ()
    if isinstance(value, list | tuple):
        messages = _messages(value)
        return messages[-1].content, messages
    if is_missing(value):
        raise Blank(value)
    raise Unfit(
        f"is {describe(value)}",
        "Name the column with the problem's text, or with its chat messages, in "
        "data.columns.problem.",
    )


def _messages(value: Sequence[Any]) -> tuple[ChatMessage, ...]:
    messages = _message_list(value)
    if messages[-1].role != "user":
        raise Unfit(
            f"ends with a message of the {messages[-1].role}",
            "The last message must be the user's, for the model to answer.",
        )
    return messages


def conversation(value: Any) -> tuple[ChatMessage, ...]:
    """Return a whole conversation.

    Raises:
        Unfit: no list of messages with a turn before the assistant's last one, which ends it.
    """
    if is_missing(value):
        raise Blank(value)
    if not isinstance(value, list | tuple):
        raise Unfit(
            f"is {describe(value)}",
            'Write chat messages as [{"role": "user", "content": "..."}].',
        )
    messages = _message_list(value)
    if messages[-1].role != "assistant":
        raise Unfit(
            f"ends with a message of the {messages[-1].role}",
            "The last message must be the assistant's, which is what is learned.",
        )
    if messages[0].role == "assistant":
        raise Unfit(
            "begins with a message of the assistant",
            "The assistant's first message needs one before it.",
        )
    return messages


def response_text(value: Any) -> str:
    """Return a response: text, or the text of one message of the assistant.

    Raises:
        Unfit: anything else.
    """
    if isinstance(value, str):
        return _checked_text(value)
    if is_missing(value):
        raise Blank(value)
    if isinstance(value, list | tuple):
        messages = _message_list(value)
        if len(messages) == 1 and messages[0].role == "assistant":
            return messages[0].content
    raise Unfit(f"is {describe(value)}", "Write text, or one message of the assistant.")


def _message_list(value: Sequence[Any]) -> tuple[ChatMessage, ...]:
    if not value or not all(isinstance(item, Mapping) for item in value):
        raise Unfit(
            f"is {describe(value)}",
            'Write text, or chat messages as [{"role": "user", "content": "..."}].',
        )
    return tuple(_message(item, number) for number, item in enumerate(value, start=1))


def _message(item: Mapping[str, Any], number: int) -> ChatMessage:
    """One message; Parquet fills the keys that a message lacks with null, so those are ignored."""
    keys = sorted(str(key) for key, value in item.items() if value is not None)
    other = [key for key in keys if key not in ("role", "content")]
    if other:
        raise Unfit(
            f"has {other[0]!r} in message {number}",
            "Messages hold role and content only: write the rest as text, or drop the rows.",
        )
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        shown = "no role" if role is None else f"the role {_shortened(repr(role))}"
        raise Unfit(f"has {shown} in message {number}", f"Roles are {', '.join(ROLES)}.")
    try:
        # An empty system message is a way to disable the chat template's own.
        text = _content(content)
        checked = _encodable(text) if role == "system" else _checked_text(text)
        return ChatMessage(role=role, content=checked)
    except Unfit as error:
        raise Unfit(f"has in message {number} content that {error}", error.remedy) from None


def _content(content: Any) -> str:
    """Return the text of a message, or of its parts one after the other."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise Unfit(f"is {describe(content)}", 'Write text, or parts {"type": "text"}.')
    return "".join(map(_part, content))


def _part(part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) else None
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text" or not isinstance(text, str):
        shown = f"a part of type {kind!r}" if kind else describe(part)
        raise Unfit(f"holds {shown}", "rlsys trains on text: only parts of type 'text' are read.")
    return text


def id_text(value: Any, number: int) -> str:
    """Return an id as text; the row's number where there is none.

    Raises:
        Unfit: neither text nor a number.
    """
    if is_missing(value):
        return str(number)
    if isinstance(value, str):
        return _encodable(value)
    if _is_number(value):
        return number_text(value)
    raise Unfit(f"is {describe(value)}", "Name a column of text or numbers in data.columns.id.")


def filter_key(value: Any) -> str | None:
    """Return the key that `data.where` compares; equal values have equal keys, null has None.

    Numbers are equal by value, also as text: 3, 3.0, "3" and "3.0", but not "03", which may be a
    code. True and false are equal to the texts, in any case. Other text is compared as it is,
    without the white space around it.

    Raises:
        Unfit: a list, an object, or anything else that is not one value.
    """
    if is_missing(value):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if _is_number(value):
        return number_text(value)
    if isinstance(value, str):
        text = value.strip()
        if PLAIN_NUMBER.fullmatch(text):
            return number_text(Decimal(text))
        return text.lower() if text.lower() in ("true", "false") else text or None
    raise Unfit(f"is {describe(value)}", "Filters compare text, numbers, true and false.")


def metadata_value(value: Any) -> Any:
    """Return a value as reward functions get it: plain Python, with numbers as int or float."""
    value = _plain(value)
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): metadata_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [metadata_value(item) for item in value]
    return value
