"""Actors in this process that answer like Ray's, and can die at a chosen call."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

from ray.exceptions import ActorDiedError

from rlsys.driver.faults import FaultLog
from workers.supervision import RestartLimits, SupervisedActor

QUICK = RestartLimits(first_pause_s=0.0)


def death(message: str = "its process died") -> ActorDiedError:
    """Return the error of a call to an actor whose process is gone."""
    error = ActorDiedError()
    error.error_msg = message
    return error


class FakeActor:
    """The handle of `target`, whose methods run in this process.

    `fates` has, for each coming call of a method, how many items of its stream pass before the
    actor dies (0: it dies at once), or None where it lives.
    """

    def __init__(self, target: Any, fates: dict[str, list[int | None]] | None = None) -> None:
        self.target = target
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._fates = {name: deque(found) for name, found in (fates or {}).items()}
        self.is_dead = False
        self.unfinished: set[asyncio.Future[Any]] = set()  # calls that are no streams

    def __getattr__(self, method: str) -> _FakeMethod:
        return _FakeMethod(self, method)

    def fate_of(self, method: str) -> int | None:
        """Return how many items pass before the actor dies in this call."""
        if self.is_dead:
            return 0
        coming = self._fates.get(method)
        return coming.popleft() if coming else None


class _FakeMethod:
    def __init__(self, actor: FakeActor, method: str) -> None:
        self._actor = actor
        self._method = method
        self._results: int | str = 1

    def options(self, num_returns: int | str) -> _FakeMethod:
        self._results = num_returns
        return self

    def remote(self, *arguments: Any) -> Any:
        self._actor.calls.append((self._method, arguments))
        fate = self._actor.fate_of(self._method)
        if self._results == "streaming":
            return self._stream(arguments, fate, set(self._actor.unfinished))
        called = asyncio.ensure_future(self._call(arguments, fate))
        self._actor.unfinished.add(called)
        called.add_done_callback(self._actor.unfinished.discard)
        if self._results == 1:
            return called
        assert isinstance(self._results, int)
        return [_item_of(called, i) for i in range(self._results)]

    async def _call(self, arguments: tuple[Any, ...], fate: int | None) -> Any:
        await asyncio.sleep(0)
        if fate is not None or self._actor.is_dead:
            self._actor.is_dead = True
            raise death()
        return getattr(self._actor.target, self._method)(*arguments)

    async def _stream(
        self, arguments: tuple[Any, ...], fate: int | None, before: set[asyncio.Future[Any]]
    ) -> AsyncIterator[Awaitable[Any]]:
        if before:  # an actor takes calls in their order
            await asyncio.wait(before)
        items: Iterator[Any] = getattr(self._actor.target, self._method)(*arguments)
        passed = 0
        while True:
            await asyncio.sleep(0)
            if passed == fate or self._actor.is_dead:
                self._actor.is_dead = True
                yield _failed(death())
                return
            try:
                item = next(items)
            except StopIteration:
                return
            except Exception as error:
                yield _failed(error)
                return
            passed += 1
            yield _value(item)


def _failed(error: Exception) -> asyncio.Future[Any]:
    future = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    future.exception()  # so that one that nobody awaits is not logged
    return future


def _value(item: Any) -> asyncio.Future[Any]:
    future = asyncio.get_running_loop().create_future()
    future.set_result(item)
    return future


async def _item(called: Awaitable[Any], position: int) -> Any:
    return (await called)[position]


def _item_of(called: asyncio.Future[Any], position: int) -> asyncio.Future[Any]:
    item = asyncio.ensure_future(_item(called, position))
    item.add_done_callback(lambda done: done.cancelled() or done.exception())
    return item


def supervised_fake(
    start: Callable[[int], FakeActor],
    *,
    kind: str = "generation_worker",
    name: str = "generation worker 0",
    faults: FaultLog | None = None,
    limits: RestartLimits = QUICK,
) -> SupervisedActor:
    """Return the supervision of `start(0)`, whose successors are `start(1)`, `start(2)`, ..."""
    started = 0

    async def restart() -> FakeActor:
        nonlocal started
        started += 1
        return start(started)

    return SupervisedActor(
        name,
        start(0),
        kind=kind,
        restart=restart,
        faults=faults or FaultLog(),
        limits=limits,
    )
