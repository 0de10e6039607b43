"""A problem with its answer: what every source of data yields."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass


@dataclass(frozen=True, kw_only=True)
class ChatMessage:
    """One turn of a conversation; `role` is one of those that the model's chat template knows."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One verifiable problem.

    With `messages` the prompt is that conversation, and `problem` is the text of its last message.
    """

    problem_id: str
    problem: str
    answer: str
    level: int | None = None
    subject: str | None = None
    messages: tuple[ChatMessage, ...] = ()


def problems_digest(problems: Sequence[Problem]) -> str:
    """Return a hash of the problems: every field of each, in their order.

    It changes if any text, answer, id, level, subject or message changes, and if problems are
    added, dropped or reordered. The same problems give the same hash in every process, whichever
    file they were read from.
    """
    digest = hashlib.sha256()
    for problem in problems:
        # JSON escapes what separates the fields, so that no two lists give the same bytes.
        digest.update(json.dumps(astuple(problem)).encode() + b"\n")
    return digest.hexdigest()
