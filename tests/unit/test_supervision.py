"""Actors that die are restarted; errors of their code are not deaths."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray._private import worker
from ray.exceptions import ActorDiedError, RayTaskError

from rlsys.driver.faults import FaultLog
from rlsys.run.fault_events import Fault
from tests.support.killed_actors import FakeActor, death, supervised_fake
from workers.cluster import _log_what_ray_reports
from workers.death_evidence import describe_death
from workers.supervision import (
    ActorPool,
    RestartLimits,
    SupervisedActor,
    TooManyDeathsError,
    is_death,
    supervised,
)


class Counter:
    """The state of an actor: the number of its calls."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, number: int) -> int:
        self.count += number
        return self.count

    def fail(self) -> None:
        raise ValueError("bad input")


def dying(*fates: int | None) -> FakeActor:
    """Return a counter that dies in its calls of `add` where a fate is 0."""
    return FakeActor(Counter(), {"add": list(fates)})


async def test_a_call_is_repeated_by_the_successor_after_it_was_prepared():
    actors = [dying(None, 0), dying()]
    actor = supervised_fake(lambda number: actors[number])

    async def restore(successor: Any) -> None:
        await successor.add.remote(100)

    actor.prepare_with(restore)
    assert await actor.call("add", 1) == 1
    assert await actor.call("add", 2) == 102
    assert [arguments for _, arguments in actors[1].calls] == [(100,), (2,)]


async def test_all_calls_in_flight_share_one_restart():
    faults = FaultLog()
    actors = [dying(0), dying()]
    actor = supervised_fake(lambda number: actors[number], faults=faults)

    results = await asyncio.gather(*(actor.call("add", 1) for _ in range(5)))
    assert sorted(results) == [1, 2, 3, 4, 5]
    assert faults.metrics()["faults/generation_worker"] == 1


async def test_an_error_of_the_code_is_raised_once_and_restarts_nothing():
    faults = FaultLog()
    actors = [FakeActor(Counter())]
    actor = supervised_fake(lambda number: actors[number], faults=faults)

    with pytest.raises(ValueError, match="bad input"):
        await actor.call("fail")
    assert len(actors[0].calls) == 1
    assert set(faults.metrics().values()) == {0}
    assert await actor.call("add", 1) == 1


def test_the_death_of_another_actor_that_a_call_reports_is_not_its_own():
    """As where a reward model dies: the reward worker, which waited for it, lives."""
    nested = RayTaskError("score", "traceback", ActorDiedError())
    assert not is_death(nested)
    assert not is_death(nested.as_instanceof_cause())
    assert is_death(ActorDiedError())


async def test_the_third_death_in_one_step_ends_the_run_with_the_evidence():
    faults = FaultLog()
    seen: list[Fault] = []
    faults.listen(seen.append)
    faults.enter(7, "generate")
    started = []

    def start(number: int) -> FakeActor:
        started.append(number)
        return dying(0)

    actor = supervised_fake(start, faults=faults)
    with pytest.raises(TooManyDeathsError) as caught:
        await actor.call("add", 1)

    assert started == [0, 1, 2]
    lines = str(caught.value).splitlines()
    assert lines[-1] == (
        "generation worker 0 died 3 times in step 7 in the same way: its process died"
    )
    assert [fault.action for fault in seen] == ["it is restarted"] * 2 + ["the run ends"]
    with pytest.raises(TooManyDeathsError):
        await actor.ready()


async def test_deaths_in_different_steps_or_of_different_kinds_do_not_end_the_run():
    faults = FaultLog()
    endings = ["its process died", "its process died", "killed by ray.kill", "its process died"]

    class Ending(FakeActor):
        def __init__(self, number: int) -> None:
            super().__init__(Counter(), {})
            self.number = number

        def fate_of(self, method: str) -> int | None:
            return None

    def start(number: int) -> FakeActor:
        return Ending(number)

    actor = supervised_fake(start, faults=faults)
    for step, ending in zip((1, 1, 1, 2), endings, strict=True):
        faults.enter(step, "generate")
        actor.died(actor.present, death(ending))
        await actor.ready()
    assert faults.metrics()["faults/generation_worker"] == 4


async def test_all_deaths_of_one_actor_are_limited():
    faults = FaultLog()
    limits = RestartLimits(restarts=4, first_pause_s=0.0)
    actor = supervised_fake(lambda number: dying(), faults=faults, limits=limits)
    for step in range(4):
        faults.enter(step, "update")
        actor.died(actor.present, death())
        await actor.ready()

    faults.enter(4, "update")
    actor.died(actor.present, death())
    with pytest.raises(TooManyDeathsError, match="died 5 times in this run"):
        await actor.ready()


def test_pauses_grow_to_a_limit_and_start_anew_after_a_quiet_time(monkeypatch: pytest.MonkeyPatch):
    limits = RestartLimits(first_pause_s=1.0, longest_pause_s=5.0, quiet_s=100.0, same_place=99)
    actor = supervised_fake(lambda number: dying(), limits=limits)
    times = iter((1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0, 150.0, 150.0))
    monkeypatch.setattr("workers.supervision.time.monotonic", lambda: next(times))
    pauses = []
    for _ in range(5):
        actor._record(death(), "it is restarted")
        pauses.append(actor._pause_s())
    assert pauses == [1.0, 2.0, 4.0, 5.0, 1.0]


async def test_a_constructor_that_raises_is_not_tried_again():
    """It is an error of the code, such as a plug-in that is missing on a node."""
    attempts = 0

    async def restart() -> Any:
        nonlocal attempts
        attempts += 1
        raise ActorDiedError(RayTaskError("__init__", "ImportError: no plugin", ImportError("no")))

    actor = SupervisedActor(
        "the reward worker", dying(0), kind="reward_worker", restart=restart, faults=FaultLog()
    )
    actor._limits = RestartLimits(first_pause_s=0.0)
    with pytest.raises(ActorDiedError, match="no plugin"):
        await actor.call("add", 1)
    assert attempts == 1


async def test_an_actor_without_supervision_raises_its_death():
    with pytest.raises(ActorDiedError):
        await supervised(dying(0)).call("add", 1)


async def test_a_pool_asks_those_that_live_and_restarts_the_others():
    actors = {0: [dying(0), dying()], 1: [dying()]}
    pool = ActorPool([supervised_fake(lambda number, i=i: actors[i][number]) for i in actors])

    answers = await pool.ask("add", 1)
    assert [(member, answer) for member, answer in answers] == [(pool.members[1], 1)]
    await pool.members[0].ready()
    assert [answer for _, answer in await pool.ask("add", 1)] == [1, 2]


async def test_a_pool_of_one_waits_for_the_restart():
    actors = [dying(0), dying()]
    pool = ActorPool([supervised_fake(lambda number: actors[number])])
    assert [answer for _, answer in await pool.ask("add", 1)] == [1]


def test_equal_deaths_of_different_processes_have_equal_reasons():
    text = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: GenerationWorker\n"
        "\tactor_id: {id}\n\tpid: {pid}\n\tnamespace: x\n\tip: 10.0.0.{pid}\n"
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR "
        "Worker exit detail: Worker unexpectedly exits with a connection error code 2. End of file."
        " Some common causes include: (1) the process was killed by the OOM killer due to high "
        "memory usage, (2) ray stop --force was called, or (3) the worker crashed."
    )
    first, second = (describe_death(death(text.format(id="ab" * i, pid=i))) for i in (3, 4))
    assert first.reason == second.reason == "its process died"
    assert "connection error code 2" in first.evidence


def test_what_ray_reports_goes_to_the_log_and_not_over_the_display(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: Any
):
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)
    _log_what_ray_reports()
    report = {"lines": ["A worker died."], "pid": "raylet", "is_err": False}
    with caplog.at_level("INFO", logger="workers.cluster"):
        worker.print_to_stdstream(report, ignore_prefix=False)
    assert caplog.messages == ["ray: A worker died."]
    assert capsys.readouterr().out == ""
