"""Models are set up while engines start, except where both share a GPU; on real Ray actors."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ray

from recipes.wiring import set_up_models
from workers.cluster import Bundle, Cluster
from workers.training.rank_group import RankGroup

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
LIMIT_S = 120.0


class Engine:
    """An engine whose start ends when a file exists, if one is given."""

    def __init__(self, awaited: str | None, started: str) -> None:
        while awaited is not None and not Path(awaited).exists():
            time.sleep(0.01)
        Path(started).touch()


class Rank:
    """A rank that notes at its set-up whether the engine had started."""

    def __init__(self, engine: str, done: str) -> None:
        self._engine, self._done = Path(engine), Path(done)

    def rendezvous(self) -> str:
        return "host:1"

    def setup(self, _: str) -> tuple[str, ...]:
        Path(self._done).touch()
        return ("after the engine" if self._engine.exists() else "before the engine",)


class Broken:
    """A rank that cannot be constructed."""

    def __init__(self) -> None:
        raise ValueError("no such device")


def cluster_of(actors: dict[str, Any], gpus: float = 0.0) -> Cluster:
    """Return a cluster whose engine and policy have `gpus` each."""
    bundles = [Bundle(role=role, index=0, cpus=0, gpus=gpus) for role in ("policy", "generation")]
    return Cluster(
        bundles=tuple(bundles),
        reservation=mock.Mock(),
        leave_ray=lambda: None,
        config=mock.Mock(),
        actors=actors,
    )


def start(actor_class: type, *arguments: object) -> Any:
    remote_class: Any = ray.remote(actor_class)
    return remote_class.options(num_cpus=0).remote(*arguments)


@pytest.mark.parametrize(
    ("gpus", "note"), [(0.0, "before the engine"), (1.0, "before"), (0.5, "after the engine")]
)
async def test_order_of_models_and_engines(gpus: float, note: str, tmp_path: Path):
    engine, model = str(tmp_path / "engine"), str(tmp_path / "model")
    shared = gpus == 0.5
    rank = start(Rank, engine, model)
    # Where nothing is shared, the engine waits for the model, so the other order would never end.
    actors = {"policy-0": rank, "generation-0": start(Engine, None if shared else model, engine)}

    cluster = cluster_of(actors, gpus)
    notes = await asyncio.wait_for(set_up_models(cluster, [RankGroup([rank])]), LIMIT_S)
    assert len(notes) == 1
    assert notes[0].startswith(note)
    assert Path(engine).exists(), "it returns when all actors have started"
    for actor in actors.values():
        ray.kill(actor)


async def test_an_actor_that_does_not_start_is_named(tmp_path: Path):
    rank = start(Broken)
    with pytest.raises(RuntimeError, match=r"actor policy-0 did not start: (.|\n)*no such device"):
        await set_up_models(cluster_of({"policy-0": rank}), [RankGroup([rank])])
