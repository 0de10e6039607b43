"""The groups of asynchronous training between the stream of prompts and the trainer.

    prompts --draw--> waiting --start--> running --finish--> ready --take--> trained
                         ^                  |                  |
                         +---- its worker died, or the group is too old and is sampled again

Two rules bound the age of a group, the number of weight versions by which the trained policy is
ahead of the weights that sampled it (`trainer.max_staleness`, K):

    start   While version v is the newest, at most (v + K + 1) * P groups of the run have been
            trained, are ready or are running. So the groups that are there when v is published
            suffice for K further steps, and a group that is trained in its turn is at most K old.
    take    Each step takes the P ready groups whose prompts came first in the stream. A group that
            others have overtaken may be older than K by then: `trainer.on_stale` decides.

With K = 0 the P groups of a step are those that are started after the step before, whatever the
order in which they finish, so the batches are those of the synchronous loop.

Dynamic sampling needs no rounds here. A group without a learning signal is not ready: another
prompt takes its place, up to (max_rounds - 1) * P times for a step. Those that are still missing
then fill the batch, and are masked out of the loss.

Which groups overtake others depends on the durations, and so do the batches of K > 0. All else is
fixed: prompts start in the order of the stream, and their seeds depend on it alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlsys.config.trainer import OnStale
from rlsys.data.batches import PromptBatch
from rlsys.driver.ports import PromptSource
from rlsys.driver.sampling import ScoredGroup


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """A prompt on its way from the stream to the trainer."""

    number: int  # in the order of the stream
    prompt: PromptBatch  # of one prompt
    position: int  # in its batch of the stream
    attempt: int = 0  # how many groups of it were too old

    @property
    def group_id(self) -> int:
        return int(self.prompt.group_ids[0])

    @property
    def seeded_as(self) -> tuple[int, int]:
        """The batch of the stream and the attempt, which decide the seed."""
        return self.prompt.batch_id, self.attempt


@dataclass(frozen=True, kw_only=True)
class FinishedGroup:
    """A group with its rewards."""

    ticket: Ticket
    group: ScoredGroup
    weight_version: int  # that sampled it
    has_signal: bool = True  # False: dynamic sampling does not keep it


@dataclass(frozen=True, kw_only=True)
class TakenGroups:
    """The groups of one step."""

    groups: Sequence[FinishedGroup]  # in the order of the stream; the fillers last
    stale: Sequence[FinishedGroup]  # that were too old, since the step before
    replaced: Sequence[FinishedGroup]  # without a learning signal, since the step before
    fillers: int  # groups without a learning signal that fill the batch
    ready: int  # groups that stay ready
    running: int


@dataclass(frozen=True, kw_only=True)
class QueueLimits:
    """What bounds a queue: the fields of `trainer` of these names."""

    steps: int
    prompts_per_step: int
    max_staleness: int
    on_stale: OnStale
    max_rounds: int = 1  # of `algorithm.dynamic_sampling`


@dataclass
class _Groups:
    """All groups that were drawn and not trained, by where they are."""

    waiting: list[tuple[int, Ticket]] = field(default_factory=list)  # a heap
    running: dict[int, Ticket] = field(default_factory=dict)  # by number
    ready: dict[int, FinishedGroup] = field(default_factory=dict)  # by number
    equal: dict[int, FinishedGroup] = field(default_factory=dict)  # the same, without a signal
    stale: list[FinishedGroup] = field(default_factory=list)  # for the next step's metrics

    def push(self, ticket: Ticket) -> None:
        heapq.heappush(self.waiting, (ticket.number, ticket))

    @property
    def unfinished(self) -> list[Ticket]:
        """Those whose prompts must come again after a resume, in the order of the stream."""
        tickets = [ticket for _, ticket in self.waiting]
        tickets += self.running.values()
        tickets += [finished.ticket for finished in (*self.ready.values(), *self.equal.values())]
        return sorted(tickets, key=lambda ticket: ticket.number)


class GroupQueue:
    """The queue of one run. It knows no time: its owner waits for workers and rewards."""

    def __init__(self, source: PromptSource, limits: QueueLimits) -> None:
        self._source = source
        self._limits = limits
        self._groups = _Groups()
        self._drawn = 0
        self._taken = 0  # steps
        self._first_version = self._version = 0

    # What belongs to a checkpoint

    def state(self) -> dict[str, Any]:
        """Return the position in the stream; prompts that are not trained yet come again."""
        return self._source.state([ticket.group_id for ticket in self._groups.unfinished])

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned, with groups that are all sampled again."""
        self._source.load_state(state)
        self._groups = _Groups()

    # Sampling

    def begin(self, version: int) -> None:
        """Begin with these weights, before any group is started."""
        self._first_version = self._version = version

    def advance(self, version: int) -> None:
        """Note that everything that is started from now on is sampled with these weights."""
        assert version == self._version + 1, "versions come one after the other"
        self._version = version
        for kind in (self._groups.ready, self._groups.equal):
            for number, finished in list(kind.items()):
                if self._is_stale(finished.weight_version):
                    del kind[number]
                    self._refuse(finished)

    @property
    def room(self) -> int:
        """The number of groups that may be started now."""
        limits = self._limits
        steps = min(self._version + limits.max_staleness + 1, limits.steps) - self._first_version
        started = self._taken * limits.prompts_per_step + self.running + self.ready
        # A group without a signal is replaced, as long as there are rounds.
        fillers = max(0, len(self._groups.equal) - self._replaceable)
        return max(0, steps * limits.prompts_per_step - started - fillers)

    @property
    def _replaceable(self) -> int:
        """The number of groups without a signal that are replaced for one step."""
        return (self._limits.max_rounds - 1) * self._limits.prompts_per_step

    @property
    def running(self) -> int:
        """The number of groups that are being sampled or scored."""
        return len(self._groups.running)

    @property
    def ready(self) -> int:
        """The number of groups that the trainer may take."""
        return len(self._groups.ready)

    def start(self, most: int) -> list[Ticket]:
        """Return up to `most` prompts to sample together now: those that come first.

        They have one seed. Empty: none may be started.
        """
        room, groups = min(most, self.room), self._groups
        if room and not groups.waiting:
            self._draw()

        started: list[Ticket] = []
        while len(started) < room and groups.waiting:
            _, first = groups.waiting[0]
            if started and first.seeded_as != started[0].seeded_as:
                break
            heapq.heappop(groups.waiting)
            groups.running[first.number] = first
            started.append(first)
        return started

    def give_back(self, tickets: Iterable[Ticket]) -> None:
        """Let prompts wait again, whose worker died before it had answered them."""
        for ticket in tickets:
            del self._groups.running[ticket.number]
            self._groups.push(ticket)

    def finish(self, finished: FinishedGroup) -> None:
        """Add a group whose rewards are there."""
        del self._groups.running[finished.ticket.number]
        if self._is_stale(finished.weight_version):
            self._refuse(finished)
        else:
            kind = self._groups.ready if finished.has_signal else self._groups.equal
            kind[finished.ticket.number] = finished

    # Training

    @property
    def is_full(self) -> bool:
        """Whether there are enough groups for a step."""
        fillers = max(0, len(self._groups.equal) - self._replaceable)
        return self.ready + fillers >= self._limits.prompts_per_step

    def take(self) -> TakenGroups:
        """Return the groups of the next step, which is trained from the newest weights."""
        assert self.is_full, "a step has all of its groups"
        groups, size = self._groups, self._limits.prompts_per_step
        taken = [groups.ready.pop(number) for number in sorted(groups.ready)[:size]]
        fillers = size - len(taken)
        equal = [groups.equal[number] for number in sorted(groups.equal)]
        stale, groups.stale, groups.equal = groups.stale, [], {}
        self._taken += 1
        return TakenGroups(
            groups=[*taken, *equal[:fillers]],
            stale=stale,
            replaced=equal[fillers:],
            fillers=fillers,
            ready=self.ready,
            running=self.running,
        )

    def age(self, finished: FinishedGroup) -> int:
        """Return by how many versions the newest weights are ahead of those of a group."""
        return self._version - finished.weight_version

    def _draw(self) -> None:
        """Let the prompts of the next batch of the stream wait."""
        batch = self._source.next_batch()
        for position in range(len(batch)):
            one = PromptBatch(
                batch_id=batch.batch_id,
                prompts=batch.prompts[position : position + 1],
                group_ids=batch.group_ids[position : position + 1],
            )
            self._groups.push(Ticket(number=self._drawn, prompt=one, position=position))
            self._drawn += 1

    def _is_stale(self, weight_version: int) -> bool:
        """Return whether a group is too old for the next step."""
        limits = self._limits
        age = self._version - weight_version
        return limits.on_stale != "train" and age > limits.max_staleness

    def _refuse(self, finished: FinishedGroup) -> None:
        """Drop a group that is too old, or let its prompt wait again."""
        self._groups.stale.append(finished)
        if self._limits.on_stale == "resample":
            ticket = finished.ticket
            self._groups.push(replace(ticket, attempt=ticket.attempt + 1))
