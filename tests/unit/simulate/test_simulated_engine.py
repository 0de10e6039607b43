"""The simulated engine against arithmetic."""

from __future__ import annotations

import asyncio

import pytest

from rlsys.simulate.engine import EngineSpeed, EngineTotals, SimulatedEngine
from rlsys.simulate.simulated_time import SimulatedLoop, simulate

SPEED = EngineSpeed(step_s=1.0, sequence_s=0.5, max_sequences=2)


def ends_of(lengths: list[int], starts: list[float]) -> list[float]:
    """Return when sequences end that start at these times."""

    async def work(loop: SimulatedLoop) -> list[float]:
        engine = SimulatedEngine(SPEED)

        async def one(tokens: int, start: float) -> float:
            await asyncio.sleep(start)
            await engine.generate([tokens])
            return loop.now

        return list(await asyncio.gather(*map(one, lengths, starts)))

    return simulate(work)


def test_a_sequence_alone_takes_its_tokens_times_a_step():
    assert ends_of([4], [0.0]) == pytest.approx([6.0])  # 4 steps of 1.5 s


def test_sequences_advance_together_and_speed_up_when_one_ends():
    # Two steps of 2 s, then two of 1.5 s.
    assert ends_of([2, 4], [0.0, 0.0]) == pytest.approx([4.0, 7.0])


def test_a_sequence_that_comes_later_slows_down_the_first():
    # The first has 2 of its 4 tokens at 3 s, and gets the others at 2 s each.
    assert ends_of([4, 4], [0.0, 3.0]) == pytest.approx([7.0, 10.0])


def test_what_is_above_the_limit_waits():
    # The third starts at 4 s, when the first ends: two steps of 2 s for it and the second.
    assert ends_of([2, 4, 2], [0.0, 0.0, 0.0]) == pytest.approx([4.0, 8.0, 8.0])


def test_a_group_ends_with_its_last_sequence_beside_others():
    """Three sequences: steps of 2.5 s until 1, of 2 s until 3, and of 1.5 s until 6."""
    speed = EngineSpeed(step_s=1.0, sequence_s=0.5, max_sequences=3)

    async def work(loop: SimulatedLoop) -> tuple[list[float], list[EngineTotals]]:
        engine = SimulatedEngine(speed)
        totals = []

        async def one(lengths: list[int]) -> float:
            await engine.generate(lengths)
            return loop.now

        async def look() -> float:
            await asyncio.sleep(3.5)
            totals.append(engine.totals())
            return loop.now

        ends = await asyncio.gather(one([3, 1]), one([6]), look())
        totals.append(engine.totals())
        return list(ends), totals

    ends, (early, late) = simulate(work)
    assert ends == pytest.approx([2.5 + 2 * 2.0, 2.5 + 2 * 2.0 + 3 * 1.5, 3.5])
    # 1.5 steps: one of three sequences, and the half of one of two.
    assert (early.busy_s, early.tokens) == pytest.approx((3.5, 4.0))
    assert (late.busy_s, late.tokens) == pytest.approx((11.0, 10.0))


def test_a_group_with_more_sequences_than_may_run():
    """Two at a time: 1 and 4 tokens, then 2 beside the 4, then 1."""

    async def work(loop: SimulatedLoop) -> float:
        await SimulatedEngine(SPEED).generate([1, 4, 2, 1])
        return loop.now

    # Steps 1 to 4 have two sequences: 1, then 2 and 1 beside the 4.
    assert simulate(work) == pytest.approx(4 * 2.0)


def test_a_death_ends_all_sequences():
    async def work(loop: SimulatedLoop) -> tuple[list[object], float]:
        engine = SimulatedEngine(SPEED)
        three = [asyncio.ensure_future(engine.generate([100])) for _ in range(3)]
        await asyncio.sleep(5.0)
        engine.fail(RuntimeError("dead"))
        found = await asyncio.gather(*three, return_exceptions=True)
        await engine.generate([2])  # restarted, it works as before
        return [str(one) for one in found], loop.now

    assert simulate(work) == (["dead"] * 3, pytest.approx(8.0))


def test_two_points_determine_the_speed():
    speed = EngineSpeed.through((1, 100.0), (101, 5050.0))  # steps of 0.01 and 0.02 s
    assert speed.step_s == pytest.approx(0.0099)
    assert speed.sequence_s == pytest.approx(0.0001)
    assert EngineSpeed.through((101, 5050.0), (1, 100.0)) == speed
    assert speed.most_tokens_per_s == pytest.approx(256 / (0.0099 + 0.0256))


@pytest.mark.parametrize("second", [(10, 2000.0), (10, 50.0), (1, 100.0)])
def test_points_of_no_engine_are_refused(second: tuple[int, float]):
    with pytest.raises(ValueError, match="no step time"):
        EngineSpeed.through((1, 100.0), second)
