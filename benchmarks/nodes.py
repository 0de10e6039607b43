"""Measure how rewards and generation scale with the nodes of a cluster.

    python -m benchmarks.nodes --nodes 1,2,3

Each number of nodes is a cluster of its own in namespaces of this machine (tests/support), as root.
The reward sleeps, as one does that asks a service, so that its throughput does not depend on the
cores of this machine; generation computes, and on one machine all nodes share its cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.support.node_cluster import WORK, missing_for_namespaces, node_cluster

PROCESSES = 4  # of each reward worker
SLEEP_S = 0.2
PROMPTS, SAMPLES = 24, 4
PLUGIN = f"""
import time
from rlsys.rewards import register_reward_function


@register_reward_function("sleeping")
def sleeping(completion: str, ground_truth: str) -> float:
    time.sleep({SLEEP_S})
    return 0.0
"""


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What a number of nodes achieves."""

    nodes: int
    tokens_per_second: float
    rewards_per_second: float


async def measure(nodes: int) -> Throughput:
    """Sample and score on the cluster that this process is on, with a worker of each on a node."""
    import ray

    from recipes.make_rankings import prompt_batches
    from recipes.wiring import spawn_reward_workers
    from rlsys.config import RunConfig
    from rlsys.data.prompt_stream import load_prompts
    from rlsys.driver.sampling import sampling_parameters
    from rlsys.models import resolve_model
    from rlsys.models.loading import load_tokenizer
    from rlsys.plugins import load_plugins
    from workers.cluster import Cluster
    from workers.generation.group import GenerationGroup
    from workers.generation.worker import GenerationWorker
    from workers.reward_worker import RewardWorkerClient

    config = RunConfig.model_validate(
        {
            "plugins": ["sleeping_reward"],
            "model": {"path": "tiny"},
            "data": {"synthetic": {"train_size": PROMPTS, "eval_size": 2}},
            "generation": {
                "engine": "transformers",
                "dtype": "float32",
                "workers": nodes,
                "samples_per_prompt": SAMPLES,
                "max_tokens": 32,
                "min_tokens": 32,
            },
            "reward": {"functions": ["sleeping"], "workers": nodes, "processes": PROCESSES},
            "cluster": {"placement": "STRICT_SPREAD"},
        }
    )
    load_plugins(config.plugins)
    directory = resolve_model("tiny")
    prompts = load_prompts(config, load_tokenizer(directory))
    (batch,) = prompt_batches(prompts, PROMPTS)
    sampling = sampling_parameters(config, samples=SAMPLES, temperature=1.0, seed=0)

    cluster = Cluster.connect(config, roles=("generation",))
    try:
        engines = [
            cluster.spawn("generation", index, GenerationWorker, config, directory)
            for index in range(nodes)
        ]
        scorer = RewardWorkerClient(spawn_reward_workers(cluster, config))
        await cluster.wait_until_ready()
        group = GenerationGroup(engines)

        parts = [part async for part in group.generate(batch, sampling)]  # warms up
        began = time.perf_counter()
        parts = [part async for part in group.generate(batch, sampling)]
        sampled = time.perf_counter() - began

        began = time.perf_counter()
        await asyncio.gather(*(scorer.score(part.rollouts) for part in parts))
        scored = time.perf_counter() - began
    finally:
        cluster.shutdown()
        ray.shutdown()

    return Throughput(
        nodes=nodes,
        tokens_per_second=sum(part.num_response_tokens for part in parts) / sampled,
        rewards_per_second=PROMPTS * SAMPLES / scored,
    )


def measured(nodes: int, folder: Path) -> Throughput:
    """Start a cluster of some nodes, and measure from its first."""
    with node_cluster(folder, nodes) as cluster:
        cluster.start_ray("--num-cpus=1")
        driver = cluster.nodes[0]
        (driver.work / "sleeping_reward.py").write_text(PLUGIN)
        done = driver.python(
            *("-m", "benchmarks.nodes", "--here", str(nodes)),
            variables={
                "RAY_ADDRESS": cluster.address,
                "PYTHONPATH": f"{driver.environment['PYTHONPATH']}:{WORK}",
            },
            timeout=1200,
        )
    return Throughput(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure each number of nodes, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", default="1,2,3", help="numbers of nodes to measure")
    parser.add_argument("--here", type=int, help=argparse.SUPPRESS)  # on a node of the cluster
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(asdict(asyncio.run(measure(arguments.here)))))
        return

    reason = missing_for_namespaces()
    if reason is not None:
        sys.exit(f"error: {reason}")
    ideal = PROCESSES / SLEEP_S
    print(
        f"rewards that sleep {SLEEP_S:g} s, {PROCESSES} processes a node: at most {ideal:g}/s each"
    )
    for nodes in map(int, arguments.nodes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            found = measured(nodes, Path(folder))
        print(
            f"{nodes} nodes: {found.rewards_per_second:6.1f} rewards/s, "
            f"{found.tokens_per_second:6.0f} tokens/s"
        )


if __name__ == "__main__":
    main()
