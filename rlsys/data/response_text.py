"""The text of a response while it is sampled, decoded token by token as vLLM does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenizers.decoders import DecodeStream

from rlsys.data.batches import RolloutBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ResponseText:
    """The text of a response without special tokens.

    A character joins the text when all its bytes have been sampled.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> None:
        """Begin after the token ids `prompt`.

        They matter for the first token: many tokenizers drop a space at the beginning of a text.
        """
        self.text = ""
        self._tokenizer = tokenizer
        self._fast: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._ids = list(prompt)
        if self._fast is not None:
            self._stream = DecodeStream(ids=self._ids, skip_special_tokens=True)
        else:
            self._start = len(self._decoded())

    def append(self, token: int) -> int:
        """Add a token and return by how many characters the text grew."""
        before = len(self.text)
        self._ids.append(token)
        if self._fast is not None:
            self.text += self._next(token)
        else:
            # A replacement character at the end stands for incomplete bytes.
            decoded = self._decoded()
            if not decoded.endswith("\ufffd"):
                self.text = decoded[self._start :]

        return len(self.text) - before

    def cut_behind(self, stop: Sequence[str], added: int) -> bool:
        """Cut the text after the first stop string that ends within the last `added` characters.

        Returns:
            True if there is one.
        """
        ends = []
        for string in stop:
            found = self.text.find(string, max(0, self._first(string, added)))
            if found >= 0:
                ends.append(found + len(string))
        if not added or not ends:
            return False

        self.text = self.text[: min(ends)]
        return True

    def _first(self, string: str, added: int) -> int:
        """Return the earliest start of a string that ends within the last `added` characters."""
        return len(self.text) - added - len(string) + 1

    def _decoded(self) -> str:
        """Decode prompt and response as a whole, for tokenizers without a stream."""
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _next(self, token: int) -> str:
        """Return the text that `token` completes; empty if its bytes are incomplete."""
        try:
            return self._stream.step(self._fast, token) or ""
        except Exception as error:
            if not str(error).startswith("Invalid prefix"):
                raise
            # Bytes that are not valid UTF-8 leave the stream unusable. Begin a new one, as vLLM
            # does.
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._stream.step(self._fast, token) or ""


def text_after_each_token(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], response: Sequence[int]
) -> tuple[str, list[int]]:
    """Return the text of a response, and its length in characters after each token.

    Conventions: as in the engines, special tokens have no text, and a character counts from the
    token on that completes its bytes.

    Example: "a€" of a byte-level tokenizer in four tokens (a and the three bytes of the euro sign):
    lengths 1, 1, 1, 2.
    """
    text = ResponseText(tokenizer, prompt)
    lengths = []
    for token in response:
        text.append(token)
        lengths.append(len(text.text))
    return text.text, lengths


def lengths_after_tokens(
    rollouts: RolloutBatch, row: int, tokenizer: PreTrainedTokenizerBase
) -> list[int] | None:
    """Return the length of the text of a response after each token; see `text_after_each_token`.

    None where the tokens decode to another text than the engine's.
    """
    first, end = rollouts.sequence_offsets[row], rollouts.sequence_offsets[row + 1]
    start = first + rollouts.prompt_lengths[row]
    text, lengths = text_after_each_token(
        tokenizer,
        rollouts.token_ids[first:start].tolist(),
        rollouts.token_ids[start:end].tolist(),
    )
    # The engine may have cut the text within the last token, at a stop string.
    return lengths if text.startswith(rollouts.response_texts[row]) else None
