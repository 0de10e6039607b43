"""A problem with its answer, as every source of data yields it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ChatMessage:
    """One turn of a conversation; `role` is one that the model's chat template accepts."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One verifiable problem.

    With `messages` the prompt is that conversation, and `problem` is the text of its last message.
    `metadata` are the other columns of the row, for rewards that read them.
    """

    problem_id: str
    problem: str
    answer: str
    messages: tuple[ChatMessage, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)


def problems_digest(problems: Sequence[Problem]) -> str:
    """Return a hash of the problems: every field of each but the metadata, in their order.

    It changes if any text, answer, id or message changes, and if problems are added, dropped or
    reordered. The same problems give the same hash in every process, whichever file they were read
    from. Metadata are left out: whether they are read depends on the rewards.
    """
    digest = hashlib.sha256()
    for problem in problems:
        # JSON escapes what separates the fields, so that no two lists give the same bytes.
        fields = asdict(problem)
        del fields["metadata"]
        digest.update(json.dumps(fields).encode() + b"\n")
    return digest.hexdigest()
