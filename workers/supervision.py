"""Actors that are restarted when their process dies.

    group or client --run(attempt)--> SupervisedActor --> actor
                                        |        ^
                       it died: record  v        | restart, then `prepare` (weights, state)
                                     FaultLog    +-- Cluster.restart: same bundle, same arguments

Only the death of the process is repaired. An exception that the actor's code raises is not a death:
it reaches the caller as it would without supervision.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.exceptions import NodeDiedError, RayActorError, RayTaskError, WorkerCrashedError

from rlsys.driver.faults import FaultLog
from workers.death_evidence import describe_death

T = TypeVar("T")

# Deaths of one actor in one step, for the same reason, that end the run.
SAME_PLACE = 3
# Restarts of one actor in a run, of whatever reason.
MOST_RESTARTS = 50
# The pause before a restart doubles with each death, and starts anew after a quiet time.
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
QUIET_S = 600.0


class TooManyDeathsError(RuntimeError):
    """An actor that died too often to be restarted again.

    The message ends with a line that says what died how often, below the evidence.
    """


@dataclass(frozen=True, kw_only=True)
class RestartLimits:
    """How often and how fast one actor is restarted."""

    same_place: int = SAME_PLACE
    restarts: int = MOST_RESTARTS
    first_pause_s: float = FIRST_PAUSE_S
    longest_pause_s: float = LONGEST_PAUSE_S
    quiet_s: float = QUIET_S


@dataclass(frozen=True, kw_only=True)
class _Death:
    step: int
    reason: str
    time: float


def is_death(error: BaseException) -> bool:
    """Return whether a call failed because the process of its actor is gone.

    An error that the actor's code raised is none, even if its cause is the death of another actor.
    """
    if isinstance(error, RayTaskError):
        return False
    return isinstance(error, RayActorError | WorkerCrashedError | NodeDiedError)


class SupervisedActor:
    """One actor, and its successors after deaths."""

    def __init__(
        self,
        name: str,
        actor: Any,
        *,
        kind: str,
        restart: Callable[[], Awaitable[Any]],
        faults: FaultLog,
        limits: RestartLimits | None = None,
    ) -> None:
        """Supervise `actor`.

        Args:
            name: such as "generation worker 1".
            kind: of its faults, see `FAULT_KINDS`.
            restart: starts a successor in the same place and waits until it is constructed.
        """
        self.name = name
        self._actor = actor
        self._kind = kind
        self._restart = restart
        self._faults = faults
        self._limits = limits or RestartLimits()
        self._prepare: Callable[[Any], Awaitable[None]] | None = None
        self._deaths: list[_Death] = []
        self._restarting: asyncio.Task[None] | None = None

    @property
    def faults(self) -> FaultLog:
        """The log of the run's faults."""
        return self._faults

    @property
    def present(self) -> Any:
        """The handle of the newest actor, which may be dead."""
        return self._actor

    @property
    def is_ready(self) -> bool:
        """Whether no restart is going on, or has failed."""
        return self._restarting is None

    def prepare_with(self, prepare: Callable[[Any], Awaitable[None]]) -> None:
        """Await `prepare(actor)` for every successor before it is used."""
        assert self._prepare is None, f"{self.name} is prepared elsewhere already"
        self._prepare = prepare

    async def ready(self) -> Any:
        """Return the handle of the actor; while it is restarted, wait.

        Raises:
            TooManyDeathsError: it was given up.
        """
        while self._restarting is not None:
            # A caller that is cancelled does not end the restart.
            await asyncio.shield(self._restarting)
        return self._actor

    def check(self) -> None:
        """Raise the error of a restart that failed."""
        if self._restarting is not None and self._restarting.done():
            self._restarting.result()

    async def run(self, attempt: Callable[[Any], Awaitable[T]]) -> T:
        """Await `attempt(actor)`; where the actor dies, restart it and try again."""
        while True:
            actor = await self.ready()
            try:
                return await attempt(actor)
            except Exception as error:
                if not is_death(error):
                    raise
                self.died(actor, error)

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the actor; where the actor dies, restart it and call again."""
        return await self.run(lambda actor: getattr(actor, method).remote(*arguments))

    def died(self, actor: Any, error: BaseException, action: str = "it is restarted") -> None:
        """Record the death of `actor`, and restart it in the background.

        All calls in flight fail when an actor dies; only the first of them has an effect.
        """
        if actor is not self._actor or self._restarting is not None:
            return
        given_up = self._record(error, action)
        self._restarting = asyncio.create_task(self._restart_until_it_lives(given_up))
        # Whoever waits gets the error; where nobody does, it must not be logged as forgotten.
        self._restarting.add_done_callback(lambda task: task.cancelled() or task.exception())

    def close(self) -> None:
        """Stop a restart that is going on."""
        if self._restarting is not None:
            self._restarting.cancel()

    async def _restart_until_it_lives(self, given_up: TooManyDeathsError | None) -> None:
        while given_up is None:
            await asyncio.sleep(self._pause_s())
            try:
                actor = await self._restart()
                if self._prepare is not None:
                    await self._prepare(actor)
            except Exception as error:
                if not is_death(error) or getattr(error, "actor_init_failed", False):
                    raise
                given_up = self._record(error, "it is restarted again")
                continue
            # Without a pause since `prepare` returned: what it has checked still holds.
            self._actor, self._restarting = actor, None
            return
        raise given_up

    def _record(self, error: BaseException, action: str) -> TooManyDeathsError | None:
        """Count a death; return the error that ends the run, where it is one too many."""
        found = describe_death(error)
        death = _Death(step=self._faults.step, reason=found.reason, time=time.monotonic())
        self._deaths.append(death)
        alike = sum((one.step, one.reason) == (death.step, death.reason) for one in self._deaths)

        verdict = ""
        if alike >= self._limits.same_place:
            verdict = (
                f"died {alike} times {self._faults.place or 'without progress'} in the same way"
            )
        elif len(self._deaths) > self._limits.restarts:
            verdict = f"died {len(self._deaths)} times in this run"

        self._faults.record(
            self._kind,
            f"{self.name} died",
            found.reason,
            "the run ends" if verdict else action,
            evidence=found.evidence,
        )
        if not verdict:
            return None
        conclusion = f"{self.name} {verdict}: {found.reason}"
        return TooManyDeathsError(f"{found.evidence}\n{conclusion}".strip())

    def _pause_s(self) -> float:
        """Return the pause before the next restart."""
        now = time.monotonic()
        recent = sum(now - death.time < self._limits.quiet_s for death in self._deaths)
        pause = self._limits.first_pause_s * 2.0 ** (recent - 1)
        return min(pause, self._limits.longest_pause_s)


class PlainActor(SupervisedActor):
    """A plain actor in the form of a supervised one: nobody restarts it, its death is an error."""

    def __init__(self, actor: Any, name: str) -> None:
        super().__init__(name, actor, kind="generation_worker", restart=_refuse, faults=FaultLog())

    def died(self, actor: Any, error: BaseException, action: str = "") -> None:
        """Raise the death."""
        raise error


async def _refuse() -> Any:
    raise AssertionError("nobody knows how to restart a plain actor")


def supervised(actor: SupervisedActor | Any, name: str = "the actor") -> SupervisedActor:
    """Return `actor` where it is supervised, else in the form of one that is not restarted."""
    return actor if isinstance(actor, SupervisedActor) else PlainActor(actor, name)


class ActorPool:
    """Supervised actors of one kind, of which some may be restarting."""

    def __init__(self, members: Sequence[SupervisedActor | Any]) -> None:
        self.members = [supervised(member) for member in members]
        self.version: int | None = None  # of the weights that all must have; None: not checked

    def __len__(self) -> int:
        return len(self.members)

    @property
    def num_ready(self) -> int:
        """The number of members that are not restarting."""
        return sum(member.is_ready for member in self.members)

    async def ask(self, method: str, *arguments: Any) -> list[tuple[SupervisedActor, Any]]:
        """Call a method of every member that is ready; return the answers of those that gave one.

        A member that dies is restarted in the background. Where none is left, this waits for the
        first that is ready again.

        Raises:
            TooManyDeathsError: a member was given up.
        """
        while True:
            answers = await self.submit(method, *arguments)
            if answers:
                return answers
            await self._wait_for_one()

    def submit(self, method: str, *arguments: Any) -> Awaitable[list[tuple[SupervisedActor, Any]]]:
        """Call a method of every member that is ready; as `ask`, which may also find none.

        The calls are made before this returns, so each member answers before any later call.
        """
        for member in self.members:
            member.check()
        calls = [
            _answer(member, member.present, _call(member.present, method, arguments))
            for member in self.members
            if member.is_ready
        ]
        return _answers(calls)

    async def _wait_for_one(self) -> None:
        waiting = [asyncio.create_task(member.ready()) for member in self.members]
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in waiting:
                task.cancel()


def _call(actor: Any, method: str, arguments: Sequence[Any]) -> Any:
    return getattr(actor, method).remote(*arguments)


async def _answers(
    calls: Sequence[Awaitable[tuple[SupervisedActor, Any] | None]],
) -> list[tuple[SupervisedActor, Any]]:
    found = await asyncio.gather(*calls)
    return [answer for answer in found if answer is not None]


async def _answer(
    member: SupervisedActor, actor: Any, call: Awaitable[Any]
) -> tuple[SupervisedActor, Any] | None:
    """Return the answer of one member to a call; None where it died."""
    try:
        return member, await call
    except Exception as error:
        if not is_death(error):
            raise
        member.died(actor, error)
        return None


def as_pool(members: ActorPool | Sequence[SupervisedActor | Any]) -> ActorPool:
    """Return a pool of actors, which may be one already."""
    return members if isinstance(members, ActorPool) else ActorPool(members)
