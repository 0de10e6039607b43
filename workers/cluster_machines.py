"""The machines of a cluster, as far as a run's choice of precision depends on them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from rlsys.config import RunConfig
from rlsys.config.hardware import Hardware, detect_hardware
from rlsys.models.loading import mlp_shape
from rlsys.run.compute_dtype import (
    Machine,
    ProductSpeed,
    cached_product_speed,
    configured_dtypes,
)
from workers.cluster import bundles_of, connect_to_ray
from workers.local_ray import LocalRay
from workers.placement import ClusterNode, call_on_nodes, cluster_nodes


def machines_of_cluster(config: RunConfig, model_directory: Path) -> tuple[Machine, ...]:
    """Return the nodes of the cluster that a run joins, measured where it leaves a choice open.

    There are none for a run whose precisions are all explicit.

    Raises:
        ConfigError: no cluster answers.
    """
    if "auto" not in configured_dtypes(config).values():
        return ()
    with _connected(config):
        return _measured(config, mlp_shape(model_directory))


@contextmanager
def _connected(config: RunConfig) -> Iterator[None]:
    """Join the cluster for a moment, unless this process has joined it already."""
    if ray.is_initialized():
        yield
        return
    connect_to_ray(config, LocalRay())
    try:
        yield
    finally:
        ray.shutdown()


def _measured(config: RunConfig, shape: tuple[int, int]) -> tuple[Machine, ...]:
    nodes = cluster_nodes()
    parts = {node.node_id: _parts_on(config, node, nodes) for node in nodes}
    used = [node for node in nodes if any(parts[node.node_id])]
    found = call_on_nodes([node.node_id for node in used], _measure, shape)
    return tuple(
        Machine(
            name=node.address,
            hardware=found[node.node_id][0],
            speed=found[node.node_id][1],
            gpu_parts=parts[node.node_id][0],
            cpu_parts=parts[node.node_id][1],
        )
        for node in used
    )


def _parts_on(
    config: RunConfig, node: ClusterNode, nodes: tuple[ClusterNode, ...]
) -> tuple[frozenset[str], frozenset[str]]:
    """Return the parts that may compute on a node's GPUs, and those that may on its CPUs."""
    with_gpus = any(one.has("GPU") for one in nodes)
    gpu_parts, cpu_parts = set(), set()
    for bundle in bundles_of(config, with_gpus=with_gpus):
        fits = all(node.has(name) >= need for name, need in bundle.resources.items())
        if fits and node.has_label(bundle.label):
            (gpu_parts if bundle.gpus else cpu_parts).add(bundle.role)
    return frozenset(gpu_parts), frozenset(cpu_parts)


def _measure(shape: tuple[int, int]) -> tuple[Hardware, ProductSpeed]:
    """Return the hardware of this node and the speed of its CPU."""
    # Ray hides the GPUs from a task that reserves none.
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    hardware = detect_hardware()
    return hardware, cached_product_speed(hardware, shape)
