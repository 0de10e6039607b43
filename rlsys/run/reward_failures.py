"""Failures of reward functions: they are shown and counted, and too many end the run.

A function that fails on every response gives rewards of 0, which look like those of a policy that
is always wrong.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from rlsys.data.batches import RewardBatch, RewardFailure

logger = logging.getLogger(__name__)

LARGEST_FRACTION = 0.5  # of the first batch that a function may fail on
COUNTED_KINDS = {"timeout": "timeouts", "crash": "crashes", "error": "errors"}


class RewardFailureError(RuntimeError):
    """A failure of a reward function on more than half of the first batch."""


class RewardFailureWatch:
    """Checks every reward batch of a run for failures."""

    def __init__(self, notify: Callable[[str], None] = lambda text: None) -> None:
        """`notify` prints a text on the console; it is written to the log in any case."""
        self._notify = notify
        self._shown: set[str] = set()
        self._seen: set[str] = set()

    def check(self, batches: Sequence[RewardBatch], occasion: str) -> None:
        """Show the first failure of each function, with its traceback, and judge the first batch.

        Args:
            batches: the parts of one batch.
            occasion: "training" or "evaluation". The first batch of each is judged.

        Raises:
            RewardFailureError: a function failed on more than half of the first batch.
        """
        failures = [failure for batch in batches for failure in batch.failures]
        for failure in failures:
            self._show(failure)
        if batches and occasion not in self._seen:
            self._seen.add(occasion)
            _judge(failures, sum(len(batch) for batch in batches), occasion)

    def _show(self, failure: RewardFailure) -> None:
        if failure.function in self._shown:
            return
        self._shown.add(failure.function)
        text = f"reward {failure.function!r} failed ({failure.kind}): {failure.message}"
        if failure.traceback:
            text += "\n" + failure.traceback.rstrip()
        logger.error("%s", text)
        self._notify(text)


def _judge(failures: Sequence[RewardFailure], responses: int, occasion: str) -> None:
    """Raise an error if a function failed on too many responses of a batch."""
    counts = Counter(failure.function for failure in failures)
    limit = LARGEST_FRACTION * responses
    failed = [name for name, count in counts.most_common() if count > limit]
    if not failed:
        return

    worst, *others = failed
    first = next(failure for failure in failures if failure.function == worst)
    also = f" So did {', '.join(map(repr, others))}." if others else ""
    raise RewardFailureError(
        f"reward.functions: {worst!r} failed on {counts[worst]} of the {responses} responses of "
        f"the first {occasion} batch; the first failure: {first.kind}, {first.message}.{also} Fix "
        "the function; its rewards are not usable."
    )


def failure_counts(batches: Sequence[RewardBatch]) -> dict[str, int]:
    """Count failures by kind (`errors`, `timeouts`, `crashes`) and function (`failed/<name>`)."""
    failures = [failure for batch in batches for failure in batch.failures]
    kinds = Counter(failure.kind for failure in failures)
    functions = Counter(failure.function for failure in failures)
    names = {name for batch in batches for name in batch.components}
    by_kind = {plural: kinds[kind] for kind, plural in COUNTED_KINDS.items()}
    return by_kind | {f"failed/{name}": functions[name] for name in sorted(names)}


def failed_functions(values: Mapping[str, float]) -> str:
    """Return the functions that failed in a step, with counts: "mine 3, format 1"; "" for none."""
    prefix = "reward/failed/"
    failed = []
    for name, count in values.items():
        if name.startswith(prefix) and count:
            failed.append(f"{name.removeprefix(prefix)} {count:.0f}")
    return ", ".join(failed)


def total_failures(steps: Iterable[Mapping[str, float]]) -> str:
    """Return the functions that failed over all `steps`, with total counts: "mine 12"."""
    totals: dict[str, float] = {}
    for values in steps:
        for name, number in values.items():
            totals[name] = totals.get(name, 0.0) + number
    return failed_functions(totals)
