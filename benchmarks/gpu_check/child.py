"""Runs one check, in a process of its own: `runner` starts it.

python -m benchmarks.gpu_check.child NAME cpu|cuda FOLDER RESULT
"""

from __future__ import annotations

import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu_check.catalogue import Place, named
from benchmarks.gpu_check.results import CheckResult, Figure, Finding, SkippedError

if TYPE_CHECKING:
    import torch

# Characters of an error that the report repeats.
LONGEST_REASON = 400


def run(name: str, device: str, folder: Path) -> CheckResult:
    """Run a check and return its outcome, whatever it raises."""
    began = time.perf_counter()
    try:
        import torch

        chosen = torch.device("cuda", 0) if device == "cuda" else torch.device(device)
        place = Place(device=chosen, folder=folder)
        finding = with_peak_memory(named(name).load()(place), place.device)
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


def with_peak_memory(finding: Finding, device: torch.device) -> Finding:
    """Add the peak memory of the GPU in this process, unless the check has measured it by phase."""
    if device.type != "cuda" or any("peak memory" in figure.name for figure in finding.figures):
        return finding
    from workers.training.process_group import peak_memory_gib

    peak = Figure(name="peak memory", value=peak_memory_gib(device), unit="GiB")
    return replace(finding, figures=(*finding.figures, peak))


def main(arguments: list[str]) -> None:
    """Run the check and write its result."""
    name, device, folder, result = arguments
    outcome = run(name, device, Path(folder))
    Path(result).write_text(outcome.to_json())


if __name__ == "__main__":
    main(sys.argv[1:])
