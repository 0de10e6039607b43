"""Runs that lose a whole node: three nodes, see tests/support/node_cluster.py, of one CPU each.

The driver and Ray's head are on node 1, the model on nodes 2 and 3. A node dies as in a power cut,
so Ray notices it by its health checks only. The metrics must be those of an undisturbed run.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlsys.run.directory import RunDirectory
from rlsys.run.observers.run_status import RunStatus, read_status
from tests.support.disturbed_runs import FLAGS, PLUGINS, differences, faults_of, undisturbed
from tests.support.node_cluster import (
    ROOT,
    Node,
    NodeCluster,
    missing_for_namespaces,
    node_cluster,
)

REASON = missing_for_namespaces()
pytestmark = [
    pytest.mark.nodes,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.timeout(1800),
]
TIMEOUT_S = 600.0
LOOK_EVERY_S = 0.05
TRAIN, SAMPLE = "pool=train", "pool=sample"
LABELS = [["--labels", SAMPLE], ["--labels", TRAIN], ["--labels", TRAIN]]
STEPS = ("--trainer.steps", "5", "--policy.threads_per_rank", "1")
RESTARTED = re.compile(
    r"restart 1 of all actors, from checkpoint \S*step_00000[24] \(\d steps? lost\)"
)
TWO_RANKS = ("--policy.ranks", "2")
REWARDS = ("--reward.workers", "3")


class NodeRun:
    """A run whose driver is on node 1."""

    def __init__(self, cluster: NodeCluster, name: str, *flags: str) -> None:
        driver = cluster.nodes[0]
        self.path = driver.work / name
        self.directory = RunDirectory(self.path)
        words = [sys.executable, "-m", "recipes.ppo_math", "--run.directory", name, *FLAGS, *STEPS]
        own = {"RAY_ADDRESS": cluster.address, "PYTHONPATH": f"{ROOT}:{PLUGINS}"}
        self._file = (driver.work / f"{name}.out").open("w+")
        self.process = subprocess.Popen(
            driver.command(*words, *flags, variables=own | {"PYTHONUNBUFFERED": "1"}),
            stdout=self._file,
            stderr=subprocess.STDOUT,
        )

    @property
    def output(self) -> str:
        return Path(self._file.name).read_text()

    def wait_for(self, reached: Callable[[RunStatus, str], bool]) -> None:
        """Wait for a status and an output; the run must not end before."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            assert self.process.poll() is None, self.output
            status = read_status(self.directory)
            if status and reached(status, self.output):
                return
            assert time.monotonic() < deadline, self.output
            time.sleep(LOOK_EVERY_S)

    def end(self) -> str:
        """Wait for the end, and return what the run printed."""
        assert self.process.wait(TIMEOUT_S) == 0, self.output
        return self.output

    def close(self) -> None:
        """Kill the run if it has not ended; the node of the driver kills what it leaves."""
        self.process.kill()
        self.process.wait()
        self._file.close()


@contextmanager
def running(cluster: NodeCluster, name: str, *flags: str) -> Iterator[NodeRun]:
    run = NodeRun(cluster, name, *flags)
    try:
        yield run
    finally:
        run.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run undisturbed on this machine: the result does not depend on the places of the actors."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    with undisturbed(directory, *FLAGS, *STEPS, timeout_s=TIMEOUT_S):
        yield directory


@pytest.fixture(scope="module")
def whole_of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("whole_of_two") / "run"
    with undisturbed(directory, *FLAGS, *STEPS, *TWO_RANKS, timeout_s=TIMEOUT_S):
        yield directory


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[NodeCluster]:
    with node_cluster(tmp_path) as made:
        made.start_ray("--num-cpus=1", per_node=LABELS)
        yield made


def node_with(cluster: NodeCluster, title: str) -> Node:
    """Return the node where an actor of a class runs."""
    (found,) = [node for node in cluster.nodes if node.processes(f"ray::{title}")]
    return found


def test_the_ranks_of_a_dead_node_move_to_another(whole: Path, cluster: NodeCluster):
    """The policy's node dies; of two generation workers, one must make room for the policy."""
    flags = [
        *("--policy.node_label", TRAIN, "--generation.cpus_per_worker", "1", *REWARDS),
        *("--cluster.recovery_timeout_s", "5"),
    ]
    with running(cluster, "run", *flags) as run:
        run.wait_for(lambda status, _: status.step >= 3)
        lost = node_with(cluster, "PolicyWorker")
        assert lost.number > 1
        cluster.cut_power(lost)
        output = run.end()

    assert differences(run.path, whole) == []
    assert "going on with 1 of 2 generation workers" in output
    assert RESTARTED.search(output)
    assert "training_group" in [fault["kind"] for fault in faults_of(run.path)]


def test_ranks_wait_for_their_node(whole_of_two_ranks: Path, cluster: NodeCluster):
    """A rank is on each of the nodes 2 and 3; node 3 comes back, with an empty /dev/shm."""
    flags = [
        *("--policy.node_label", TRAIN, *TWO_RANKS, "--cluster.placement", "SPREAD"),
        *("--generation.node_label", SAMPLE, *REWARDS),
    ]
    with running(cluster, "run", *flags) as run:
        run.wait_for(lambda status, _: status.step >= 3)
        cluster.cut_power(cluster.nodes[2])
        run.wait_for(lambda _, output: "waiting at most 600 s for resources" in output)
        back = cluster.boot(3)
        back.start_ray("--object-store-memory=100000000", "--num-cpus=1", *LABELS[2])
        output = run.end()

    assert differences(run.path, whole_of_two_ranks) == []
    assert RESTARTED.search(output)
    assert back.processes("ray::PolicyWorker") == []


def test_a_node_with_only_an_engine_costs_no_restart(whole: Path, cluster: NodeCluster):
    """The other worker goes on, and the lost one comes back with its node."""
    flags = [
        *("--policy.node_label", SAMPLE, "--generation.node_label", TRAIN),
        *("--generation.cpus_per_worker", "1", *REWARDS),
    ]
    with running(cluster, "run", *flags) as run:
        run.wait_for(lambda status, _: status.step >= 1)
        cluster.cut_power(cluster.nodes[1])
        output = run.end()

    assert differences(run.path, whole) == []
    kinds = {fault["kind"] for fault in faults_of(run.path)}
    assert "generation_worker" in kinds
    assert "training_group" not in kinds
    assert "generation worker" in output
