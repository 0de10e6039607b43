"""Asynchronous training on real actors: its metrics without staleness, and a run of the recipe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import ray

from docs.generate.metrics import documented
from rlsys.config import RunConfig
from rlsys.driver.asynchronous_loop import AsynchronousLoop
from rlsys.driver.evaluation import Evaluator
from rlsys.driver.sampling import Sampler
from rlsys.driver.session import Session
from rlsys.driver.synchronous_loop import SynchronousLoop
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.directory import RunDirectory
from rlsys.run.observers.metrics_log import MetricsLog, read_metrics
from rlsys.run.observers.observer import Observer
from tests.support.in_process_runs import with_staleness, without_times
from tests.support.real_parts import Parts, make_config, started
from workers.cluster import Cluster

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
OWN = ("staleness/", "queue/", "idle/")


def pid_of(actor: Any) -> int:
    """Return the number of an actor's process, which is on this machine."""
    return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))


class KillsAnEngine(Observer):
    """Kills a generation worker, which is busy, when a phase of a step begins."""

    def __init__(self, cluster: Cluster, name: str, moment: tuple[int, str]) -> None:
        self._pid = pid_of(cluster.actors[name])
        self._moment = moment

    def on_phase(self, step: int, phase: str) -> None:
        if (step, phase) == self._moment:
            os.kill(self._pid, signal.SIGKILL)


async def train(
    path: Path,
    config: RunConfig,
    parts: Parts,
    loop_class: type[SynchronousLoop],
    *observers: Observer,
) -> RunDirectory:
    """Train to the end on actors that are there."""
    directory = RunDirectory(path)
    directory.create(config)
    workers = parts.workers
    log = MetricsLog(directory)
    sampler = Sampler(config, workers.generator, workers.scorer)
    session = Session(
        config,
        CheckpointStore(directory.checkpoints, keep=1),
        [log, *observers],
        Evaluator(config, parts.prompts.evaluation, sampler),
        parts.cluster.faults,
    )
    session.register("metrics_position", log)
    loop = loop_class(config, workers, parts.prompts.train, sampler, session, directory.rollouts)
    assert await loop.run() == "finished"
    return directory


@pytest.mark.usefixtures("ray_cluster")
async def test_without_staleness_metrics_are_those_of_the_synchronous_loop(tmp_path: Path) -> None:
    """Groups go one by one to two workers; transformers samples the same from either."""
    config = make_config(steps=3, evaluation={"every": 3})
    async with started(config) as parts:
        synchronous = await train(tmp_path / "synchronous", config, parts, SynchronousLoop)
    async with started(config) as parts:
        asynchronous = await train(tmp_path / "asynchronous", config, parts, AsynchronousLoop)

    expected = without_times(read_metrics(synchronous.metrics))
    found = without_times(read_metrics(asynchronous.metrics))
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    for (_, _, values), (_, _, own) in zip(expected, found, strict=True):
        assert {name: value for name, value in own.items() if not name.startswith(OWN)} == (
            pytest.approx(values, abs=1e-6)
        )
    stds = [values["reward/std"] for kind, _, values in expected if kind == "train"]
    assert min(stds) > 0, "equal rewards would teach nothing, and any two such runs are equal"


@pytest.mark.usefixtures("ray_cluster")
async def test_the_groups_of_an_engine_that_is_killed_are_sampled_by_the_other(
    tmp_path: Path,
) -> None:
    config = with_staleness(make_config(steps=5, evaluation={"every": 5}), max_staleness=2)
    async with started(config) as parts:
        killer = KillsAnEngine(parts.cluster, "generation-0", (2, "update"))
        directory = await train(tmp_path, config, parts, AsynchronousLoop, killer)

    records = [one.values for one in read_metrics(directory.metrics) if one.kind == "train"]
    assert records[-1]["faults/generation_worker"] == 1
    groups: list[int] = []
    for step, values in enumerate(records, start=1):
        assert values["staleness/max"] <= 2
        path = directory.rollouts / f"step_{step:06d}.parquet"
        for row in pyarrow.parquet.read_table(path).to_pylist():
            if row["trained"]:
                assert 0 <= step - 1 - row["weight_version"] <= 2
                groups.append(row["group_id"])
    assert len(groups) == 5 * 4 * 4
    assert len(set(groups)) == 5 * 4


def test_the_recipe_trains_on_stale_samples_and_resumes(tmp_path: Path) -> None:
    flags = [
        *("--model.path", "tiny", "--generation.engine", "transformers"),
        *("--generation.dtype", "float32", "--policy.compute_dtype", "float32"),
        *("--generation.max_tokens", "8", "--generation.samples_per_prompt", "4"),
        *("--generation.workers", "2", "--generation.cpus_per_worker", "0"),
        *("--policy.ranks", "1", "--policy.num_mini_batches", "2"),
        *("--trainer.prompts_per_step", "4", "--trainer.steps", "4"),
        *("--data.synthetic.train_size", "40", "--data.synthetic.eval_size", "4"),
        *("--plugins", "rlsys_example_plugin", "--reward.functions", "[{name: example_digits}]"),
        *("--trainer.checkpoints.every", "2", "--trainer.evaluation.every", "2"),
        *("--trainer.max_staleness", "2", "--algorithm.rollout_correction.level", "token"),
    ]
    directory = RunDirectory(tmp_path / "run")
    recipe = [sys.executable, "-m", "recipes.grpo_math", "--run.directory", str(directory.path)]
    plugins = str(ROOT / "tests" / "plugin_package")
    environment = os.environ | {"PYTHONPATH": plugins, "HF_HUB_OFFLINE": "1"}
    for words in (flags, ["--resume", "--trainer.steps", "6"]):
        done = subprocess.run(
            [*recipe, *words],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    records = read_metrics(directory.metrics)
    steps = [record for record in records if record.kind == "train"]
    assert [record.step for record in steps] == list(range(1, 7))
    assert [record.step for record in records if record.kind == "eval"] == [0, 2, 4, 6]
    names = {name for record in records for name in record.values}
    assert [name for name in sorted(names) if documented(name) is None] == []
    assert max(record.values["staleness/max"] for record in steps) in (1, 2)
    groups = [
        row["group_id"]
        for step in range(1, 7)
        for row in pyarrow.parquet.read_table(
            directory.rollouts / f"step_{step:06d}.parquet"
        ).to_pylist()
        if row["trained"]
    ]
    assert len(set(groups)) == 6 * 4
    assert len(groups) == 6 * 4 * 4
    assert "Age of the trained samples" in (directory.path / "report.html").read_text()
