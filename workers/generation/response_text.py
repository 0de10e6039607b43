"""The text of a response while it is sampled, token by token, as vLLM makes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class ResponseText:
    """Text without special tokens. A character whose bytes are not complete yet is not part of it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> None:
        """`prompt` decides how the first token reads: many tokenizers drop a space at the very beginning."""
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
        elif not (decoded := self._decoded()).endswith("\ufffd"):
            self.text = decoded[self._start :]
        return len(self.text) - before

    def cut_behind(self, stop: Sequence[str], added: int) -> bool:
        """Cut the text behind the stop string that is complete first within the last `added` characters; False where none is."""
        ends = [
            found + len(string)
            for string in stop
            if (found := self.text.find(string, max(0, self._first(string, added)))) >= 0
        ]
        if not added or not ends:
            return False
        self.text = self.text[: min(ends)]
        return True

    def _first(self, string: str, added: int) -> int:
        """Where a string begins at the earliest if its last character is among the last `added`."""
        return len(self.text) - added - len(string) + 1

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _next(self, token: int) -> str:
        try:
            return self._stream.step(self._fast, token) or ""
        except Exception as error:
            if not str(error).startswith("Invalid prefix"):
                raise
            # Bytes that are no UTF-8 leave the stream unusable: begin a new one, as vLLM does.
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._stream.step(self._fast, token) or ""
