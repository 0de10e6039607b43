"""The watchdog of a run: a phase that takes far longer than ever before counts as hung."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from typing import TypeVar

from rlsys.run.observers.observer import Observer

T = TypeVar("T")

# Of the derived limits; docs of `trainer.phase_timeout_s` name them too.
FACTOR = 10.0  # times the longest measured time
SHORTEST_S = 600.0
UNMEASURED_S = 10800.0
WRITE = "checkpoint_write"  # of a checkpoint that is written beside training
START = "start"  # of the actors, which is no phase of a step: its limit is always derived
EVIDENCE_TIMEOUT_S = 90.0  # for collecting the stacks
CANCEL_TIMEOUT_S = 5.0
LOOK_EVERY_S = 1.0  # at the clock, since the next phase may have a shorter limit

logger = logging.getLogger(__name__)


class PhaseTimeoutError(RuntimeError):
    """A phase that took longer than its limit."""


async def _no_evidence() -> str:
    return ""


class Watchdog(Observer):
    """Observer that interrupts what it guards when a phase exceeds its time.

    Phases are timed from one event of the session to the next. The times outlive a session, so a
    run that was restarted goes on with the limits that it had.
    """

    def __init__(
        self,
        timeout_s: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Give each phase of a step `timeout_s`; None: a limit derived from the measured times."""
        self._timeout_s = timeout_s
        self._clock = clock
        self._sleep = sleep
        self._longest: dict[str, float] = {}
        self._step, self._phase = 0, START
        self._began = clock()
        # Saves stacks while the hang lasts, and returns a line about them.
        self.collect_evidence: Callable[[], Awaitable[str]] = _no_evidence

    def learn(self, steps: Iterable[Mapping[str, float]]) -> None:
        """Take the times of earlier steps, time/<phase>, into account."""
        for values in steps:
            for name, seconds in values.items():
                if name.startswith("time/"):
                    self._measured(name.removeprefix("time/"), seconds)

    def limit(self, phase: str) -> float:
        """Return the seconds that a phase may take."""
        if self._timeout_s is not None and phase != START:
            return self._timeout_s
        longest = self._longest.get(phase)
        return UNMEASURED_S if longest is None else max(FACTOR * longest, SHORTEST_S)

    def enter(self, step: int, phase: str) -> None:
        """Start to time a phase, and keep the time of the one before."""
        self._measured(self._phase, self._clock() - self._began)
        self._begin(step, phase)

    def begin_start(self, step: int) -> None:
        """Start to time the start of the actors.

        What was before counts for no limit: a phase that failed, and the wait for resources.
        """
        self._begin(step, START)

    def _begin(self, step: int, phase: str) -> None:
        self._step, self._phase, self._began = step, phase, self._clock()

    def _measured(self, phase: str, seconds: float) -> None:
        self._longest[phase] = max(self._longest.get(phase, 0.0), seconds)

    def on_phase(self, step: int, phase: str) -> None:
        self.enter(step, phase)

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        # As a phase it is only the wait for what is left of it, which may be most of it or nothing.
        self._measured(WRITE, values.get(f"time/{WRITE}", 0.0))
        self.enter(step, "other")

    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        self.enter(step, "other")

    def on_checkpoint(self, step: int, path: str) -> None:
        if self._phase == "checkpoint":  # one that is written beside training ends no phase
            self.enter(step, "other")

    async def guard(self, work: Awaitable[T]) -> T:
        """Return the result of `work`.

        Raises:
            PhaseTimeoutError: a phase exceeded its limit; `work` was cancelled.
        """
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                left = self._began + self.limit(self._phase) - self._clock()
                if left <= 0:
                    raise await self._timeout()
                await self._wait(task, min(left, LOOK_EVERY_S))
            return task.result()
        finally:
            await _cancelled(task)

    async def _wait(self, task: asyncio.Future[T], seconds: float) -> None:
        """Wait until the task is done, or for that time."""
        timer = asyncio.ensure_future(self._sleep(seconds))
        try:
            await asyncio.wait((task, timer), return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()

    async def _timeout(self) -> PhaseTimeoutError:
        """Collect the evidence, and return the error."""
        step, phase, seconds = self._step, self._phase, self._clock() - self._began
        try:
            found = await asyncio.wait_for(self.collect_evidence(), EVIDENCE_TIMEOUT_S)
        except Exception as error:  # the hang must be ended in any case
            logger.exception("the stacks could not be collected")
            found = f"the stacks could not be collected ({type(error).__name__})"
        text = f"{phase} of step {step} hangs: it has taken {seconds:.0f} s"
        text += f", and its limit is {self.limit(phase):.0f} s"
        if phase != START:
            text += " (raise trainer.phase_timeout_s if it was only slow)"
        return PhaseTimeoutError(f"{text}; {found}" if found else text)


async def _cancelled(task: asyncio.Future[T]) -> None:
    """Cancel a task, and wait for it for a while."""
    if task.done():
        return
    task.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.wait((task,), timeout=CANCEL_TIMEOUT_S)
