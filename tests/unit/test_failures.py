"""Which errors a restart may repair: decided by their types."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray._private.state
import torch
import torch.distributed as dist
from ray import exceptions

from rlsys.config import ConfigError
from rlsys.driver.ports import WeightSyncError
from rlsys.driver.restarts import FailureKind
from rlsys.driver.watchdog import PhaseTimeoutError
from workers.failures import Victim, dead_actor, failure_kind


def of_task(cause: Exception) -> Exception:
    """Return the error that the driver gets when an actor's method raises `cause`."""
    return exceptions.RayTaskError(
        "update", "Traceback ...", cause, pid=1, ip=""
    ).as_instanceof_cause()


def following(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


GLOO = RuntimeError(
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"
)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (exceptions.ActorDiedError(), "lost process"),
        (exceptions.ActorUnavailableError("gone", b"\0" * 16), "lost process"),
        (exceptions.WorkerCrashedError(), "lost process"),
        (exceptions.TaskUnschedulableError("its node is gone"), "lost process"),
        (of_task(exceptions.ActorDiedError()), "lost process"),
        (of_task(GLOO), "lost process"),
        (of_task(dist.DistBackendError("NCCL watchdog")), "lost process"),
        (of_task(torch.OutOfMemoryError("CUDA out of memory")), "out of memory"),
        (of_task(MemoryError()), "out of memory"),
        (exceptions.OutOfMemoryError("a worker was killed"), "out of memory"),
        (
            following(RuntimeError("actor policy-0 did not start"), exceptions.ActorDiedError()),
            "lost process",
        ),
        (PhaseTimeoutError("update hangs"), "hang"),
        # Errors that would come again.
        (of_task(ValueError("a reward function failed")), None),
        (of_task(RuntimeError("a plug-in failed")), None),
        (ConfigError("policy.ranks: too many"), None),
        (WeightSyncError("differ"), None),
        (OSError("the disk is full"), None),
        (
            exceptions.ActorDiedError(
                exceptions.RayTaskError(
                    "__init__", "Traceback", ImportError("no module"), pid=1, ip=""
                )
            ),
            None,
        ),
    ],
)
def test_the_kind_of_an_error(error: Exception, kind: FailureKind | None):
    assert failure_kind(error) == kind


def test_a_dead_actor_is_found_where_the_error_names_none(monkeypatch: pytest.MonkeyPatch):
    """An object that is lost with its owner reports the owner's number alone."""
    states = {"a0": {"State": "ALIVE"}, "b0": {"State": "DEAD"}, "c0": None}
    monkeypatch.setattr(ray._private.state, "actors", states.get)
    actors = {
        name: SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda number=number: number))
        for name, number in (("policy-0", "a0"), ("reference-0", "c0"), ("critic-0", "b0"))
    }
    assert dead_actor(actors) == Victim(name="critic-0", reason="its process died")
    del actors["critic-0"]
    assert dead_actor(actors) is None
