"""Which errors mean that a part of the machinery failed, so that a restart of all actors may help.

    lost process    an actor, a node, a worker process or an object is gone, or the process group
                    of the ranks failed
    out of memory   of a GPU or of the machine
    hang            a phase exceeded its time

Every other error would come again: an exception in a reward function or a plug-in, a refusal, a
full disk, weights that differ after a sync. It is decided by the exception's type, and by its
message where torch raises a bare RuntimeError.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray._private.state
import torch
import torch.distributed as dist
from ray import exceptions

from rlsys.driver.restarts import FailureKind
from rlsys.driver.watchdog import PhaseTimeoutError
from workers.death_evidence import describe_death
from workers.supervision import TooManyDeathsError

LOST = (
    exceptions.RayActorError,
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.LocalRayletDiedError,
    exceptions.ObjectLostError,
    exceptions.ActorUnschedulableError,
    exceptions.TaskUnschedulableError,
    exceptions.ActorPlacementGroupRemoved,
    exceptions.RpcError,
    dist.DistError,
)
MEMORY = (exceptions.OutOfMemoryError, torch.OutOfMemoryError, MemoryError)

# Messages of gloo, NCCL and the allocator, which are no exception types of their own.
LOST_MESSAGES = ("gloo/transport", "Connection closed by peer", "NCCL error", "NCCL communicator")
MEMORY_MESSAGES = ("DefaultCPUAllocator", "CUDA out of memory")


def failure_kind(error: BaseException) -> FailureKind | None:
    """Return the kind of a failure of the machinery; None for an error that would come again."""
    if isinstance(error, TooManyDeathsError):  # its message has the evidence of all kinds of deaths
        return None
    for cause in _chain(error):
        kind = _own_kind(cause)
        if kind is not None:
            return kind
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes: those of Python, and those that Ray carries over."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += [getattr(current, "cause", None), current.__cause__]


def _own_kind(error: BaseException) -> FailureKind | None:
    """Return the kind by an error's own type or message."""
    if isinstance(error, PhaseTimeoutError):
        return "hang"
    if isinstance(error, MEMORY):
        return "out of memory"
    if isinstance(error, exceptions.RayActorError) and error.actor_init_failed:
        return _kind_of_message(str(error))  # an exception of the actor's constructor
    if isinstance(error, LOST):
        return "lost process"
    return _kind_of_message(str(error)) if isinstance(error, RuntimeError) else None


def _kind_of_message(message: str) -> FailureKind | None:
    if any(part in message for part in MEMORY_MESSAGES):
        return "out of memory"
    if any(part in message for part in LOST_MESSAGES):
        return "lost process"
    return None


@dataclass(frozen=True, kw_only=True)
class Victim:
    """An actor that died."""

    name: str
    reason: str  # in one line


def dead_actor(actors: Mapping[str, Any]) -> Victim | None:
    """Return an actor that is dead by Ray's table, where the error itself names none.

    So it is where an object is lost with the process that owned it.
    """
    for name, actor in actors.items():
        found = ray._private.state.actors(actor._actor_id.hex())
        if found and found["State"] == "DEAD":
            return Victim(name=name, reason="its process died")
    return None


def victim_of(error: BaseException, actors: Mapping[str, Any]) -> Victim | None:
    """Return the actor whose death an error reports; None where it reports none."""
    names = {actor._actor_id.hex(): name for name, actor in actors.items()}
    for cause in _chain(error):
        if isinstance(cause, exceptions.RayActorError) and cause.actor_id in names:
            return Victim(name=names[cause.actor_id], reason=describe_death(cause).reason)
    return None
