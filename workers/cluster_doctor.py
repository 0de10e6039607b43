"""The part of `python -m rlsys.doctor` that needs Ray: joins a cluster and asks each of its nodes.

    python -m workers.cluster_doctor ADDRESS

prints a JSON object as its last line: the findings of "cluster" and of each node by its address.
Each node is examined by a task that reserves no resources, so that a busy cluster answers too.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlsys.doctor.checks import machine_findings
from rlsys.doctor.facts import gather
from rlsys.doctor.findings import Finding, failure, ok, warning
from workers.local_ray import refuses_token

NODE_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 5.0
CLUSTER = "cluster"


@dataclass(frozen=True, kw_only=True)
class Examination:
    """One node: its findings, and what must agree between nodes."""

    findings: tuple[Finding, ...]
    versions: Mapping[str, str]
    bfloat16: tuple[str, ...]


def examine() -> Examination:
    """Return the examination of the machine on which this runs."""
    facts = gather()
    return Examination(
        findings=tuple(machine_findings(facts)),
        versions=dict(facts.versions),
        bfloat16=facts.hardware.bfloat16_instructions,
    )


def examine_cluster(address: str) -> dict[str, list[Finding]]:
    """Join the cluster at `address`, and return the findings of all its nodes."""
    refused = connection_error(address)
    if refused is not None:
        return {CLUSTER: [refused]}

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        return {CLUSTER: [join_failure(address, error)]}
    try:
        alive = [node for node in ray.nodes() if node["Alive"]]
        answers = {node["NodeManagerAddress"]: _ask(node["NodeID"]) for node in alive}
        nodes = {place: _answer(place, answer) for place, answer in answers.items()}
    finally:
        ray.shutdown()

    joined = ok("Ray", f"{address!r} answers and accepts the token; nodes: {len(nodes)}.")
    examined = {place: answer for place, answer in nodes.items() if isinstance(answer, Examination)}
    findings = {CLUSTER: [joined, *disagreements(examined)]}
    for place, answer in nodes.items():
        findings[place] = [answer] if isinstance(answer, Finding) else list(answer.findings)
    return findings


def connection_error(address: str) -> Finding | None:
    """Return a failure where an address cannot be one, or nothing listens at host:port.

    Ray itself would wait for a minute.
    """
    if address.startswith(("http://", "https://")):
        return failure(
            "Ray",
            f"{address!r} is the address of a job server.",
            "Give the host:port of the head (6379 by default), or auto on a node of the cluster.",
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return None
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return failure(
            "Ray",
            f"Nothing listens at {address!r} ({error.strerror or error}).",
            "Start the head node with `ray start --head --port=...`, and check firewalls.",
        )
    return None


def join_failure(address: str, error: Exception) -> Finding:
    """Return the failure to join a cluster: no cluster, another token, or another version."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if refuses_token(error):
        return failure(
            "Ray",
            f"The cluster at {address!r} refuses the token.",
            "Set RAY_AUTH_MODE=token, and copy the head's ~/.ray/auth_token or set RAY_AUTH_TOKEN.",
        )
    return failure(
        "Ray",
        f"The cluster at {address!r} cannot be joined: {reason}",
        "Start the head node with `ray start --head`, and use its versions of Ray and Python.",
    )


def _ask(node: str) -> ray.ObjectRef:
    """Start the examination of a node."""
    place = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(examine).options(num_cpus=0, max_retries=0, scheduling_strategy=place)
    return task.remote()


def _answer(place: str, reference: ray.ObjectRef) -> Examination | Finding:
    """Return a node's examination, or the failure to make it."""
    try:
        return ray.get(reference, timeout=NODE_TIMEOUT_S)
    except GetTimeoutError:
        return failure(
            "Ray", f"{place} did not answer within {NODE_TIMEOUT_S:.0f} s.", "Check its raylet."
        )
    except (RayError, ImportError) as error:
        reason = str(error).strip().splitlines()[-1]
        return failure(
            "Ray",
            f"{place} could not examine itself: {reason}",
            "rlsys must be importable there: use the image, install it, or submit this command as "
            "a job with --working-dir.",
        )


def disagreements(nodes: Mapping[str, Examination]) -> list[Finding]:
    """Return what differs between nodes: versions, and the precision that `auto` would choose."""
    findings = []
    packages = dict.fromkeys(name for node in nodes.values() for name in node.versions)
    for package in packages:
        found = {place: node.versions.get(package, "none") for place, node in nodes.items()}
        if len(set(found.values())) > 1:
            findings.append(
                failure(
                    "versions",
                    f"{package} differs: {_listed(found)}.",
                    "Install the same environment on all nodes.",
                )
            )
    instructions = {place: ", ".join(node.bfloat16) or "none" for place, node in nodes.items()}
    if len(set(instructions.values())) > 1:
        findings.append(
            warning(
                "cpu",
                f"The instructions for bfloat16 differ: {_listed(instructions)}.",
                "With auto, nodes that would choose differently all compute in float32; set "
                "generation.dtype and policy.compute_dtype to choose yourself.",
            )
        )
    return findings


def _listed(found: Mapping[str, str]) -> str:
    return "; ".join(f"{place} {value}" for place, value in found.items())


if __name__ == "__main__":
    answer = examine_cluster(sys.argv[1])
    print(json.dumps({place: list(map(asdict, found)) for place, found in answer.items()}))
