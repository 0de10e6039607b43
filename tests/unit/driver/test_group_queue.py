"""The queue of groups alone: random events against what must hold after each."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.config.trainer import OnStale
from rlsys.data.batches import Prompt, RewardBatch
from rlsys.data.prompt_stream import PromptStream
from rlsys.driver.group_queue import FinishedGroup, GroupQueue, QueueLimits, TakenGroups, Ticket
from rlsys.driver.ports import Handle, RolloutPart
from rlsys.driver.sampling import ScoredGroup

NOTHING: Any = None


def new_queue(limits: QueueLimits, state: dict[str, Any] | None = None) -> GroupQueue:
    prompt = Prompt(problem_id="0", token_ids=(0,), text="", problem="", ground_truth="")
    stream = PromptStream(
        (prompt,) * 7, prompts_per_step=limits.prompts_per_step, seed=0, shuffle=False
    )
    queue = GroupQueue(stream, limits)
    if state is not None:
        queue.load_state(state)
    return queue


def finished(ticket: Ticket, version: int, has_signal: bool = True) -> FinishedGroup:
    rewards: Handle[RewardBatch] = NOTHING
    part = RolloutPart(prompt_index=ticket.position, num_response_tokens=1, rollouts=NOTHING)
    return FinishedGroup(
        ticket=ticket,
        group=ScoredGroup(part=part, rewards=rewards),
        weight_version=version,
        has_signal=has_signal,
    )


class RandomRun:
    """A run whose workers and trainer do one thing after the other, in a random order."""

    def __init__(self, limits: QueueLimits, chance: random.Random, signal: float) -> None:
        self._limits = limits
        self._chance = chance
        self._signal = signal
        self.queue = new_queue(limits)
        self.version = 0
        self._calls: list[tuple[int, list[Ticket]]] = []  # a call of a worker, with its version
        self.trained: list[int] = []
        self.left_out: list[int] = []  # dropped as too old, or replaced
        self.in_training: TakenGroups | None = None

    def go(self) -> None:
        """Train all steps."""
        self.queue.begin(0)
        for _ in range(2000):
            if self.version == self._limits.steps:
                return
            possible = [*([self._start] if self.queue.room else ()), *([self._work] * 3)]
            possible += (
                [self._train, self._resume] if self._chance.random() < 0.3 else [self._train]
            )
            self._chance.choice(possible)()
            self._check()
        raise AssertionError("the run stands still")

    def _start(self) -> None:
        tickets = self.queue.start(self._chance.randint(1, 3))
        assert tickets, "there is room"
        assert len({ticket.seeded_as for ticket in tickets}) == 1
        self._calls.append((self.version, tickets))

    def _work(self) -> None:
        """Let a group end, or a worker die."""
        if not self._calls:
            return
        index = self._chance.randrange(len(self._calls))
        version, tickets = self._calls[index]
        if self._chance.random() < 0.1:
            self.queue.give_back(tickets)
            tickets.clear()
        else:
            ticket = tickets.pop(self._chance.randrange(len(tickets)))
            has_signal = self._limits.max_rounds == 1 or self._chance.random() < self._signal
            self.queue.finish(finished(ticket, version, has_signal))
        if not tickets:
            del self._calls[index]

    def _train(self) -> None:
        """Begin a step where there are enough groups, or end the one that was begun."""
        if self.in_training is not None:
            self.trained += [group.ticket.group_id for group in self.in_training.groups]
            self.in_training = None
            self.version += 1
            self.queue.advance(self.version)
        elif self.queue.is_full:
            taken = self.in_training = self.queue.take()
            self._check_taken(taken)
            if self._limits.on_stale == "drop":
                self.left_out += [group.ticket.group_id for group in taken.stale]
            self.left_out += [group.ticket.group_id for group in taken.replaced]
        elif not self._calls:
            assert self.queue.room, "nothing runs, nothing may start, and the step has no groups"

    def _resume(self) -> None:
        """Between two steps the process ends, and another one continues from the checkpoint."""
        if self.in_training is not None:
            return
        before = self.queue.state()
        self.queue = new_queue(self._limits, before)
        assert self.queue.state() == before
        self.queue.begin(self.version)
        self._calls.clear()

    def _check_taken(self, taken: TakenGroups) -> None:
        limits = self._limits
        assert len(taken.groups) == limits.prompts_per_step
        ages = [self.queue.age(group) for group in taken.groups]
        assert min(ages) >= 0
        if limits.on_stale != "train":
            assert max(ages) <= limits.max_staleness
        assert sum(not group.has_signal for group in taken.groups) == taken.fillers

    def _check(self) -> None:
        limits = self._limits
        known = self.queue.running + self.queue.ready
        assert known <= (limits.max_staleness + 1) * limits.prompts_per_step
        assert self.queue.running == sum(len(tickets) for _, tickets in self._calls)
        assert len(set(self.trained)) == len(self.trained), "a group was trained twice"
        assert not set(self.trained) & set(self.left_out)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    prompts_per_step=st.integers(1, 4),
    max_staleness=st.integers(0, 3),
    on_stale=st.sampled_from(["drop", "resample", "train"]),
    max_rounds=st.integers(1, 3),
    signal=st.sampled_from([0.0, 0.3, 0.9]),
)
def test_random_runs_end_and_train_each_group_once(
    seed: int,
    prompts_per_step: int,
    max_staleness: int,
    on_stale: OnStale,
    max_rounds: int,
    signal: float,
) -> None:
    limits = QueueLimits(
        steps=6,
        prompts_per_step=prompts_per_step,
        max_staleness=max_staleness,
        on_stale=on_stale,
        max_rounds=max_rounds,
    )
    run = RandomRun(limits, random.Random(seed), signal)
    run.go()
    assert len(run.trained) == 6 * prompts_per_step
    if on_stale != "drop" and max_rounds == 1:
        # Nothing is left out: what was not trained is in the checkpoint, and comes again.
        returned = run.queue.state()["returned"]
        drawn = run.queue.state()["prompts_taken"]
        assert sorted([*run.trained, *returned]) == list(range(drawn))
