"""Places of a run's actors: the nodes of the cluster, what they lack, and who goes where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import ray
import ray.util.client
from ray._private.state import available_resources_per_node
from ray.exceptions import RayError
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlsys.config.node_label import split_label

if TYPE_CHECKING:
    from workers.cluster import Bundle

T = TypeVar("T")

# The fields that decide how many actors of a role there are, what each reserves, and where it goes.
COUNT = {"policy": "policy.ranks", "generation": "generation.workers"}
CPUS = {"policy": "policy.cpus_per_rank", "generation": "generation.cpus_per_worker"}
GPUS = {"policy": "policy.gpus_per_rank", "generation": "generation.gpus_per_worker"}
LABEL = {
    "policy": "policy.node_label",
    "generation": "generation.node_label",
    "reward": "reward.node_label",
}


@dataclass(frozen=True, kw_only=True)
class ClusterNode:
    """One node of a Ray cluster."""

    node_id: str
    address: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]

    def has_label(self, label: str | None) -> bool:
        """Return whether an actor with the setting `node_label` may run here."""
        if label is None:
            return True
        name, value = split_label(label)
        return self.labels.get(name) == value

    def has(self, resource: str) -> float:
        return self.resources.get(resource, 0.0)


def cluster_nodes() -> tuple[ClusterNode, ...]:
    """Return the nodes that are alive, in the order of their addresses."""
    nodes = [
        ClusterNode(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            resources=node["Resources"],
            labels=node.get("Labels") or {},
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return tuple(sorted(nodes, key=lambda node: (_numbers(node.address), node.node_id)))


def _numbers(address: str) -> tuple[tuple[int, str], ...]:
    """Return a key that sorts 10.0.0.2 before 10.0.0.10."""
    return tuple((int(part), "") if part.isdecimal() else (0, part) for part in address.split("."))


def driver_node() -> str | None:
    """Return the id of the node on which this process runs; None for a client of a remote one."""
    if ray.util.client.ray.is_connected():
        return None
    return ray.get_runtime_context().get_node_id()


def call_on_nodes(
    nodes: Sequence[str], function: Callable[..., T], *arguments: Any
) -> dict[str, T]:
    """Return the results of a function on some nodes by their ids; all run it at the same time."""
    remote: Any = ray.remote(num_cpus=0, max_retries=1)(function)
    calls = [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            *arguments
        )
        for node in nodes
    ]
    return dict(zip(nodes, ray.get(calls), strict=True))


async def node_answers(node: str) -> bool:
    """Return whether a node is alive, also where Ray has not noticed its death yet.

    It waits until Ray has.
    """
    if node == driver_node():
        return True
    remote: Any = ray.remote(num_cpus=0, max_retries=0)(_answer)
    place = NodeAffinitySchedulingStrategy(node, soft=False)
    try:
        await remote.options(scheduling_strategy=place).remote()
    except RayError:
        return False
    return True


def _answer() -> None: ...


def own_label(node: ClusterNode) -> str:
    """Return the labels that a user gave to a node, in words."""
    own = [f"{name}={value}" for name, value in sorted(node.labels.items()) if "ray.io" not in name]
    return ", ".join(own) or "no label"


def placement_mistakes(
    bundles: Sequence[Bundle], nodes: Sequence[ClusterNode], strategy: str
) -> Iterator[str]:
    """Yield why the cluster could not place the bundles even if nobody else used it, a line each.

    A line names the field, the need, what each node has, and the remedy. Only what is certain is
    named: bundles that pass may still not fit together.
    """
    lines: list[str] = []
    for role in dict.fromkeys(bundle.role for bundle in bundles):
        own = [bundle for bundle in bundles if bundle.role == role]
        lines += _mistakes_of_role(own, nodes, strategy)
    if not lines:
        lines += _mistakes_of_all(bundles, nodes, strategy)
    yield from lines


def _mistakes_of_role(
    bundles: Sequence[Bundle], nodes: Sequence[ClusterNode], strategy: str
) -> Iterator[str]:
    first, count = bundles[0], len(bundles)
    role, label = first.role, first.label
    allowed = [node for node in nodes if node.has_label(label)]
    if not allowed:
        yield label_mistake(role, label, nodes)
        return

    for resource, fields in (("CPU", CPUS), ("GPU", GPUS)):
        need = first.resources.get(resource, 0.0)
        if need and not any(node.has(resource) >= need for node in allowed):
            yield (
                f"{fields[role]}: each of {COUNT[role]} {count} needs {need:g} {resource}s on one "
                f"node, and no node{_with_label(label)} has them: "
                f"{_what_nodes_have(allowed, resource, need)}. Lower it, or use larger nodes."
            )
            return

    room = sum(_room(first, node) for node in allowed)
    if room < count:
        yield (
            f"{COUNT[role]}: {count} actors with {in_words(first.resources)} each, and the nodes"
            f"{_with_label(label)} have room for {room:g}: {_all_that_nodes_have(allowed)}. Lower "
            "it or what each reserves, or use a larger cluster."
        )
    elif strategy == "STRICT_SPREAD" and len(allowed) < count:
        yield (
            f"cluster.placement: STRICT_SPREAD places each of {COUNT[role]} {count} on a node of "
            f"its own, and there are {len(allowed)} nodes{_with_label(label)}: "
            f"{_all_that_nodes_have(allowed)}. Lower {COUNT[role]}, or choose SPREAD."
        )


def _mistakes_of_all(
    bundles: Sequence[Bundle], nodes: Sequence[ClusterNode], strategy: str
) -> Iterator[str]:
    counts = " and ".join(COUNT[role] for role in dict.fromkeys(b.role for b in bundles))
    for resource in ("CPU", "GPU"):
        need = sum(bundle.resources.get(resource, 0.0) for bundle in bundles)
        total = sum(node.has(resource) for node in nodes)
        if need > total:
            yield (
                f"{counts}: the run needs {need:g} {resource}s, the cluster has {total:g}: "
                f"{_what_nodes_have(nodes, resource)}. Lower them or the {resource}s of each, or "
                "use a larger cluster."
            )
            return
        if strategy == "STRICT_PACK" and not any(node.has(resource) >= need for node in nodes):
            yield (
                f"cluster.placement: STRICT_PACK places all actors on one node, they need {need:g} "
                f"{resource}s, and no node has them: {_what_nodes_have(nodes, resource, need)}. "
                "Choose PACK."
            )
            return
    if strategy == "STRICT_SPREAD" and len(bundles) > len(nodes):
        yield (
            f"cluster.placement: STRICT_SPREAD places each of {counts}, {len(bundles)} actors, on "
            f"a node of its own, and there are {len(nodes)}: {_all_that_nodes_have(nodes)}. Choose "
            "SPREAD."
        )


def label_mistake(role: str, label: str | None, nodes: Sequence[ClusterNode]) -> str:
    """Describe that no node has the label of a role."""
    known = "; ".join(f"{node.address}: {own_label(node)}" for node in nodes)
    return (
        f"{LABEL[role]}: no node of the cluster has the label {label!r} ({known}). Start Ray on a "
        f"node with `ray start --labels {label}`, or change it."
    )


def _with_label(label: str | None) -> str:
    return f" with the label {label}" if label else ""


def _room(bundle: Bundle, node: ClusterNode) -> float:
    """Return how many such bundles an empty node holds."""
    needs = {name: need for name, need in bundle.resources.items() if name in ("CPU", "GPU")}
    if not needs:
        return float("inf")
    return min((node.has(name) + 1e-6) // need for name, need in needs.items())


def in_words(resources: Mapping[str, float]) -> str:
    """Return the CPUs and GPUs of a bundle or a node in words."""
    words = [f"{resources[name]:g} {name}s" for name in ("CPU", "GPU") if name in resources]
    return " and ".join(words) or "no CPUs"


def _what_nodes_have(nodes: Sequence[ClusterNode], resource: str, need: float | None = None) -> str:
    """Return what each node has of a resource and, for a need on one node, what it lacks."""
    parts = []
    for node in nodes:
        has = node.has(resource)
        lack = f" (lacks {need - has:g})" if need is not None and need > has else ""
        parts.append(f"{node.address} has {has:g} {resource}s{lack}")
    return "; ".join(parts)


def _all_that_nodes_have(nodes: Sequence[ClusterNode]) -> str:
    return "; ".join(f"{node.address} has {in_words(node.resources)}" for node in nodes)


def free_resources(nodes: Sequence[ClusterNode]) -> str:
    """Return what is free on each node at present, in words."""
    free = available_resources_per_node()
    return "; ".join(
        f"{node.address} has {in_words(dict.fromkeys(('CPU',), 0.0) | free.get(node.node_id, {}))} "
        f"free of {in_words(node.resources)}"
        for node in nodes
    )


@dataclass(frozen=True, kw_only=True)
class Place:
    """An actor, or several beside each other, and its node."""

    actor: str
    address: str
    reserves: str


def places_table(places: Sequence[Place]) -> str:
    """Return a line for each actor: its name, its node, and what it reserves there."""
    widths = [max(len(row) for row in column) for column in zip(*map(_cells, places), strict=True)]
    lines = []
    for place in places:
        actor, address, reserves = _cells(place)
        lines.append(f"  {actor:<{widths[0]}}  {address:<{widths[1]}}  {reserves}".rstrip())
    return "\n".join(lines)


def _cells(place: Place) -> tuple[str, str, str]:
    return place.actor, place.address, place.reserves


def bundle_nodes(reservation: Any) -> list[str]:
    """Return the node id of each bundle of a placement group that was made.

    It is empty for a bundle whose node has died.
    """
    found = placement_group_table(reservation)["bundles_to_node_id"]
    return [found[position] for position in range(len(found))]
