"""A generation engine in simulated time: continuous batching with one step for all sequences.

    seconds of an engine step with n sequences = step_s + n * sequence_s

`step_s` is what a step takes whatever the batch (reading the weights, launching kernels), and
`sequence_s` what each sequence adds. Both together are a throughput curve n / (step_s + n *
sequence_s), which rises and then saturates at 1 / sequence_s tokens per second; two measured points
determine it (`EngineSpeed.through`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

ROUNDING_S = 1e-6  # an end that is this close has come


@dataclass(frozen=True, kw_only=True)
class EngineSpeed:
    """The speed of one engine."""

    step_s: float
    sequence_s: float
    max_sequences: int = 256  # that run at the same time; others wait

    @staticmethod
    def through(
        first: tuple[int, float], second: tuple[int, float], max_sequences: int = 256
    ) -> EngineSpeed:
        """Return the speed with two measured throughputs, as (sequences, tokens per second).

        Raises:
            ValueError: no engine has them: the larger batch takes less time for a step, or more
                than in proportion.
        """
        (n, first_rate), (m, second_rate) = sorted((first, second))
        first_s, second_s = n / first_rate, m / second_rate
        # Written so that NaN is an error.
        grows = first_s <= second_s and second_s * n <= first_s * m
        if not (0 < n < m and first_s > 0 and grows):
            raise ValueError(
                f"engine: {n} sequences at {first_rate:g} tokens/s and {m} at {second_rate:g} are "
                "no step time that grows with the batch, and at most in proportion to it"
            )
        sequence_s = (second_s - first_s) / (m - n)
        return EngineSpeed(
            step_s=first_s - n * sequence_s, sequence_s=sequence_s, max_sequences=max_sequences
        )

    @property
    def most_tokens_per_s(self) -> float:
        """The throughput with as many sequences as it may run."""
        return self.max_sequences / self.step_seconds(self.max_sequences)

    def step_seconds(self, sequences: int) -> float:
        """Return the seconds of a step, in which each sequence gets a token."""
        return self.step_s + sequences * self.sequence_s


@dataclass(eq=False)
class _Group:
    """Sequences that are given to an engine together; only the end of the last one matters."""

    ended: asyncio.Future[None]
    left: int  # sequences that have not ended
    last: tuple[float, int] = (0.0, 0)  # the latest end of those that were started


@dataclass(frozen=True, kw_only=True)
class EngineTotals:
    """What an engine has done since its start."""

    busy_s: float  # seconds with at least one sequence
    tokens: float  # sampled


class SimulatedEngine:
    """One engine. All running sequences advance together, so one clock of steps serves all.

    A sequence of N tokens that starts at step count S ends at S + N, and the batch is constant
    between two ends. So the present state follows from that of any earlier moment (`_advance`), and
    a timer is needed only for the next end of a whole group.
    """

    def __init__(self, speed: EngineSpeed) -> None:
        self._speed = speed
        self._steps = 0.0  # engine steps so far
        self._updated = asyncio.get_running_loop().time()
        # By the step in which they end and their number, the next one last.
        self._running: list[tuple[float, int, _Group]] = []
        self._waiting: deque[tuple[int, _Group]] = deque()
        self._started = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_is_late = False
        self._busy_s = 0.0
        self._tokens = 0.0

    async def generate(self, lengths: Sequence[int]) -> None:
        """Wait until sequences of these numbers of tokens have been sampled."""
        group = _Group(ended=asyncio.get_running_loop().create_future(), left=len(lengths))
        self._advance()
        self._waiting.extend((tokens, group) for tokens in lengths)
        self._admit()
        self._update_timer()
        await group.ended

    def fail(self, error: BaseException) -> None:
        """Let all sequences fail, as when the process dies."""
        self._advance()
        groups = {group for _, _, group in self._running} | {group for _, group in self._waiting}
        self._running.clear()
        self._waiting.clear()
        for group in groups:
            if not group.ended.done():
                group.ended.set_exception(error)
        self._update_timer()

    def totals(self) -> EngineTotals:
        """Return what it has done so far."""
        self._advance()
        return EngineTotals(busy_s=self._busy_s, tokens=self._tokens)

    def _advance(self) -> None:
        """Bring the clock of steps to the present, and end what has ended since then."""
        now = asyncio.get_running_loop().time()
        while self._running:
            count, last = len(self._running), self._running[-1][0]
            step_s = self._speed.step_seconds(count)
            seconds = (last - self._steps) * step_s
            if self._updated + seconds > now + ROUNDING_S:
                seconds = max(0.0, now - self._updated)
                self._pass(seconds, seconds / step_s * count)
                self._steps += seconds / step_s
                break
            self._pass(seconds, (last - self._steps) * count)
            self._steps = last
            self._end_until(last)
        self._updated = now

    def _pass(self, seconds: float, tokens: float) -> None:
        self._updated += seconds
        self._busy_s += seconds
        self._tokens += tokens

    def _end_until(self, last: float) -> None:
        """End the sequences whose last token is that of this step, and start others."""
        while self._running and self._running[-1][0] <= last:
            _, _, group = self._running.pop()
            group.left -= 1
            if not group.left and not group.ended.done():
                group.ended.set_result(None)
        if self._waiting:
            self._admit()

    def _admit(self) -> None:
        """Start sequences that wait, as far as there is room."""
        room = min(len(self._waiting), self._speed.max_sequences - len(self._running))
        for _ in range(room):
            tokens, group = self._waiting.popleft()
            self._started += 1
            end = (self._steps + tokens, self._started)
            group.last = max(group.last, end)
            self._running.append((*end, group))
        if room > 0:
            self._running.sort(key=_end_of, reverse=True)

    def _update_timer(self) -> None:
        """Set the timer again, once for all groups that come at the same time."""
        if not self._timer_is_late:
            self._timer_is_late = True
            asyncio.get_running_loop().call_soon(self._set_timer)

    def _set_timer(self) -> None:
        self._timer_is_late = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._running:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(self._next_end(), self._end_groups)

    def _next_end(self) -> float:
        """Return when the next group ends; while sequences wait, when the next one is started."""
        at, steps, count = self._updated, self._steps, len(self._running)
        for last, number, group in reversed(self._running):
            at += (last - steps) * self._speed.step_seconds(count)
            if self._waiting or group.last == (last, number):
                break
            steps = last
            count -= 1
        return at

    def _end_groups(self) -> None:
        self._advance()
        self._set_timer()


def _end_of(sequence: tuple[float, int, _Group]) -> tuple[float, int]:
    return sequence[:2]
