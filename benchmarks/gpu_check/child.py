"""Runs one check, in a process of its own: `runner` starts it.

python -m benchmarks.gpu_check.child NAME cpu|cuda FOLDER RESULT
"""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path

from benchmarks.gpu_check.catalogue import Place, named
from benchmarks.gpu_check.results import CheckResult, SkippedError

# Characters of an error that the report repeats.
LONGEST_REASON = 400


def run(name: str, device: str, folder: Path) -> CheckResult:
    """Run a check and return its outcome, whatever it raises."""
    began = time.perf_counter()
    try:
        import torch

        chosen = torch.device("cuda", 0) if device == "cuda" else torch.device(device)
        place = Place(device=chosen, folder=folder)
        finding = named(name).load()(place)
    except SkippedError as skipped:
        seconds = time.perf_counter() - began
        return CheckResult(name=name, status="skipped", reason=str(skipped), seconds=seconds)
    except Exception as error:  # a report of the other checks is worth more than this traceback
        traceback.print_exc()
        message = " ".join(str(error).split())[:LONGEST_REASON]
        seconds = time.perf_counter() - began
        reason = f"{type(error).__name__}: {message}"
        return CheckResult(name=name, status="failed", reason=reason, seconds=seconds)
    return CheckResult.of(name, finding, time.perf_counter() - began)


def main(arguments: list[str]) -> None:
    """Run the check and write its result."""
    name, device, folder, result = arguments
    outcome = run(name, device, Path(folder))
    Path(result).write_text(outcome.to_json())


if __name__ == "__main__":
    main(sys.argv[1:])
