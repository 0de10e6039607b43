"""What a training session tells those who watch it: the display, the metrics log, the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Outcome = Literal["finished", "interrupted", "failed"]

# A step's time, in this order: each is reported as time/<phase>, and together they are time/step.
# reward: waiting for rewards that were not ready when generation and log-probabilities were done.
PHASES = ("generate", "logprobs", "reward", "advantages", "update", "sync", "other")


class Observer:
    """Watches a run. Each method does nothing here; a subclass overrides those that it needs.

    They are called in the driver's event loop and return soon.
    """

    def on_start(self, first_step: int, total_steps: int) -> None:
        """The loop begins; `first_step` is above 1 after a resume."""

    def on_phase(self, step: int, phase: str) -> None:
        """A phase begins: one of `PHASES` (but "other"), "evaluate" or "checkpoint"."""

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        """A training step is complete. Steps count from 1."""

    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Held-out results are there after `step` steps (0: before training)."""

    def on_checkpoint(self, step: int, path: str) -> None:
        """A checkpoint is complete."""

    def on_end(self, outcome: Outcome, message: str) -> None:
        """The loop is over; `message` says why where it failed."""
