"""The watchdog with a clock that runs only when somebody waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from rlsys.driver.watchdog import PhaseTimeoutError, Watchdog


class Clock:
    """A clock that `sleep` advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)
        self.now += seconds


def watchdog(timeout_s: float | None = None) -> tuple[Watchdog, Clock]:
    clock = Clock()
    return Watchdog(timeout_s, clock=clock, sleep=clock.sleep), clock


async def forever() -> None:
    await asyncio.Event().wait()


async def test_a_phase_that_hangs_is_cancelled_after_its_evidence_was_collected():
    dog, clock = watchdog(30.0)
    events = []

    async def collect() -> str:
        events.append("collected")
        return "the stacks are in a file"

    async def work() -> None:
        try:
            dog.on_phase(4, "update")
            await forever()
        finally:
            events.append("cancelled")

    dog.collect_evidence = collect
    with pytest.raises(PhaseTimeoutError) as caught:
        await dog.guard(work())
    assert events == ["collected", "cancelled"]
    assert clock.now == 30.0
    assert str(caught.value) == (
        "update of step 4 hangs: it has taken 30 s, and its limit is 30 s "
        "(raise trainer.phase_timeout_s if it was only slow); the stacks are in a file"
    )


def test_the_start_of_the_actors_is_no_phase_of_a_step():
    dog, _ = watchdog(30.0)
    assert dog.limit("update") == 30.0
    assert dog.limit("start") == 10800.0


def test_the_time_before_a_start_of_the_actors_counts_for_no_limit():
    dog, clock = watchdog()
    clock.now = 50.0  # until Ray runs
    dog.begin_start(0)
    assert dog.limit("start") == 10800.0

    clock.now += 5.0
    dog.on_phase(1, "update")
    clock.now += 700.0  # a hang, and the wait for resources
    dog.begin_start(1)
    assert dog.limit("start") == 600.0
    assert dog.limit("update") == 10800.0


async def test_the_hang_is_ended_although_the_evidence_cannot_be_collected():
    dog, _ = watchdog(30.0)

    async def fail() -> str:
        raise OSError("no disk")

    dog.collect_evidence = fail
    dog.on_phase(1, "update")
    with pytest.raises(PhaseTimeoutError, match="could not be collected \\(OSError\\)"):
        await dog.guard(forever())


async def test_a_phase_after_a_longer_one_has_its_own_limit():
    dog, clock = watchdog()
    dog.learn([{"time/update": 1.0}])

    async def work() -> None:
        dog.on_phase(3, "evaluate")
        while clock.now < 100.0:
            await asyncio.sleep(0)
        dog.on_phase(3, "update")
        await forever()

    with pytest.raises(PhaseTimeoutError, match="update of step 3 hangs: it has taken 600 s"):
        await dog.guard(work())
    assert 700.0 <= clock.now <= 702.0


async def test_many_phases_may_take_longer_together():
    dog, clock = watchdog(30.0)

    async def work() -> str:
        for step in range(10):
            dog.on_phase(step, "update")
            clock.now += 29.0
            await asyncio.sleep(0)
        return "done"

    assert await dog.guard(work()) == "done"
    assert clock.now >= 290.0


@pytest.mark.parametrize(
    ("seconds", "limit"), [(1.0, 600.0), (60.0, 600.0), (100.0, 1000.0), (5000.0, 50000.0)]
)
def test_the_limit_is_ten_times_the_longest_measured_time_with_a_floor(
    seconds: float, limit: float
):
    dog, clock = watchdog()
    assert dog.limit("update") == 10800.0
    for taken in (seconds, seconds / 2):
        dog.on_phase(1, "update")
        clock.now += taken
        dog.on_step(1, {})
    assert dog.limit("update") == limit
    assert dog.limit("evaluate") == 10800.0


def test_the_times_before_a_resume_count():
    dog, _ = watchdog()
    dog.learn([{"time/update": 90.0, "reward/mean": 1.0}, {"time/update": 80.0}])
    assert dog.limit("update") == 900.0


async def test_an_error_and_a_cancellation_pass_through():
    dog, _ = watchdog(1e9)

    async def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await dog.guard(fail())

    ended: list[str] = []

    async def work() -> None:
        try:
            await forever()
        finally:
            ended.append("cancelled")

    task = asyncio.create_task(_guard_by_real_clock(work))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == ["cancelled"]


async def _guard_by_real_clock(work: Callable[[], Awaitable[None]]) -> None:
    await Watchdog(1e9).guard(work())


async def test_a_checkpoint_in_the_background_ends_no_phase():
    """The update began at 0 s and may take 30 s, whatever is sealed meanwhile."""
    dog, clock = watchdog(30.0)

    async def work() -> None:
        dog.on_phase(4, "update")
        await clock.sleep(20.0)
        dog.on_checkpoint(2, "step_000002")
        await forever()

    with pytest.raises(PhaseTimeoutError, match="update of step 4 hangs"):
        await dog.guard(work())
    assert clock.now < 40.0


def test_the_wait_for_a_checkpoint_is_limited_by_the_time_that_one_takes():
    """The waits so far were short, but the last checkpoint has nothing to hide behind."""
    dog, clock = watchdog()
    dog.on_phase(2, "checkpoint_write")
    clock.now += 1.0
    dog.on_phase(4, "checkpoint")
    assert dog.limit("checkpoint_write") == 600.0
    dog.on_step(5, {"time/checkpoint_write": 90.0})
    assert dog.limit("checkpoint_write") == 900.0
