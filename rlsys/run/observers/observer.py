"""Events of a training session, for its observers: the display, the metrics log, the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rlsys.run.fault_events import Fault

# "restarting": an actor failed, and the loop begins again from the newest checkpoint.
Outcome = Literal["finished", "interrupted", "failed", "restarting"]

# Phases of a step, in order. Each is reported as time/<phase>; their sum is time/step. `reward` is
# the wait for rewards that were not ready when generation and log-probabilities were done; `critic`
# is the update of a critic. A step has no time of a phase that it did not go through.
PHASES = ("generate", "logprobs", "reward", "advantages", "critic", "update", "sync", "other")


class Observer:
    """Base of all observers. Its methods do nothing; a subclass overrides those that it needs.

    They are called in the driver's event loop, so they must return quickly.
    """

    def on_start(self, first_step: int, total_steps: int) -> None:
        """React to the start of the loop; `first_step` is above 1 after a resume."""

    def on_phase(self, step: int, phase: str) -> None:
        """React to the start of a phase: one of `PHASES`, "evaluate" or "checkpoint".

        Of a checkpoint that is written in the background, "checkpoint_copy" is the pause in which
        its state is copied, and "checkpoint_write" a wait for its files; `step` is its own.
        """

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        """React to the metrics of a complete training step. Steps count from 1."""

    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """React to the metrics of an evaluation after `step` steps (0: before training)."""

    def on_checkpoint(self, step: int, path: str) -> None:
        """React to a complete checkpoint; of one in the background, `step` is an earlier one."""

    def on_fault(self, fault: Fault) -> None:
        """React to the death of a process, when it is noticed."""

    def on_end(self, outcome: Outcome, message: str) -> None:
        """React to the end of the loop; `message` is the reason where it failed."""
