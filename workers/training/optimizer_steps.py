"""The optimizer steps of one trained model: schedule, counts, and their metrics.

begin        before the mini-batches of a trainer step
take         for each mini-batch: one optimizer step
end          after them: counts the trainer step, returns its metrics
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from rlsys.config import OptimizerConfig
from rlsys.metrics import Metric, mean, total
from workers.training.backends.backend import ModelBackend
from workers.training.learning_rate import learning_rate


@dataclass(frozen=True)
class UpdateCounts:
    """The outcomes of the mini-batches of one batch."""

    taken: int = 0  # optimizer steps
    not_finite: int = 0  # skipped: the gradient was not finite
    empty: int = 0  # skipped: no response of the mini-batch is trained

    @property
    def tried(self) -> int:
        """Mini-batches that had a gradient."""
        return self.taken + self.not_finite

    def after(self, *, finite: bool) -> UpdateCounts:
        """Return the counts with one more mini-batch that had a gradient."""
        return replace(self, taken=self.taken + finite, not_finite=self.not_finite + (not finite))

    def metrics(self, role: str) -> dict[str, Metric]:
        """Return the counts as metrics of the model called `role`."""
        return {
            f"{role}/updates": total(self.taken),
            f"{role}/skipped_updates": total(self.not_finite + self.empty),
            f"{role}/nonfinite_gradients": total(self.not_finite),
        }


class OptimizerSteps:
    """The schedule of one model, and the counts of the trainer step in progress."""

    def __init__(self, role: str, optimizer: OptimizerConfig, total_steps: int) -> None:
        """`total_steps` are the trainer steps in which the model is trained."""
        self.role = role
        self.completed = 0  # trainer steps
        self.counts = UpdateCounts()
        self._optimizer = optimizer
        self._total_steps = total_steps
        self._spread_over = 1

    @property
    def rate(self) -> float:
        """The learning rate of the present trainer step, or of the present update in it."""
        done = min(self.counts.tried, self._spread_over - 1) if self._spread_over > 1 else 0
        width = 1 / self._spread_over
        place = self.completed + done * width
        return learning_rate(self._optimizer, place, self._total_steps, width=width)

    def begin(self, *, empty: int, spread_over: int = 1) -> None:
        """Start a trainer step, of whose mini-batches `empty` have nothing to train on.

        Args:
            spread_over: the number of updates over which the schedule advances by one trainer
                step. 1: all updates of the step have the same learning rate.
        """
        self.counts = UpdateCounts(empty=empty)
        self._spread_over = max(1, spread_over)

    def take(self, backend: ModelBackend[Any]) -> dict[str, Metric]:
        """Take one optimizer step and count it; return the gradient's norm if it is finite."""
        norm = backend.step(self.rate)
        finite = math.isfinite(norm)
        self.counts = self.counts.after(finite=finite)
        return {f"{self.role}/grad_norm": mean(norm)} if finite else {}

    def end(self, rank: int) -> dict[str, Metric]:
        """Count the trainer step; return its learning rate, and on rank 0 its counts."""
        rate = {f"{self.role}/learning_rate": mean(self.rate)}
        self.completed += 1
        # Every rank counts the same, so one of them reports.
        return rate | (self.counts.metrics(self.role) if rank == 0 else {})
