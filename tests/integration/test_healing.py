"""Processes of a real run are killed, and its metrics are those of an undisturbed run."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from rlsys.config import RunConfig
from rlsys.data.batches import PromptBatch, SamplingParameters
from rlsys.driver.evaluation import Evaluator
from rlsys.driver.ports import Generator, RolloutPart
from rlsys.driver.sampling import Sampler
from rlsys.driver.session import Session
from rlsys.driver.synchronous_loop import SynchronousLoop
from rlsys.metrics import MetricMap
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.directory import RunDirectory
from rlsys.run.fault_events import FAULT_KINDS, FaultFile, read_faults
from rlsys.run.observers.metrics_log import MetricsLog, read_metrics
from rlsys.run.observers.observer import Observer
from tests.support.in_process_runs import assert_same_metrics
from tests.support.real_parts import make_config, started
from workers.cluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def pid_of(actor: Any) -> int:
    """Return the number of an actor's process, which is on this machine."""
    return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))


def kill(cluster: Cluster, *names: str) -> None:
    """Kill the processes of actors, as `kill -9` does."""
    for pid in [pid_of(cluster.actors[name]) for name in names]:
        os.kill(pid, signal.SIGKILL)


Pids = Mapping[str, int]  # of the actors that a run began with
Blow = Callable[[Cluster, Pids], Awaitable[None]]


async def kill_both_engines(cluster: Cluster, pids: Pids) -> None:
    # They are busy, so they cannot be asked for their processes.
    for name in ("generation-0", "generation-1"):
        os.kill(pids[name], signal.SIGKILL)


async def kill_reward_processes(cluster: Cluster, pids: Pids) -> None:
    _, *pool = await cluster.actors["reward-0"].process_ids.remote()
    for pid in pool:
        os.kill(pid, signal.SIGKILL)


async def kill_reward_worker(cluster: Cluster, pids: Pids) -> None:
    own, *_ = await cluster.actors["reward-0"].process_ids.remote()
    os.kill(own, signal.SIGKILL)


class KillsAtPhases(Observer):
    """Kills actors when a phase of a step begins."""

    def __init__(self, cluster: Cluster, plan: Mapping[tuple[int, str], str]) -> None:
        self._cluster = cluster
        self._plan = dict(plan)

    def on_phase(self, step: int, phase: str) -> None:
        name = self._plan.pop((step, phase), None)
        if name:
            kill(self._cluster, name)


class KillsWhileSampling:
    """A generator that strikes after the first part of a step, while the others are computed."""

    def __init__(
        self,
        generator: Generator,
        cluster: Cluster,
        plan: Mapping[int, Blow],
    ) -> None:
        self._generator = generator
        self._cluster = cluster
        self._plan = dict(plan)
        engines = [name for name in cluster.actors if name.startswith("generation")]
        self._pids = {name: pid_of(cluster.actors[name]) for name in engines}

    async def generate(
        self, prompts: PromptBatch, sampling: SamplingParameters
    ) -> AsyncIterator[RolloutPart]:
        async for part in self._generator.generate(prompts, sampling):
            yield part
            faults = self._cluster.faults
            strike = self._plan.pop(faults.step, None) if faults.phase == "generate" else None
            if strike is not None:
                await strike(self._cluster, self._pids)

    async def metrics(self) -> MetricMap:
        return await self._generator.metrics()


async def train(
    path: Path,
    config: RunConfig,
    phases: Mapping[tuple[int, str], str],
    sampling: Mapping[int, Blow],
) -> None:
    """Train to the end, with the blows of a plan."""
    directory = RunDirectory(path)
    directory.create(config)
    async with started(config) as parts:
        cluster = parts.cluster
        log = MetricsLog(directory)
        observers = [log, FaultFile(directory), KillsAtPhases(cluster, phases)]
        generator = KillsWhileSampling(parts.workers.generator, cluster, sampling)
        workers = replace(parts.workers, generator=generator)
        sampler = Sampler(config, generator, workers.scorer)
        session = Session(
            config,
            CheckpointStore(directory.checkpoints, keep=1),
            observers,
            Evaluator(config, parts.prompts.evaluation, sampler),
            cluster.faults,
        )
        session.register("metrics_position", log)
        loop = SynchronousLoop(
            config, workers, parts.prompts.train, sampler, session, directory.rollouts
        )
        assert await loop.run() == "finished"


async def test_metrics_equal_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    """Kill every kind of actor that holds no trained model, in every phase that uses it.

    Step 2: both engines and step 3: all reward processes, after the first response. Step 4: the
    reward worker after the first response, and the controller, whose estimator has a state, before
    the advantages. Step 5: an engine before the sync. The last evaluation: the other engine.
    """
    config = make_config(steps=5, prompts_per_step=8, evaluation={"every": 5})
    advantage = config.algorithm.advantage.model_copy(update={"name": "reinforce_baseline"})
    algorithm = config.algorithm.model_copy(update={"advantage": advantage})
    config = config.model_copy(update={"algorithm": algorithm})
    await train(tmp_path / "whole", config, {}, {})
    await train(
        tmp_path / "hit",
        config,
        {
            (4, "advantages"): "advantage-0",
            (5, "sync"): "generation-0",
            (5, "evaluate"): "generation-1",
        },
        {2: kill_both_engines, 3: kill_reward_processes, 4: kill_reward_worker},
    )

    whole, hit = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "hit")
    assert_same_metrics(whole.path, hit.path)
    last = [record for record in read_metrics(hit.metrics) if record.kind == "train"][-1].values
    counts = {kind: last[f"faults/{kind}"] for kind in FAULT_KINDS}
    assert counts.pop("reward_process") >= 1
    assert counts == dict.fromkeys(counts, 0) | {
        "generation_worker": 3,  # the fourth dies after the last step
        "reward_worker": 1,
        "advantage_controller": 1,
    }
    events = [(fault.step, fault.phase, fault.kind) for fault in read_faults(hit.faults)]
    assert events[-1] == (5, "evaluate", "generation_worker")
    assert not whole.faults.exists()
    stds = [r.values["reward/std"] for r in read_metrics(hit.metrics) if r.kind == "train"]
    assert min(stds) > 0, "equal rewards would teach nothing, and any two such runs are equal"


async def test_an_actor_that_always_dies_ends_the_run_with_what_it_printed(tmp_path: Path) -> None:
    class DiesInConstructor:  # here, so that its process need not import this module
        def __init__(self, path: str) -> None:
            if os.path.exists(path):
                print("no more memory", file=sys.stderr, flush=True)
                os._exit(9)

        def version(self) -> int:
            return 0

    cluster = Cluster.connect(make_config(steps=1))
    try:
        path = tmp_path / "fatal"
        cluster.spawn("generation", 0, DiesInConstructor, str(path))
        actor = cluster.supervise(
            "generation", 0, kind="generation_worker", called="generation worker 0"
        )
        assert await actor.call("version") == 0
        path.touch()
        kill(cluster, "generation-0")
        with pytest.raises(RuntimeError, match="no more memory") as caught:
            await actor.call("version")
        assert "3 times without progress in the same way" in str(caught.value).splitlines()[-1]
    finally:
        cluster.shutdown()
