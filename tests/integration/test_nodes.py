"""Runs on several nodes that share nothing but a network; see tests/support/node_cluster.py."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.node_cluster import (
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
import socket

from my_scores import digits
from rlsys.rewards import register_reward_function

print("imported on", socket.gethostname())


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
# Writes the measurement of a CPU into the cache of a node, as a run does.
QUICK_IN_BFLOAT16 = """
from rlsys.config.hardware import detect_hardware
from rlsys.models import resolve_model
from rlsys.models.loading import mlp_shape
from rlsys.run import compute_dtype

compute_dtype.measure_products = lambda _: compute_dtype.ProductSpeed(float32=50, bfloat16=100)
compute_dtype.cached_product_speed(detect_hardware(), mlp_shape(resolve_model("tiny")))
"""


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
    return cluster.nodes[0].python(*words, variables=variables, timeout=1500, check=check)


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
    for part in ("00001-of-00002", "00002-of-00002"):  # one file of each rank
        assert files >= {f"model-{part}.safetensors", f"optimizer-{part}.shard"}
    log = (run / "run.log").read_text()
    assert "scored on node1" in log
    assert "scored on node2" in log

    # What the actors printed was collected from all nodes, by the name of the actor.
    printed = {path.name: path.read_text() for path in (run / "logs").glob("*.out")}
    nodes = re.findall(r"imported on (node\d)", printed["policy-0.out"] + printed["policy-1.out"])
    assert sorted(nodes) == ["node2", "node3"]
    assert "imported on node1" in printed["advantage-0.out"]
    assert "imported on node3" in printed["reward-2.out"]
    assert [name for name in printed if not re.fullmatch(r"[a-z]+-\d\.out", name)] == []

    # The model was sent once to each node that lacked it, and nothing else was left there.
    assert received(driver) == []
    for node in trainers:
        assert received(node) == ["tiny"]
        assert [path.name for path in node.work.iterdir()] == []
        assert [path for path in node.folder.iterdir() if path.name.startswith("rlsys-")] == []

    done = recipe(cluster, "run", "--resume", "--trainer.steps", "2")
    assert "resuming from" in done.stdout
    assert (run / "run.log").read_text().count("tiny: sending") == 1
    assert metrics_of(run) == [1, 2]
    assert (run / "checkpoints" / "step_000002" / "optimizer-00002-of-00002.shard").is_file()


@pytest.mark.nodes
def test_a_dry_run_says_who_goes_where_and_starts_nothing(cluster: NodeCluster):
    flags = [*SMALL, *PLACED, "--algorithm.kl.coefficient", "0.01", "--dry-run"]
    done = recipe(cluster, "dry", *flags)
    table = done.stdout.partition("places (nothing was started):")[2].splitlines()
    rows = [re.match(r"  (\S.*\S) +(10\.77\.0\.\d)  ", line) for line in table]
    places = {row[1]: row[2] for row in rows if row}
    ranks = {places.pop("policy-0, reference-0"), places.pop("policy-1, reference-1")}
    assert ranks == {"10.77.0.2", "10.77.0.3"}
    assert places == {
        "generation-0": "10.77.0.1",
        "reward-0": "10.77.0.1",
        "reward-1": "10.77.0.2",
        "reward-2": "10.77.0.3",
        "advantage-0": "10.77.0.1",
    }
    assert not (cluster.nodes[0].work / "dry").exists()


@pytest.mark.nodes
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--policy.node_label", "pool=gpu"],
            "policy.node_label: no node of the cluster has the label 'pool=gpu' (10.77.0.1: "
            "pool=sample; 10.77.0.2: pool=train; 10.77.0.3: pool=train)",
        ),
        (
            ["--policy.cpus_per_rank", "2"],
            "no node with the label pool=train has them: 10.77.0.2 has 1 CPUs (lacks 1); "
            "10.77.0.3 has 1 CPUs (lacks 1)",
        ),
        (["--policy.ranks", "3"], "the nodes with the label pool=train have room for 2"),
        (["--reward.node_label", "pool=none"], "reward.node_label: no node of the cluster"),
    ],
)
def test_what_has_no_place_is_refused_before_anything_starts(
    cluster: NodeCluster, flags: list[str], message: str
):
    done = recipe(cluster, "refused", *SMALL, *PLACED, *flags, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert not list((cluster.nodes[0].work / "refused").iterdir())


@pytest.mark.nodes
def test_other_code_by_the_same_name_on_a_node_is_refused(cluster: NodeCluster):
    stale = cluster.nodes[2].work / "my_scores.py"
    stale.write_text("def digits(text): return 1.0")
    try:
        done = recipe(cluster, "stale", *SMALL, *PLACED, check=False)
    finally:
        stale.unlink()
    assert done.returncode == 2, done.stdout + done.stderr
    assert "plugins: 10.77.0.3 imports another 'my_scores', /tmp/work/my_scores.py" in done.stderr


@pytest.mark.nodes
def test_a_local_model_directory_and_its_reference_reach_other_nodes(cluster: NodeCluster):
    """The driver's node has a directory that no catalogue knows, and does not compute."""
    driver = cluster.nodes[0]
    script = (
        "import shutil; from rlsys.models import resolve_model; "
        "shutil.copytree(resolve_model('tiny'), 'mine')"
    )
    driver.python("-c", script)
    flags = [*SMALL, "--model.path", "./mine", "--trainer.steps", "1", "--policy.node_label", TRAIN]
    kl = ["--algorithm.kl.coefficient", "0.01", "--algorithm.kl.kind", "exact"]
    recipe(cluster, "local", *flags, "--generation.node_label", TRAIN, *kl)
    assert metrics_of(driver.work / "local") == [1]
    for node in cluster.nodes[1:]:
        assert "mine" in received(node)


@pytest.mark.nodes
def test_nodes_with_different_cpus_agree_on_float32(tmp_path: Path):
    """Node 1 has bfloat16 instructions, which its measurement found fast, and node 2 has none."""
    with node_cluster(tmp_path, nodes=2) as made:
        first, second = made.nodes
        cpu = "model name\t: Quick\nflags\t\t: avx512_bf16\n"
        (first.work / "cpuinfo").write_text(cpu)
        first.run("mount", "--bind", "cpuinfo", "/proc/cpuinfo")
        first.python("-c", QUICK_IN_BFLOAT16)
        common = ["--object-store-memory=100000000", "--num-cpus=1"]
        first.start_ray(*common)
        avx2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
        second.start_ray(*common, variables=avx2)
        (first.work / "my_rewards.py").write_text(PLUGIN)
        (first.work / "my_scores.py").write_text(SCORES)
        done = recipe(
            *(made, "auto", *SMALL, "--cluster.placement", "SPREAD", "--dry-run"),
            *("--generation.dtype", "auto", "--policy.compute_dtype", "auto"),
        )

    assert "auto -> float32 (the nodes differ" in done.stdout
    assert "10.77.0.1: bfloat16, Quick, avx512_bf16: measured" in done.stdout
    assert "10.77.0.2: float32, " in done.stdout
    # The configuration that is printed; null: as the policy.
    values = re.findall(r"^ +(?:compute_)?dtype: (\w+)$", done.stdout, re.MULTILINE)
    assert set(values) == {"float32", "null"}
