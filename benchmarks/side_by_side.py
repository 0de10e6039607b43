"""The same GRPO step in rlsys and in TRL, in turn, on the same cores with the same settings.

    . .venv/bin/activate
    python -m benchmarks.side_by_side                          32, 220 and 512 tokens
    python -m benchmarks.side_by_side --tokens 32 --rounds 3
    python -m benchmarks.side_by_side --avx2                   as on a CPU without AVX-512

The script makes an environment for TRL once (`--environment`). Both get the allocator's settings
of `workers/cluster.py`, and as many threads as this process may use. TRL runs at each micro-batch
size of `--micro-batches`, and its best one counts. A ratio is that of two runs one after the other;
the median over the rounds is printed with the smallest and the largest. Results are recorded in
docs/measurements.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlsys.config.hardware import detect_hardware
from rlsys.models import resolve_model
from rlsys.models.catalogue import cache_directory
from workers.cluster import ALLOCATOR

MODEL = "smollm2-135m"
PACKAGES = ("torch==2.13.0", "trl==1.16.*", "accelerate", "datasets")
TRL_STEP = Path(__file__).with_name("trl_step.py")
# These limit torch and oneDNN to the instructions of a CPU without AVX-512.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table."""

    tokens: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Medians of one run."""

    seconds: float  # per step
    gib: float  # peak memory of all processes that hold the model


def trl_python(environment: Path) -> Path:
    """Return the interpreter of TRL's environment, which is made if it does not exist."""
    python = environment / "bin" / "python"
    complete = environment / ".complete"
    if complete.exists():
        return python

    subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    complete.touch()
    return python


def last_json(command: Sequence[str], settings: dict[str, str]) -> dict[str, float]:
    """Run a command and return the JSON of its last line.

    Raises:
        RuntimeError: the command failed; with the end of what it printed.
    """
    environment = {**os.environ, **ALLOCATOR, **settings}
    environment["OMP_NUM_THREADS"] = str(detect_hardware().cpus)
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def rlsys_figures(case: Case, steps: int, settings: dict[str, str]) -> Figures:
    """Return the figures of rlsys."""
    name = f"{MODEL},{case.dtype},0"
    command = [sys.executable, "-m", "benchmarks.grpo_step", "--json", "--cases", name]
    command += ["--tokens", str(case.tokens), "--steps", str(steps)]
    values = last_json(command, settings)
    gib = values["memory/policy"] + values["memory/generation"]
    return Figures(seconds=values["time/step"], gib=gib)


def trl_figures(
    case: Case, steps: int, micro_batch: int, python: Path, settings: dict[str, str]
) -> Figures:
    """Return the figures of TRL at one micro-batch size."""
    command = [str(python), str(TRL_STEP), str(resolve_model(MODEL)), "--json"]
    command += ["--dtype", case.dtype, "--micro-batch", str(micro_batch)]
    command += ["--tokens", str(case.tokens), "--steps", str(steps)]
    values = last_json(command, settings)
    return Figures(seconds=values["seconds"], gib=values["gib"])


def main() -> None:
    """Print a row for each case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", nargs="*", type=int, default=[32, 220, 512])
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--micro-batches", nargs="*", type=int, default=[8, 16, 32])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="counted steps of a run")
    parser.add_argument("--avx2", action="store_true", help="only the instructions of AVX2")
    parser.add_argument("--environment", type=Path, default=cache_directory() / "trl")
    arguments = parser.parse_args()

    python = trl_python(arguments.environment)
    settings = AVX2 if arguments.avx2 else {}
    print(
        "| tokens, precision | TRL, s | GiB | rlsys, s | GiB | ratio |\n|---|---|---|---|---|---|"
    )
    for tokens in arguments.tokens:
        for dtype in arguments.dtypes:
            case = Case(tokens=tokens, dtype=dtype)
            trl: list[Figures] = []
            own: list[Figures] = []
            for _ in range(arguments.rounds):
                own.append(rlsys_figures(case, arguments.steps, settings))
                sizes = [
                    trl_figures(case, arguments.steps, size, python, settings)
                    for size in arguments.micro_batches
                ]
                trl.append(min(sizes, key=lambda figures: figures.seconds))
            print(row(case, trl, own), flush=True)


def row(case: Case, trl: Sequence[Figures], own: Sequence[Figures]) -> str:
    """Return one row of the table."""
    ratios = [theirs.seconds / ours.seconds for theirs, ours in zip(trl, own, strict=True)]
    cells = [
        f"{case.tokens}, {case.dtype}",
        f"{statistics.median(run.seconds for run in trl):.1f}",
        f"{max(run.gib for run in trl):.1f}",
        f"{statistics.median(run.seconds for run in own):.1f}",
        f"{max(run.gib for run in own):.1f}",
        f"**{statistics.median(ratios):.1f}** ({min(ratios):.1f} to {max(ratios):.1f})",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
