"""Parts in flight are scored again, and the controller's state comes back, after a death."""

from __future__ import annotations

import asyncio
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest

from rlsys.driver.faults import FaultLog
from rlsys.driver.ports import StepHandles
from rlsys.metrics import mean, values
from tests.support.killed_actors import FakeActor, supervised_fake
from workers.advantage_controller import AdvantageControllerClient, CreditFacts
from workers.response_filter import ChoiceFacts, ResponseFilterClient
from workers.reward_worker import RewardOutput, RewardWorkerClient
from workers.supervision import SupervisedActor


def supervision(
    kind: str, actors: list[FakeActor], faults: FaultLog | None = None
) -> SupervisedActor:
    """Return the supervision of the first actor, whose successors are the others."""
    return supervised_fake(lambda n: actors[n], kind=kind, name=f"the {kind}", faults=faults)


class Scorer:
    """A reward worker; the rewards of a part are a text."""

    def __init__(self, deaths: tuple[str, ...] = ()) -> None:
        self.parts: list[Any] = []
        self._deaths = list(deaths)

    def score(self, rollouts: Any, scores: Any = None) -> str:
        self.parts.append(rollouts)
        if rollouts == "bad":
            raise ValueError("bad part")
        return f"rewards of {rollouts}" + (f" and {scores}" if scores else "")

    def process_deaths(self) -> list[str]:
        deaths, self._deaths = self._deaths, []
        return deaths

    def metrics(self) -> dict:
        return {}


async def test_parts_in_flight_are_scored_again_and_none_is_lost():
    faults = FaultLog()
    actors = [FakeActor(Scorer(), {"score": [None, None, 0]}), FakeActor(Scorer())]
    client = RewardWorkerClient([supervision("reward_worker", actors, faults)])

    handles: list[Any] = [client.score(f"part {i}") for i in range(6)]  # pyright: ignore[reportArgumentType]
    assert await asyncio.gather(*handles) == [f"rewards of part {i}" for i in range(6)]
    assert faults.metrics()["faults/reward_worker"] == 1
    # The successor scores those that its predecessor had not finished.
    assert actors[0].target.parts == ["part 0", "part 1"]
    assert actors[1].target.parts == [f"part {i}" for i in range(2, 6)]


async def test_a_part_that_comes_during_the_restart_is_scored():
    actors = [FakeActor(Scorer(), {"score": [0]}), FakeActor(Scorer())]
    actor = supervision("reward_worker", actors)
    client = RewardWorkerClient([actor])
    first: Any = client.score("part 0")  # pyright: ignore[reportArgumentType]
    while actor.is_ready:
        await asyncio.sleep(0)
    second: Any = client.score("part 1")  # pyright: ignore[reportArgumentType]
    assert await second == "rewards of part 1"
    assert await first == "rewards of part 0"


async def test_scores_of_a_reward_model_are_used_again():
    class Model:
        asked = 0

        def scores(self, rollouts: Any) -> list[str]:
            self.asked += 1
            return [f"score of {rollouts}"]

    model, actors = Model(), [FakeActor(Scorer(), {"score": [0]}), FakeActor(Scorer())]
    client = RewardWorkerClient([supervision("reward_worker", actors)], model)  # pyright: ignore[reportArgumentType]
    rewards: Any = client.score("part")  # pyright: ignore[reportArgumentType]
    assert await rewards == "rewards of part and ['score of part']"
    assert model.asked == 1


async def test_an_error_of_a_reward_function_is_raised_at_once():
    faults = FaultLog()
    actors = [FakeActor(Scorer())]
    client = RewardWorkerClient([supervision("reward_worker", actors, faults)])
    handle: Any = client.score("bad")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="bad part"):
        await handle
    assert actors[0].target.parts == ["bad"]
    assert set(faults.metrics().values()) == {0}


async def test_a_handle_is_passed_on_as_the_reference_of_the_rewards():
    class Reference(asyncio.Future):
        def __reduce__(self) -> Any:
            return str, ("the newest reference",)

    reference = Reference()
    reference.set_result("rewards")

    client = RewardWorkerClient([supervision("reward_worker", [FakeActor(Scorer())])])
    handle: Any = client.score("part")  # pyright: ignore[reportArgumentType]
    handle._reference = reference
    assert pickle.loads(pickle.dumps(handle)) == "the newest reference"


async def test_deaths_of_reward_processes_are_faults_of_their_own_kind():
    faults = FaultLog()
    actors = [FakeActor(Scorer(("ended by SIGKILL", "ended by SIGKILL")))]
    client = RewardWorkerClient([supervision("reward_worker", actors, faults)])
    for _ in range(2):
        await client.metrics()
    assert faults.metrics()["faults/reward_process"] == 2
    assert faults.metrics()["faults/reward_worker"] == 0


async def test_lines_that_a_worker_is_about_to_return_at_the_end_are_kept(
    caplog: pytest.LogCaptureFixture,
):
    asked, answers = asyncio.Event(), asyncio.Event()

    class Output:
        lines = ("about to come",)

        async def remote(self) -> list[str]:
            lines, self.lines = self.lines, ()
            asked.set()
            await answers.wait()
            return list(lines)

    class Worker:
        output = Output()

    output = RewardOutput()
    with caplog.at_level(logging.INFO, logger="workers.reward_worker"):
        output.follow([Worker()])
        await asked.wait()
        ending = asyncio.create_task(output.finish())
        await asyncio.sleep(0)  # until it waits
        answers.set()
        await ending
    assert "about to come" in caplog.text


async def test_the_output_of_the_others_is_kept_while_one_worker_is_dead(
    caplog: pytest.LogCaptureFixture,
):
    class Printing:
        def __init__(self, line: str) -> None:
            self.lines = [line]

        def output(self) -> list[str]:
            lines, self.lines = self.lines, []
            return lines

    dead, alive = FakeActor(Printing("lost"), {"output": [0]}), FakeActor(Printing("kept"))
    output = RewardOutput()
    with caplog.at_level(logging.INFO):
        output.follow([dead, alive])
        await output.finish()
    assert [record.message for record in caplog.records] == ["kept"]


class Controller:
    """An advantage controller whose state is the sum of all steps."""

    def __init__(self) -> None:
        self.total = 0.0

    def credit(self, step: Any) -> tuple[str, str | None, CreditFacts]:
        self.total += step
        dropped = "dropped" if step > 5 else None
        facts = CreditFacts(
            has_dropped=dropped is not None,
            metrics={"advantage/baseline": mean(self.total)},
            state=self.state(),
        )
        return f"batch {step}", dropped, facts

    def state(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state(self, state: dict[str, Any]) -> None:
        self.total = state["total"]

    def write_rollouts(self, batch: str, path: str, dropped: Any, advantages: Any) -> None:
        Path(path).write_text(batch)


async def credited(client: AdvantageControllerClient, step: Any) -> tuple[float, str, Any]:
    """Return the metric, the batch and the dropped one of a step."""
    result = await client.credit(step)
    batch: Any = result.batch
    dropped: Any = result.dropped
    return (
        values(result.metrics)["advantage/baseline"],
        await batch,
        None if dropped is None else await dropped,
    )


async def test_the_state_of_the_last_step_comes_back():
    """Die while the third step is computed, and once more after it."""
    actors = [
        FakeActor(Controller(), {"credit": [None, None, 0]}),
        FakeActor(Controller(), {"state": [0]}),
        FakeActor(Controller()),
    ]
    client = AdvantageControllerClient(supervision("advantage_controller", actors))
    assert [await credited(client, step) for step in (1, 2, 7, 3)] == [
        (1.0, "batch 1", None),
        (3.0, "batch 2", None),
        (10.0, "batch 7", "dropped"),
        (13.0, "batch 3", None),
    ]
    assert await client.state() == {"total": 13.0}


async def test_a_state_from_a_checkpoint_survives_too():
    actors = [FakeActor(Controller(), {"credit": [0]}), FakeActor(Controller())]
    client = AdvantageControllerClient(supervision("advantage_controller", actors))
    await client.load_state({"total": 40.0})
    assert await credited(client, 2) == (42.0, "batch 2", None)


async def test_a_rollout_file_is_written_again(tmp_path: Path):
    actors = [FakeActor(Controller(), {"write_rollouts": [0]}), FakeActor(Controller())]
    client = AdvantageControllerClient(supervision("advantage_controller", actors))
    batch: Any = "batch"
    await client.write_rollouts(batch, tmp_path / "step")
    assert (tmp_path / "step").read_text() == "batch"


async def test_an_error_of_an_estimator_is_raised_at_once():
    class Failing(Controller):
        def credit(self, step: Any) -> Any:
            raise ZeroDivisionError("in a plug-in")

    faults = FaultLog()
    actor = FakeActor(Failing())
    client = AdvantageControllerClient(supervision("advantage_controller", [actor], faults))
    with pytest.raises(ZeroDivisionError):
        await client.credit(StepHandles(rollouts=(), rewards=()))
    assert len(actor.calls) == 1
    assert set(faults.metrics().values()) == {0}


async def test_responses_are_chosen_again():
    class Filter:
        def choose(self, rollouts: Any, rewards: Any) -> Any:
            return "batch", "sampled", ChoiceFacts(responses=2, metrics={})

    actors = [FakeActor(Filter(), {"choose": [0]}), FakeActor(Filter())]
    client = ResponseFilterClient(supervision("response_filter", actors))
    kept = await client.choose([], [])
    batch: Any = kept.batch
    assert (kept.responses, await batch) == (2, "batch")
