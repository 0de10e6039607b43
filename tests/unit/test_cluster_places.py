"""The places of actors that are started again after the loss of a node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorUnschedulableError

from rlsys.config import RunConfig
from workers import cluster as cluster_module
from workers.cluster import Bundle, Cluster
from workers.stack_dumps import answer_with_stacks


class FakeFolders:
    """Every node has a model under a path of its own."""

    def __init__(self) -> None:
        self.delivered: list[set[str]] = []

    def deliver(self, directory: Path, files: Any, nodes: Any) -> None:
        self.delivered.append(set(nodes))

    def on(self, directory: Path, node: str) -> str:
        return f"/{node}/{directory.name}"


class FakeRay:
    """Ray with one reservation of one bundle, which moves to another node."""

    def __init__(self, *states: str) -> None:
        self.nodes = ["node-a"]
        self.states = list(states)
        self.started: list[tuple[Any, ...]] = []
        self.dead: set[str] = set()

    async def answers(self, node: str) -> bool:
        return node not in self.dead

    def table(self, reservation: Any) -> dict[str, str]:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if state == "CREATED":
            self.nodes = ["node-b"]
        return {"state": state}

    def kill(self, actor: Any) -> None: ...


class FakeHandle:
    """An actor that is constructed at once."""

    class _Call:
        async def remote(self, function: Any) -> None:
            assert function is answer_with_stacks

    __ray_call__ = _Call()


def make_cluster(monkeypatch: pytest.MonkeyPatch, fake: FakeRay, timeout_s: float) -> Cluster:
    class Remote:
        def options(self, **options: Any) -> Any:
            return self

        def remote(self, *arguments: Any) -> Any:
            fake.started.append(arguments)
            return FakeHandle()

    monkeypatch.setattr(cluster_module.ray, "remote", lambda actor_class: Remote())
    monkeypatch.setattr(cluster_module.ray, "kill", fake.kill)
    monkeypatch.setattr(cluster_module, "placement_group_table", fake.table)
    monkeypatch.setattr(cluster_module, "bundle_nodes", lambda reservation: fake.nodes)
    monkeypatch.setattr(cluster_module, "model_files", lambda directory: [])
    monkeypatch.setattr(cluster_module, "_identity", lambda role, index: {})
    monkeypatch.setattr(cluster_module, "_cores_of", lambda node: 4)
    monkeypatch.setattr(cluster_module, "PLACES_EVERY_S", 0.0)
    monkeypatch.setattr(cluster_module, "node_answers", fake.answers)
    monkeypatch.setattr(cluster_module, "PlacementGroupSchedulingStrategy", lambda *_, **__: None)
    config = RunConfig()
    section = config.cluster.model_copy(update={"recovery_timeout_s": timeout_s})
    reservation: Any = None
    folders: Any = FakeFolders()
    return Cluster(
        bundles=(Bundle(role="generation", index=0, cpus=1, gpus=0),),
        reservation=reservation,
        leave_ray=lambda: None,
        config=config.model_copy(update={"cluster": section}),
        folders=folders,
    )


async def test_an_actor_that_moves_to_another_node_gets_its_files_there(
    monkeypatch: pytest.MonkeyPatch,
):
    fake = FakeRay("RESCHEDULING", "RESCHEDULING", "CREATED")
    cluster = make_cluster(monkeypatch, fake, 60.0)
    cluster.spawn("generation", 0, object, Path("/models/mine"))
    cluster.supervise("generation", 0, kind="generation_worker", called="generation worker 0")
    await cluster._restart("generation-0")
    assert fake.started == [("/node-a/mine",), ("/node-b/mine",)]


async def test_a_node_whose_death_was_not_noticed_yet_is_no_place(
    monkeypatch: pytest.MonkeyPatch,
):
    fake = FakeRay("UNNOTICED", "RESCHEDULING", "CREATED")
    fake.dead = {"node-a"}
    cluster = make_cluster(monkeypatch, fake, 60.0)
    cluster.spawn("generation", 0, object, Path("/models/mine"))
    cluster.supervise("generation", 0, kind="generation_worker", called="generation worker 0")
    await cluster._restart("generation-0")
    assert fake.started == [("/node-a/mine",), ("/node-b/mine",)]


async def test_a_place_that_does_not_come_back_is_a_failure_that_a_restart_repairs(
    monkeypatch: pytest.MonkeyPatch,
):
    fake = FakeRay("RESCHEDULING")
    cluster = make_cluster(monkeypatch, fake, 0.0)
    cluster.spawn("generation", 0, object, Path("/models/mine"))
    worker = cluster.supervise("generation", 0, kind="generation_worker", called="worker 0")
    monkeypatch.setattr(type(worker), "is_ready", False)
    with pytest.raises(ActorUnschedulableError, match="recovery_timeout_s"):
        await cluster._restart("generation-0")
    assert len(fake.started) == 1


def test_a_place_without_a_node_gets_no_files(monkeypatch: pytest.MonkeyPatch):
    """As when a reward worker is started again while the place of a rank is lost."""
    fake = FakeRay("RESCHEDULING")
    fake.nodes = ["", "node-b"]
    cluster = make_cluster(monkeypatch, fake, 60.0)
    assert cluster.on_node(Path("/models/mine"), "node-c") == "/node-c/mine"
    assert isinstance(cluster.folders, FakeFolders)
    assert cluster.folders.delivered == [{"node-b", "node-c"}]
