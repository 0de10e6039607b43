"""Prove the CUDA path on one GPU, in less than ten minutes, and write docs/gpu_measurements.md.

    python -m benchmarks.gpu_check                          all checks, on the first visible GPU
    python -m benchmarks.gpu_check --only attention_flex    some
    python -m benchmarks.gpu_check --device cpu             small sizes on a CPU: tests the checks

It needs Python 3.10 or newer, torch, transformers and this repository. A check that needs more is
skipped, with the reason. The exit code is 1 if a check failed, and 2 if none could run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_check.catalogue import CHECKS, MACHINE, Check, named
from benchmarks.gpu_check.report import Report
from benchmarks.gpu_check.results import CheckResult
from benchmarks.gpu_check.runner import ROOT, Limits, run_checks

PAGE = ROOT / "docs" / "gpu_measurements.md"
SECONDS = 570.0


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line."""

    device: str
    only: tuple[str, ...]
    seconds: float
    out: Path | None  # None: the page of the documents on a GPU, nowhere on a CPU


def parse(words: Sequence[str]) -> Arguments:
    """Read the command line; mistakes end the program with code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", default=[], metavar="CHECK", help="these checks alone")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all checks")
    parser.add_argument(
        "--out", type=Path, help="the page; a JSON file is written beside it. On a CPU: none"
    )
    found = parser.parse_args(words)
    try:
        for name in found.only:
            named(name)
    except ValueError as error:
        parser.error(f"--only: {error}")
    if found.seconds <= 0:
        parser.error(f"--seconds: {found.seconds} is no time. Give a positive number.")
    if found.device == "cpu" and found.out and found.out.resolve() == PAGE:
        parser.error(f"--out: {found.out} is for measurements on a GPU. Give another file.")

    out = found.out
    if out is None and found.device == "cuda" and not found.only:
        out = PAGE  # some checks alone would replace the measurements of the others
    return Arguments(device=found.device, only=tuple(found.only), seconds=found.seconds, out=out)


def chosen(only: Sequence[str]) -> tuple[Check, ...]:
    """Return the checks to run; the machine is described in every report."""
    if not only:
        return CHECKS
    return tuple(check for check in CHECKS if check.name in only or check is MACHINE)


def line(result: CheckResult) -> str:
    """Return the line of a check on the console."""
    reason = f"  {result.reason}" if result.reason else ""
    return f"{result.status:8}{result.name:28}{result.seconds:7.1f} s{reason}"


def main(words: Sequence[str]) -> int:
    """Run the checks, print a line for each and write the report. Return the exit code."""
    arguments = parse(words)
    results: list[CheckResult] = []
    # The limits of single checks are those of a GPU; a CPU may be slow or busy.
    on_gpu = arguments.device == "cuda"
    limits = Limits(
        seconds=arguments.seconds, seconds_per_check=None if on_gpu else arguments.seconds
    )
    checks = run_checks(
        chosen(arguments.only),
        device=arguments.device,
        limits=limits,
        asked_for=arguments.only,
    )
    for result in checks:
        print(line(result), flush=True)
        results.append(result)
        if result.name == MACHINE.name and result.status == "failed":
            remedy = " Without a GPU: --device cpu." if on_gpu else ""
            print(f"No check can run on {arguments.device}.{remedy}", file=sys.stderr)
            return 2
        # After each check, so that the report of an interrupted run has what came before.
        if arguments.out is not None:
            Report.of(results, arguments.device).write(arguments.out)

    report = Report.of(results, arguments.device)
    if arguments.out is None:
        print(report.to_markdown())
    else:
        print(f"written: {arguments.out}, {arguments.out.with_suffix('.json')}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
