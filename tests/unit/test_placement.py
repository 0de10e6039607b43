"""What a cluster has no place for, and how that is said."""

from __future__ import annotations

import pytest

from workers.cluster import Bundle
from workers.placement import ClusterNode, Place, placement_mistakes, places_table


def node(number: int, *, cpus: float = 2, gpus: float = 0, **labels: str) -> ClusterNode:
    resources = {"CPU": cpus, "memory": 1e9} | ({"GPU": gpus} if gpus else {})
    return ClusterNode(
        node_id=f"id{number}", address=f"10.0.0.{number}", resources=resources, labels=labels
    )


def ranks(count: int, *, cpus: float = 1, gpus: float = 0, label: str | None = None):
    return tuple(
        Bundle(role="policy", index=index, cpus=cpus, gpus=gpus, label=label)
        for index in range(count)
    )


def workers(count: int, *, cpus: float = 1, label: str | None = None):
    return tuple(
        Bundle(role="generation", index=index, cpus=cpus, gpus=0, label=label)
        for index in range(count)
    )


THREE = (node(1), node(2, pool="train"), node(3, cpus=4, pool="train"))


@pytest.mark.parametrize(
    ("bundles", "strategy"),
    [
        ((*ranks(4), *workers(4)), "PACK"),  # 8 CPUs of 8
        (ranks(1, cpus=4), "PACK"),
        (ranks(6, label="pool=train"), "SPREAD"),  # 2 + 4
        (ranks(2, label="pool=train"), "STRICT_SPREAD"),
        ((*ranks(2), *workers(2)), "STRICT_PACK"),  # all on the third
        ((*ranks(1), *workers(1, cpus=0)), "STRICT_SPREAD"),
    ],
)
def test_what_fits_is_not_refused(bundles: tuple[Bundle, ...], strategy: str):
    assert list(placement_mistakes(bundles, THREE, strategy)) == []


@pytest.mark.parametrize(
    ("bundles", "strategy", "message"),
    [
        (
            ranks(1, label="pool=gpu"),
            "PACK",
            "policy.node_label: no node of the cluster has the label 'pool=gpu' (10.0.0.1: no "
            "label; 10.0.0.2: pool=train; 10.0.0.3: pool=train). Start Ray on a node with `ray "
            "start --labels pool=gpu`, or change it.",
        ),
        (
            ranks(1, cpus=5),
            "PACK",
            "policy.cpus_per_rank: each of policy.ranks 1 needs 5 CPUs on one node, and no node "
            "has them: 10.0.0.1 has 2 CPUs (lacks 3); 10.0.0.2 has 2 CPUs (lacks 3); 10.0.0.3 has "
            "4 CPUs (lacks 1). Lower it, or use larger nodes.",
        ),
        (
            ranks(1, gpus=1, label="pool=train"),
            "PACK",
            "policy.gpus_per_rank: each of policy.ranks 1 needs 1 GPUs on one node, and no node "
            "with the label pool=train has them: 10.0.0.2 has 0 GPUs (lacks 1); 10.0.0.3 has 0 "
            "GPUs (lacks 1). Lower it, or use larger nodes.",
        ),
        (
            workers(4, cpus=2),  # 1 + 1 + 2 is 4
            "PACK",
            None,
        ),
        (
            workers(3, cpus=3),  # 9 CPUs of 8, and only one fits into 2, 2 and 4
            "PACK",
            "generation.workers: 3 actors with 3 CPUs each, and the nodes have room for 1: "
            "10.0.0.1 has 2 CPUs; 10.0.0.2 has 2 CPUs; 10.0.0.3 has 4 CPUs. Lower it or what each "
            "reserves, or use a larger cluster.",
        ),
        (
            (*ranks(5), *workers(5)),
            "PACK",
            "policy.ranks and generation.workers: the run needs 10 CPUs, the cluster has 8: "
            "10.0.0.1 has 2 CPUs; 10.0.0.2 has 2 CPUs; 10.0.0.3 has 4 CPUs. Lower them or the "
            "CPUs of each, or use a larger cluster.",
        ),
        (
            ranks(3, label="pool=train"),
            "STRICT_SPREAD",
            "cluster.placement: STRICT_SPREAD places each of policy.ranks 3 on a node of its own, "
            "and there are 2 nodes with the label pool=train: 10.0.0.2 has 2 CPUs; 10.0.0.3 has 4 "
            "CPUs. Lower policy.ranks, or choose SPREAD.",
        ),
        (
            (*ranks(2), *workers(2)),
            "STRICT_SPREAD",
            "cluster.placement: STRICT_SPREAD places each of policy.ranks and generation.workers, "
            "4 actors, on a node of its own, and there are 3: 10.0.0.1 has 2 CPUs; 10.0.0.2 has 2 "
            "CPUs; 10.0.0.3 has 4 CPUs. Choose SPREAD.",
        ),
        (
            (*ranks(3), *workers(2)),
            "STRICT_PACK",
            "cluster.placement: STRICT_PACK places all actors on one node, they need 5 CPUs, and "
            "no node has them: 10.0.0.1 has 2 CPUs (lacks 3); 10.0.0.2 has 2 CPUs (lacks 3); "
            "10.0.0.3 has 4 CPUs (lacks 1). Choose PACK.",
        ),
    ],
)
def test_what_has_no_place_is_refused_with_what_each_node_lacks(
    bundles: tuple[Bundle, ...], strategy: str, message: str | None
):
    expected = [] if message is None else [message]
    assert list(placement_mistakes(bundles, THREE, strategy)) == expected


def test_a_table_has_a_line_for_each_actor():
    places = [
        Place(actor="policy-0, reference-0", address="10.0.0.2", reserves="1 CPUs"),
        Place(actor="reward-0", address="10.0.0.10", reserves="nothing"),
    ]
    assert places_table(places).splitlines() == [
        "  policy-0, reference-0  10.0.0.2   1 CPUs",
        "  reward-0               10.0.0.10  nothing",
    ]
