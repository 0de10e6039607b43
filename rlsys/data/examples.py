"""Examples to learn from, as every source of data yields them.

    Demonstration    a prompt and the response to imitate, or a conversation with both
    Ranking          a prompt and K responses with their ranks; K = 2 is a preference pair
    StepLabels       a prompt and a response in steps, each with a label: right or wrong
    PlainText        a text of which every token is learned

Each has an id for messages, and a `prompt_key`: examples with equal keys have the same prompt, so
that none of them is held out while another one is trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rlsys.data.problems import ChatMessage, Problem


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A prompt and the response to imitate.

    With `messages` the example is that conversation: the assistant's turns are learned, and
    `prompt` and `response` are empty. With `context` the prompt is that conversation, which ends
    with the user's turn, and `prompt` is the text of that turn.
    """

    example_id: str
    prompt: str = ""
    response: str = ""
    messages: tuple[ChatMessage, ...] = ()
    context: tuple[ChatMessage, ...] = ()
    answer: str | None = None  # the ground truth, for held-out accuracy

    @property
    def prompt_key(self) -> str:
        """The prompt, with white space normalized."""
        if self.messages:
            first = next(i for i, turn in enumerate(self.messages) if turn.role == "assistant")
            return _key(self.messages[:first], "")
        return _key(self.context, self.prompt)


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """A prompt and K responses with their ranks: 0 is best, and equal ranks are a tie.

    With `context` the prompt is that conversation, which ends with the user's turn, and `prompt` is
    the text of that turn.
    """

    example_id: str
    prompt: str
    responses: tuple[str, ...]  # K of them
    ranks: tuple[int, ...]  # K
    context: tuple[ChatMessage, ...] = ()
    answer: str | None = None  # the ground truth, for held-out accuracy

    @property
    def prompt_key(self) -> str:
        """The prompt, with white space normalized."""
        return _key(self.context, self.prompt)


@dataclass(frozen=True, kw_only=True)
class StepLabels:
    """A prompt and a response in steps, with a label for each: true is right.

    With `context` the prompt is that conversation, which ends with the user's turn, and `prompt` is
    the text of that turn.
    """

    example_id: str
    prompt: str
    steps: tuple[str, ...]  # at least one
    labels: tuple[bool, ...]  # as many
    context: tuple[ChatMessage, ...] = ()
    answer: str | None = None  # the ground truth

    @property
    def prompt_key(self) -> str:
        """The prompt, with white space normalized."""
        return _key(self.context, self.prompt)


@dataclass(frozen=True, kw_only=True)
class PlainText:
    """A text of which every token is learned."""

    example_id: str
    text: str

    @property
    def prompt_key(self) -> str:
        """The text, with white space normalized."""
        return _key((), self.text)


Example = Demonstration | Ranking | StepLabels | PlainText


def _key(turns: Sequence[ChatMessage], prompt: str) -> str:
    parts = [f"{turn.role}\n{turn.content}" for turn in turns] or [f"user\n{prompt}"]
    return "\n\n".join(" ".join(part.split()) for part in parts)


def problem_of(example: Demonstration | Ranking | StepLabels) -> Problem | None:
    """Return the problem that an example answers; None where its answer is not known."""
    if example.answer is None:
        return None
    if isinstance(example, Demonstration) and example.messages:
        return None
    return Problem(
        problem_id=example.example_id,
        problem=example.prompt,
        answer=example.answer,
        messages=example.context,
    )


def examples_digest(examples: Sequence[Example]) -> str:
    """Return a hash of every field of the examples, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        # JSON escapes what separates the fields, so that no two lists give the same bytes.
        line = json.dumps([type(example).__name__, asdict(example)])
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()
