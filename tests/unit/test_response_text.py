"""The text of a response while it is sampled, and the cut at a stop string."""

from typing import Any

import pytest

from rlsys.data.response_text import ResponseText
from rlsys.models import resolve_model
from rlsys.models.loading import load_tokenizer

TOKENIZER: Any = load_tokenizer(resolve_model("tiny"))


def tokens(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def read(text: str, stop: tuple[str, ...]) -> tuple[str, int]:
    """Return text and number of tokens of a response that ends with a stop string."""
    response = ResponseText(TOKENIZER, tokens("Ann has"))
    for count, token in enumerate(tokens(text), start=1):
        if response.cut_behind(stop, response.append(token)):
            return response.text, count
    return response.text, len(tokens(text))


def test_text_without_a_stop_string_is_the_decoded_response():
    text = " 3 and \\boxed{7}. Größe: 5 €"
    assert read(text, ()) == (text, len(tokens(text)))
    assert read(text, ("absent",))[0] == text


@pytest.mark.parametrize("stop", [("}\n",), ("7}",), ("Answer", "}"), ("{", "oxed{7")])
def test_the_text_ends_with_the_stop_string_that_is_complete_first(stop: tuple[str, ...]):
    text = " \\boxed{7}\nAnswer: and more"
    end = min(text.index(one) + len(one) for one in stop if one in text)
    assert read(text, stop)[0] == text[:end]


def test_a_string_that_was_complete_before_the_last_token_is_not_found_again():
    response = ResponseText(TOKENIZER, ())
    for token in tokens("a}\nb"):
        response.append(token)
    added = response.append(tokens("c")[0])
    assert not response.cut_behind(("}\n",), added)
    assert response.text == "a}\nbc"


def test_special_tokens_and_unfinished_characters_add_no_text():
    response = ResponseText(TOKENIZER, ())
    first, *rest = tokens("€")
    assert rest  # its bytes are several tokens
    assert response.append(first) == 0
    assert not response.cut_behind(("",), 0)
    for token in rest:
        response.append(token)
    response.append(TOKENIZER.eos_token_id)
    assert response.text == "€"


def test_bytes_that_do_not_decode_do_not_stop_a_response():
    response = ResponseText(TOKENIZER, ())
    continuation = tokens("€")[-1]
    for token in [continuation] * 6 + tokens(" and 5"):
        response.append(token)
    assert response.text.endswith(" and 5")


def test_a_tokenizer_without_a_fast_form_reads_the_same():
    class Slow:
        def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
            return str(TOKENIZER.decode(ids, skip_special_tokens=skip_special_tokens))

    text = " 3 and € }\n"
    tokenizer: Any = Slow()
    slow = ResponseText(tokenizer, tokens("Ann"))
    fast = ResponseText(TOKENIZER, tokens("Ann"))
    for token in tokens(text):
        slow.append(token)
        fast.append(token)
    assert slow.text == fast.text == text
