"""What reward functions failed at: shown, counted, and where it is most of what they were asked, the end of the run.

A function that fails on every answer gives rewards of 0 that look like those of a policy that is always wrong.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from rlsys.data.batches import RewardBatch, RewardFailure

logger = logging.getLogger(__name__)

LARGEST_SHARE = 0.5  # of the first batch on which a function may fail
COUNTED_KINDS = {"timeout": "timeouts", "crash": "crashes", "error": "errors"}


class RewardFailureError(RuntimeError):
    """A reward function failed on more than half of the first answers."""


class RewardFailureWatch:
    """Sees every reward batch of a run. `notify` puts a text on the console; the log has it in any case."""

    def __init__(self, notify: Callable[[str], None] = lambda text: None) -> None:
        self._notify = notify
        self._shown: set[str] = set()
        self._seen: set[str] = set()

    def check(self, batches: Sequence[RewardBatch], occasion: str) -> None:
        """Look at the parts of one batch. The first failure of each function is shown with its traceback.

        `occasion` is "training" or "evaluation": of each, the first batch is judged.

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


def _judge(failures: Sequence[RewardFailure], answers: int, occasion: str) -> None:
    counts = Counter(failure.function for failure in failures)
    failed = [name for name, count in counts.most_common() if count > LARGEST_SHARE * answers]
    if not failed:
        return
    worst, *others = failed
    first = next(failure for failure in failures if failure.function == worst)
    also = f" So did {', '.join(map(repr, others))}." if others else ""
    raise RewardFailureError(
        f"reward.functions: {worst!r} failed on {counts[worst]} of the {answers} answers of the first {occasion} batch; the first: "
        f"{first.kind}, {first.message}.{also} Repair the function: its rewards mean nothing."
    )


def failure_counts(batches: Sequence[RewardBatch]) -> dict[str, int]:
    """How often reward functions failed: `errors`, `timeouts`, `crashes`, and `failed/<function>` of each."""
    failures = [failure for batch in batches for failure in batch.failures]
    kinds = Counter(failure.kind for failure in failures)
    functions = Counter(failure.function for failure in failures)
    names = {name for batch in batches for name in batch.components}
    by_kind = {plural: kinds[kind] for kind, plural in COUNTED_KINDS.items()}
    return by_kind | {f"failed/{name}": functions[name] for name in sorted(names)}


def failed_functions(values: Mapping[str, float]) -> str:
    """Functions that failed in a step, with how often: "mine 3, format 1". Nothing where none did."""
    prefix = "reward/failed/"
    counts = {name.removeprefix(prefix): n for name, n in values.items() if name.startswith(prefix)}
    return ", ".join(f"{name} {n:.0f}" for name, n in counts.items() if n)


def total_failures(steps: Iterable[Mapping[str, float]]) -> str:
    """Functions that failed in the training steps with these metrics, with how often in all: "mine 12"."""
    totals: dict[str, float] = {}
    for values in steps:
        for name, number in values.items():
            totals[name] = totals.get(name, 0.0) + number
    return failed_functions(totals)
