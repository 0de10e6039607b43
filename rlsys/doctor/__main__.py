"""The command `python -m rlsys.doctor`.

    python -m rlsys.doctor                      this machine
    python -m rlsys.doctor --address auto       every node of a running Ray cluster too
    python -m rlsys.doctor --json               for programs

It exits with 0, or with 1 where a check failed. It starts no Ray of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from rlsys.doctor.checks import machine_findings
from rlsys.doctor.facts import gather
from rlsys.doctor.findings import Finding, failure, passes, skipped

HERE = "this machine"
CLUSTER = "cluster"
CLUSTER_TIMEOUT_S = 120.0
# A process of its own: joining a cluster may hang or abort, and this library knows nothing of Ray.
CLUSTER_PROGRAM = "workers.cluster_doctor"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks, print the findings, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m rlsys.doctor", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_ADDRESS"),
        help="Ray cluster to examine: host:port, or auto for the one on this machine "
        "(default: RAY_ADDRESS)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)

    findings = {HERE: machine_findings(gather())}
    if options.address and options.address != "local":
        findings |= cluster_findings(options.address)
    else:
        findings[CLUSTER] = [skipped("Ray", "No cluster was named; --address examines one.")]

    print(as_json(findings) if options.json else as_text(findings))
    return 0 if all(map(passes, findings.values())) else 1


def cluster_findings(address: str) -> dict[str, list[Finding]]:
    """Return the findings of a cluster and of each of its nodes."""
    program = [sys.executable, "-m", CLUSTER_PROGRAM, address]
    try:
        done = subprocess.run(program, capture_output=True, text=True, timeout=CLUSTER_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {CLUSTER: [_no_answer(address, f"nothing within {CLUSTER_TIMEOUT_S:.0f} s")]}

    lines = done.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError):
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {CLUSTER: [_no_answer(address, reason)]}
    return {
        place: [Finding(**finding) for finding in findings] for place, findings in answer.items()
    }


def _no_answer(address: str, reason: str) -> Finding:
    return failure(
        "Ray",
        f"The check of {address!r} ended without an answer: {reason}.",
        "See the logs of the head node, in /tmp/ray/session_latest/logs.",
    )


def as_text(findings: Mapping[str, Sequence[Finding]]) -> str:
    """Return a line for each finding, below the name of its node."""
    lines = []
    for place, found in findings.items():
        lines.append(f"{place}:")
        lines += [f"  {finding.line()}" for finding in found]
    return "\n".join(lines)


def as_json(findings: Mapping[str, Sequence[Finding]]) -> str:
    """Return {"ok": ..., "findings": {place: [...]}} as JSON."""
    return json.dumps(
        {
            "ok": all(map(passes, findings.values())),
            "findings": {
                place: [asdict(finding) for finding in found] for place, found in findings.items()
            },
        },
        indent=1,
    )


if __name__ == "__main__":
    sys.exit(main())
