"""Checks before a run: can the configured reward functions read the ground truths of the data?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

from rlsys.config import RewardFunctionConfig
from rlsys.math_verifier import after_hashes
from rlsys.rewards.registry import reward_hooks

EXAMPLES = 3
SHOWN_CHARACTERS = 60
MAX_DISTINCT = 20_000
MAX_SECONDS = 5.0


def ground_truth_notices(
    functions: Sequence[RewardFunctionConfig], answers: Mapping[str, Sequence[str]]
) -> list[str]:
    """Return notices for the user on ground truths that are unreadable or written as in GSM8K.

    A notice has the number of them and examples. `answers` has the ground truths of each source by
    the name of its config field. Each distinct one is read once, at most `MAX_DISTINCT` of a source
    and for at most `MAX_SECONDS`. Functions that do not declare `reads_ground_truth` are skipped.
    """
    notices = []
    for function in functions:
        reads = reward_hooks(function.name).reads_ground_truth
        if reads is None:
            continue
        for field, truths in answers.items():
            notices += _unread(function.name, reads, field, truths)
            notices += _with_hashes(field, truths)
    return notices


def _unread(
    name: str, reads: Callable[[str], bool], field: str, truths: Sequence[str]
) -> list[str]:
    # A sample is spread over the data, which may be sorted.
    distinct = list(dict.fromkeys(truths))
    step = math.ceil(len(distinct) / MAX_DISTINCT) or 1
    chosen = distinct[::step]

    until = time.monotonic() + MAX_SECONDS
    known: dict[str, bool] = {}
    for truth in chosen:
        known[truth] = reads(truth)
        if time.monotonic() > until:
            break

    looked_at = [truth for truth in truths if truth in known]
    unread = [truth for truth in looked_at if not known[truth]]
    if not unread:
        return []

    first = list(dict.fromkeys(unread))[:EXAMPLES]
    examples = ", ".join(map(_shown, first))
    whole = f" (of {len(truths)})" if len(looked_at) < len(truths) else ""
    return [
        f"{field}: {len(unread)} of {len(looked_at)} ground truths{whole} cannot be parsed by the "
        f"verifier of reward {name!r}, such as {examples}. A response to them is right only where "
        "it repeats the text: check data.columns.answer."
    ]


def _with_hashes(field: str, truths: Sequence[str]) -> list[str]:
    marked = sum(after_hashes(truth) is not None for truth in truths)
    if not marked:
        return []
    return [
        f"{field}: {marked} of {len(truths)} ground truths hold '####', as in GSM8K: the answer is "
        "the text after it. Responses are read as the reward's parameter extraction says "
        "(after_hashes for '#### 72')."
    ]


def _shown(truth: str) -> str:
    return repr(truth if len(truth) <= SHOWN_CHARACTERS else truth[: SHOWN_CHARACTERS - 3] + "...")
