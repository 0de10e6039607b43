"""Print which GPU each actor of a run sees, on a Ray with three GPUs that do not exist.

    python -m tests.support.gpu_places 0.5        policy.gpus_per_rank

Nothing computes on them. It is a process of its own because a process has one Ray.
"""

from __future__ import annotations

import json
import os
import sys

import ray

from rlsys.config import RunConfig
from workers.cluster import Cluster


class Visible:
    """An actor that says which GPUs it sees."""

    def gpus(self) -> str:
        """Return Ray's choice for this actor."""
        return os.environ.get("CUDA_VISIBLE_DEVICES", "all")


def visible_gpus(config: RunConfig) -> dict[str, str]:
    """Return the GPUs that each actor sees, by the name of the actor."""
    cluster = Cluster.connect(config)
    try:
        for rank in range(config.policy.ranks):
            cluster.spawn("policy", rank, Visible)
        cluster.spawn("generation", 0, Visible)
        for rank in range(config.reference_role().ranks):
            cluster.spawn("reference", rank, Visible, shares="policy")
        return {name: ray.get(actor.gpus.remote()) for name, actor in cluster.actors.items()}
    finally:
        cluster.shutdown()


def main() -> None:
    """Start Ray, and print the result as JSON."""
    ray.init(
        num_cpus=4,
        num_gpus=3,
        include_dashboard=False,
        object_store_memory=256 * 1024**2,
        log_to_driver=False,
        configure_logging=False,
    )
    config = RunConfig.model_validate(
        {
            "policy": {"ranks": 2, "gpus_per_rank": float(sys.argv[1])},
            "algorithm": {"kl": {"coefficient": 0.1}},
        }
    )
    try:
        print(json.dumps(visible_gpus(config)))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
