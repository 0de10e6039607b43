"""A generation engine in simulated time: continuous batching with one step for all sequences.

    seconds of an engine step with n sequences = step_s + n * sequence_s

`step_s` is what a step takes whatever the batch (reading the weights, launching kernels), and
`sequence_s` what each sequence adds. Both together are a throughput curve n / (step_s + n *
sequence_s), which rises and then saturates at 1 / sequence_s tokens per second; two measured points
determine it (`EngineSpeed.through`).
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from dataclasses import dataclass


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


class SimulatedEngine:
    """One engine. All running sequences advance together, so one clock of steps serves all.

    A sequence of N tokens that starts at step count S ends at S + N. So only the next end needs a
    timer, and a change of the batch changes the speed of the clock alone.
    """

    def __init__(self, speed: EngineSpeed) -> None:
        self._speed = speed
        self._steps = 0.0  # engine steps so far
        self._updated = asyncio.get_running_loop().time()
        self._running: list[tuple[float, int, asyncio.Future[None]]] = []  # a heap, by last step
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._started = 0
        self._timer: asyncio.TimerHandle | None = None
        self.busy_s = 0.0  # seconds with at least one sequence
        self.tokens = 0.0

    async def generate(self, tokens: int) -> None:
        """Wait until a sequence of this length has been sampled."""
        ended = asyncio.get_running_loop().create_future()
        self._advance()
        self._waiting.append((tokens, ended))
        self._admit()
        await ended

    def fail(self, error: BaseException) -> None:
        """Let all sequences fail, as when the process dies."""
        self._advance()
        sequences = [ended for _, _, ended in self._running]
        sequences += [ended for _, ended in self._waiting]
        self._running.clear()
        self._waiting.clear()
        for ended in sequences:
            if not ended.done():
                ended.set_exception(error)
        self._set_timer()

    def _advance(self) -> None:
        """Bring the clock of steps to the present."""
        now = asyncio.get_running_loop().time()
        passed, self._updated = now - self._updated, now
        if self._running:
            steps = passed / self._speed.step_seconds(len(self._running))
            self._steps += steps
            self.busy_s += passed
            self.tokens += steps * len(self._running)

    def _admit(self) -> None:
        """Start sequences that wait, as far as there is room."""
        while self._waiting and len(self._running) < self._speed.max_sequences:
            tokens, ended = self._waiting.popleft()
            self._started += 1
            heapq.heappush(self._running, (self._steps + tokens, self._started, ended))
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._running:
            left = max(0.0, self._running[0][0] - self._steps)
            seconds = left * self._speed.step_seconds(len(self._running))
            self._timer = asyncio.get_running_loop().call_later(seconds, self._end_next)

    def _end_next(self) -> None:
        """End the sequences whose last token was sampled now."""
        self._advance()
        last, _, ended = heapq.heappop(self._running)
        self._steps = last  # exactly, whatever the rounding
        if not ended.done():
            ended.set_result(None)
        while self._running and self._running[0][0] <= last:
            _, _, ended = heapq.heappop(self._running)
            if not ended.done():
                ended.set_result(None)
        self._admit()
