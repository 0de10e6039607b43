"""Runs on several nodes that share nothing but a network; see tests/support/node_cluster.py."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.node_cluster import (
    HOME,
    WORK,
    Node,
    NodeCluster,
    missing_for_namespaces,
    node_cluster,
)

REASON = missing_for_namespaces()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.timeout(1800),
]

# The reward code of a user, in the working folder of the driver: a plug-in and what it imports.
PLUGIN = """
from my_scores import digits
from rlsys.rewards import register_reward_function


@register_reward_function("my_digits")
def my_digits(completion: str, ground_truth: str) -> float:
    return digits(completion)
"""
SCORES = """
import socket


def digits(text: str) -> float:
    print("scored on", socket.gethostname())
    return sum(character.isdigit() for character in text) / max(1, len(text))
"""
SMALL = [
    *("--model.path", "tiny", "--generation.engine", "transformers"),
    *("--generation.dtype", "float32", "--policy.compute_dtype", "float32"),
    *("--generation.max_tokens", "6", "--generation.samples_per_prompt", "2"),
    *("--trainer.prompts_per_step", "2", "--trainer.evaluation.every", "0"),
    *("--data.synthetic.train_size", "8", "--data.synthetic.eval_size", "2"),
    *("--algorithm.kl.coefficient", "0", "--plugins", "my_rewards"),
    *("--reward.functions", "my_digits", "--trainer.checkpoints.every", "1"),
]
# Two nodes train, and the driver's node samples.
TRAIN, SAMPLE = "pool=train", "pool=sample"
LABELS = [["--labels", SAMPLE], ["--labels", TRAIN], ["--labels", TRAIN]]
PLACED = [
    *("--policy.ranks", "2", "--policy.node_label", TRAIN, "--cluster.placement", "SPREAD"),
    *("--generation.node_label", SAMPLE, "--reward.workers", "3"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeCluster]:
    """Start three nodes of one CPU each with Ray; the driver's has the user's code."""
    with node_cluster(tmp_path_factory.mktemp("nodes")) as made:
        driver = made.nodes[0]
        (driver.work / "my_rewards.py").write_text(PLUGIN)
        (driver.work / "my_scores.py").write_text(SCORES)
        made.start_ray("--num-cpus=1", per_node=LABELS)
        yield made


def recipe(
    cluster: NodeCluster, run: str, *flags: str, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run the recipe on node 1, with its directory in the working folder of that node."""
    words = ["-m", "recipes.grpo_math", "--run.directory", run, *flags]
    variables = {"RAY_ADDRESS": cluster.address, "PYTHONPATH": ":".join(code_paths(cluster))}
    return cluster.nodes[0].python(*words, timeout=1500, check=check, **variables)


def code_paths(cluster: NodeCluster) -> list[str]:
    return [cluster.nodes[0].environment["PYTHONPATH"], str(WORK)]


def received(node: Node) -> list[str]:
    """Return the model directories that were sent to a node, without their hashes."""
    folder = node.home / ".cache" / "rlsys" / "received"
    return [path.name.rpartition("-")[0] for path in folder.iterdir()] if folder.exists() else []


def metrics_of(run: Path) -> list[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record["step"] for record in map(json.loads, lines) if record["kind"] == "train"]


@pytest.mark.slow
def test_a_run_on_three_nodes_that_share_nothing(cluster: NodeCluster):
    """Ranks on two nodes, engine and driver on the third, the user's code on none but that."""
    driver, *trainers = cluster.nodes
    recipe(cluster, "run", *SMALL, *PLACED, "--trainer.steps", "1")

    run = driver.work / "run"
    checkpoint = run / "checkpoints" / "step_000001"
    files = {path.name for path in checkpoint.iterdir()}
    assert files >= {"model.safetensors", "optimizer_rank0.pt", "optimizer_rank1.pt"}
    log = (run / "run.log").read_text()
    assert "scored on node1" in log
    assert "scored on node2" in log

    # The model was sent once to each node that lacked it, and nothing else was left there.
    assert received(driver) == []
    for node in trainers:
        assert received(node) == ["tiny"]
        assert [path.name for path in node.work.iterdir()] == []
        assert [path for path in node.folder.iterdir() if path.name.startswith("rlsys-")] == []

    done = recipe(cluster, "run", "--resume", "--trainer.steps", "2")
    assert "resuming from" in done.stdout
    assert metrics_of(run) == [1, 2]
    assert (run / "checkpoints" / "step_000002" / "optimizer_rank1.pt").is_file()
    assert HOME.name in str(driver.home)
