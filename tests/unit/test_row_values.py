"""Values of a row as prompt, answer, id and filter."""

import re
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.data.problems import ChatMessage
from rlsys.data.row_values import (
    Blank,
    Unfit,
    answer_text,
    filter_key,
    id_text,
    lookup,
    metadata_value,
    number_text,
    prompt_parts,
)

PLAIN_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d*[1-9])?")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("4", "4"),
        (" 4.0 ", " 4.0 "),  # text is taken as it is
        ("None", "None"),
        (4, "4"),
        (-12, "-12"),
        (0.5, "0.5"),
        (4.0, "4"),
        (-0.0, "0"),
        (1e-7, "0.0000001"),
        (1e22, "1" + "0" * 22),
        (Decimal("4.00"), "4"),
        (Decimal("0.50"), "0.5"),
        (Decimal("1E+3"), "1000"),
        (2**70, str(2**70)),
    ],
)
def test_answers_of_text_and_numbers(value: Any, text: str):
    assert answer_text(value) == text


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_written_in_full_and_reads_back(number: int | float):
    text = number_text(number)
    assert PLAIN_NUMBER.fullmatch(text)
    assert type(number)(text) == number


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9))
def test_a_decimal_reads_back(number: Decimal):
    assert Decimal(number_text(number)) == number


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "is null"),
        ("", "is blank"),
        (" \n\u2003", "is blank"),
        (float("nan"), "is NaN"),
        (Decimal("NaN"), "is NaN"),
        (float("inf"), "is inf"),
        (Decimal("1e1001"), "is a number of more than 1000 digits"),
        (Decimal("1e-999999999"), "is a number of more than 1000 digits"),
        (True, "is true"),
        (["4"], r"is a list \(\['4'\]\)"),
        (np.array(["4"]), r"is a list \(\['4'\]\)"),
        ([], r"is a list \(\[\]\)"),
        ({"ground_truth": "4"}, r"is an object \(with ground_truth\)"),
        (b"4", "is a value of type bytes"),
        ("a\ud800", "holds half of a surrogate pair at character 1"),
    ],
)
def test_unfit_answers(value: Any, message: str):
    with pytest.raises(Unfit, match=f"^{message}$") as error:
        answer_text(lookup({"a": value}, "a"))
    assert error.value.remedy
    assert isinstance(error.value, Blank) == (message in ("is null", "is blank", "is NaN"))


def test_scalars_of_numpy_keep_their_own_precision():
    assert answer_text(lookup({"a": np.float32(0.1)}, "a")) == "0.1"
    assert answer_text(lookup({"a": np.int64(7)}, "a")) == "7"
    with pytest.raises(Unfit, match="is false"):
        answer_text(lookup({"a": np.bool_(False)}, "a"))


def test_a_dot_leads_into_an_object_unless_a_column_has_that_name():
    row = {"reward": {"truth": "4", "deeper": {"x": 1}}, "a.b": "whole", "a": {"b": "part"}}
    assert lookup(row, "reward.truth") == "4"
    assert lookup(row, "reward.deeper.x") == 1
    assert lookup(row, "a.b") == "whole"
    assert lookup({"reward": None}, "reward.truth") is None
    for name in ("reward.other", "absent", "a.b.c"):
        with pytest.raises(KeyError):
            lookup(row, name)


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_chat_messages_keep_their_turns_and_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "1 + 1?"}]
    # As Parquet gives them: every key in every message, null where it is absent.
    value = [turn("system", ""), turn("user", "Hi"), turn("assistant", "Yes?"), turn("user", parts)]
    value = [{**message, "name": None, "tool_calls": None} for message in value]
    assert prompt_parts(value) == (
        "What is 1 + 1?",
        (
            ChatMessage(role="system", content=""),
            ChatMessage(role="user", content="Hi"),
            ChatMessage(role="assistant", content="Yes?"),
            ChatMessage(role="user", content="What is 1 + 1?"),
        ),
    )
    assert prompt_parts(lookup({"p": np.array(value, dtype=object)}, "p")) == prompt_parts(value)
    assert prompt_parts("text") == ("text", ())


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "is null"),
        ("  ", "is blank"),
        (7, r"is a number \(7\)"),
        ({"role": "user", "content": "x"}, r"is an object \(with role, content\)"),
        ([], r"is a list \(\[\]\)"),
        (["What is 1 + 1?"], "is a list"),
        ([turn("user", "a"), turn("assistant", "b")], "ends with a message of the assistant"),
        ([turn("system", "a")], "ends with a message of the system"),
        ([turn("human", "a")], "has the role 'human' in message 1"),
        ([turn("tool", "a")], "has the role 'tool' in message 1"),
        ([{"content": "a"}], "has no role in message 1"),
        ([{"from": "human", "value": "a"}], "has 'from' in message 1"),
        ([turn("user", "a"), {**turn("user", "b"), "name": "x"}], "has 'name' in message 2"),
        ([turn("user", None)], "has in message 1 content that is null"),
        ([turn("user", " ")], "has in message 1 content that is blank"),
        ([turn("user", "\udfff")], "has in message 1 content that holds half of a surrogate"),
        ([turn("user", 7)], r"has in message 1 content that is a number \(7\)"),
        ([turn("user", [IMAGE])], "has in message 1 content that holds a part of type 'image_url'"),
        ([turn("user", ["x"])], "has in message 1 content that holds text"),
        ([turn("user", [])], "has in message 1 content that is blank"),
    ],
)
def test_unfit_prompts(value: Any, message: str):
    with pytest.raises(Unfit, match=f"^{message}") as error:
        prompt_parts(value)
    assert error.value.remedy


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (3, "3"),
        (3.0, "3"),
        ("3", "3"),
        (" 3.0 ", "3"),
        (Decimal("0.50"), "0.5"),
        (-1, "-1"),
        ("03", "03"),  # may be a code
        ("3e2", "3e2"),
        ("Level 3", "Level 3"),
        (" Algebra ", "Algebra"),
        ("algebra", "algebra"),
        (True, "true"),
        ("True", "true"),
        (1, "1"),
        (None, None),
        (float("nan"), None),
        (" ", None),
    ],
)
def test_what_filters_compare(value: Any, key: str | None):
    assert filter_key(value) == key


@pytest.mark.parametrize("value", [[3], {"a": 1}, float("inf"), b"x"])
def test_what_filters_cannot_compare(value: Any):
    with pytest.raises(Unfit, match=r"^is "):
        filter_key(value)


def test_metadata_compute_as_plain_numbers():
    value = {"a": Decimal("0.5"), "b": [np.float32(0.1), np.int64(2)], "c": None, "d": "x"}
    plain = metadata_value(value)
    assert plain == {"a": 0.5, "b": [0.1, 2], "c": None, "d": "x"}
    assert [type(item) for item in plain["b"]] == [float, int]


def test_ids():
    assert [id_text(value, 9) for value in ("a", 3, 3.0, None, float("nan"))] == [
        "a",
        "3",
        "3",
        "9",
        "9",
    ]
    for value in (["a"], {"a": 1}, True, "\ud800"):
        with pytest.raises(Unfit):
            id_text(value, 9)
