"""The limits on restarts of a run: how many, after which pauses, and where one does not help.

A restart tears all actors down and continues from the newest checkpoint; `recipes.training` does
that around a session.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rlsys.run.observers.observer import Observer

SAME_PLACE_LIMIT = 3  # failures of one kind at one step and phase, of which the last ends the run
FIRST_PAUSE_S = 1.0  # doubled at each further restart without a new checkpoint
LONGEST_PAUSE_S = 60.0

# The failures that a restart can repair. A rank that dies shows as its death or as an error of the
# process group in the others, whichever comes first, so both are one kind.
FailureKind = Literal["lost process", "out of memory", "hang"]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A failure that a restart may repair, and where it happened."""

    number: int  # of all failures of the run, from 1
    kind: FailureKind
    step: int  # the one in progress
    phase: str
    message: str

    @property
    def place(self) -> tuple[FailureKind, int, str]:
        return self.kind, self.step, self.phase

    @property
    def name(self) -> str:
        """A name for a directory: number, step and phase."""
        return _name(self.number, self.step, self.phase)


@dataclass(frozen=True, kw_only=True)
class Restart:
    """A restart that is about to be made."""

    failure: Failure
    pause_s: float
    lost_steps: int  # complete steps after the newest checkpoint, which are taken again


class Restarts(Observer):
    """Observer that notes where a run is, and decides whether a failure is followed by a restart.

    It outlives the session that it observes.
    """

    def __init__(
        self,
        limit: int,
        kind_of: Callable[[BaseException], FailureKind | None],
        *,
        earlier: int = 0,
    ) -> None:
        """Allow `limit` restarts without a new checkpoint in between.

        Args:
            kind_of: returns None for an error that would come again.
            earlier: the number of the last failure before the run was resumed.
        """
        self._limit = limit
        self._kind_of = kind_of
        self._earlier = earlier
        self._step, self._phase = 0, "start"
        self._completed = self._saved = 0
        self._since_checkpoint = 0
        self._stopping = False
        self.failures: list[Failure] = []

    def on_start(self, first_step: int, total_steps: int) -> None:
        self._completed = self._saved = first_step - 1

    def on_phase(self, step: int, phase: str) -> None:
        self._step, self._phase = step, phase

    def on_step(self, step: int, values: object) -> None:
        self._completed = step

    def on_checkpoint(self, step: int, path: str) -> None:
        self._saved = step
        self._since_checkpoint = 0

    def begin_start(self) -> int:
        """Note that the actors are starting; return the step that was in progress before."""
        self._phase = "start"
        return self._step

    @property
    def next_name(self) -> str:
        """The name of the next failure, as `Failure.name`."""
        return _name(self._next_number, self._step, self._phase)

    @property
    def _next_number(self) -> int:
        return self._earlier + len(self.failures) + 1

    def request_stop(self) -> None:
        """Make no further restart: the user ends the run."""
        self._stopping = True

    def is_failure(self, error: BaseException) -> bool:
        """Return whether an error is a failure that a restart might repair."""
        return self._kind_of(error) is not None

    def refusal(self, error: BaseException) -> str | None:
        """Return why `error` is not followed by a restart; None where it is."""
        kind = self._kind_of(error)
        if kind is None:
            return "it is not a failure that a restart repairs"
        if self._stopping:
            return "the run was asked to stop"
        if self._limit == 0:
            return "trainer.max_restarts is 0"

        place = (kind, self._step, self._phase)
        earlier = Counter(failure.place for failure in self.failures)[place]
        if earlier + 1 >= SAME_PLACE_LIMIT:
            return (
                f"{SAME_PLACE_LIMIT} failures of the same kind ({kind}) in {self._phase} of step "
                f"{self._step}, so another restart would not help"
            )
        if self._since_checkpoint >= self._limit:
            return (
                f"trainer.max_restarts is {self._limit}, and there were as many restarts without "
                "a new checkpoint"
            )
        return None

    def begin(self, error: BaseException) -> Restart:
        """Count a restart after `error`, for which there is no `refusal`."""
        failure = self.note(error)
        pause_s = min(FIRST_PAUSE_S * 2**self._since_checkpoint, LONGEST_PAUSE_S)
        self._since_checkpoint += 1
        return Restart(
            failure=failure,
            pause_s=pause_s,
            lost_steps=self._completed - self._saved,
        )

    def note(self, error: BaseException) -> Failure:
        """Add a failure to the history, and return it."""
        kind = self._kind_of(error)
        assert kind is not None, "other errors are no failures of the machinery"
        failure = Failure(
            number=self._next_number,
            kind=kind,
            step=self._step,
            phase=self._phase,
            message=last_line(error),
        )
        self.failures.append(failure)
        return failure


def _name(number: int, step: int, phase: str) -> str:
    return f"{number:02d}_step_{step:06d}_{phase}"


def number_of(name: str) -> int:
    """Return the number of a failure from `Failure.name`; 0 for another name."""
    number = name.partition("_")[0]
    return int(number) if number.isdecimal() else 0


def last_line(error: BaseException) -> str:
    """Return the type of an error and the last line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__
