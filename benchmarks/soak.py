"""Run many small steps, and measure from outside whether anything grows with them.

    python -m benchmarks.soak --steps 10000 --directory /tmp/soak
    python -m benchmarks.soak --plot /tmp/soak/soak.csv soak.png

The run is `recipes.grpo_math` on real actors with the tiny model and the transformers engine. Its
steps are as small as they can be, since growth is per step, not per token. Every few seconds the
memory, threads and open files of each of its processes are read from /proc (Linux), and the bytes
of all files that the run and its Ray have written. They go to soak.csv, a line for each value. At
the end the values at 10 % of the run and at the end, and the slope per 1,000 steps over the last
80 %, are printed for each series. Results are in docs/fault_tolerance.md.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import re
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from rlsys.run.observers.run_status import read_status
from tests.support.disturbed_runs import DisturbedRun

MIB = 1024.0**2
RECIPE = "recipes.grpo_math"
FLAGS = (
    *("--model.path", "tiny", "--generation.engine", "transformers"),
    *("--generation.dtype", "float32", "--policy.compute_dtype", "float32"),
    *("--generation.cpus_per_worker", "0", "--policy.threads_per_rank", "1"),
    *("--generation.samples_per_prompt", "2", "--generation.max_tokens", "2"),
    *("--generation.min_tokens", "2", "--trainer.prompts_per_step", "1"),
    *("--plugins", "rlsys_example_plugin", "--reward.functions", "example_digits"),
    *("--data.synthetic.eval_size", "2", "--trainer.save_rollouts_every", "10"),
    *("--trainer.evaluation.every", "250", "--trainer.checkpoints.every", "250"),
)
PROMPT = "{{ problem }}"  # without examples, which a model without knowledge does not need
LIMIT_S = 24 * 3600.0
TRANSIENT = ("IDLE", "other")  # processes that Ray starts ahead and ends as it likes
PANELS = {
    "private memory (MiB)": "private_mib",
    "resident memory, with libraries and object store (MiB)": "resident_mib",
    "object store in use (MiB)": "shared_mib",
    "threads": "threads",
    "open files": "files",
    "files of the run (MiB)": "run_mib",
    "logs of Ray (MiB)": "ray_mib",
    "seconds per step": "step_s",
}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A value of a series at some step."""

    seconds: float  # since the start of the command
    step: int
    measure: str
    name: str  # of a process or a file
    value: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and measure, or draw what was measured."""
    options = _options(arguments)
    if options.plot:
        draw(read_samples(options.plot[0]), options.plot[1])
        return

    # So that the run does not outlive this command.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    directory = options.directory or Path(tempfile.mkdtemp(prefix="rlsys-soak-"))
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "soak.csv"
    print(f"samples go to {path}", flush=True)
    soak(directory, path, options.steps, options.every)
    print(table(read_samples(path)))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=float, default=15.0, help="seconds between two samples")
    parser.add_argument("--directory", type=Path, help="of the run; default: a new one in /tmp")
    parser.add_argument(
        "--plot", nargs=2, type=Path, metavar=("CSV", "PNG"), help="draw a CSV, and run nothing"
    )
    return parser.parse_args(arguments)


def soak(directory: Path, path: Path, steps: int, every_s: float) -> None:
    """Run some steps below a directory, and append samples to a file until the end."""
    template = directory / "prompt.jinja"
    template.write_text(PROMPT)
    flags = (*FLAGS, "--data.template", str(template), "--trainer.steps", str(steps))
    began = time.monotonic()
    with DisturbedRun(directory / "run", *flags, recipe=RECIPE) as run, path.open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["seconds", "step", "measure", "name", "value"])
        while run.wait_until(lambda status: status.state == "running", LIMIT_S):
            for one in samples(run, time.monotonic() - began):
                value = f"{one.value:.6g}"
                writer.writerow([f"{one.seconds:.1f}", one.step, one.measure, one.name, value])
            file.flush()
            with suppress(psutil.TimeoutExpired):
                psutil.Process(run.process.pid).wait(every_s)
        ended = run.end(LIMIT_S)
    assert ended.code == 0, ended.output[-5000:]


def samples(run: DisturbedRun, seconds: float) -> Iterator[Sample]:
    """Yield the present values of all series of a run."""
    status = read_status(run.directory)
    step = status.step if status else 0
    values: dict[tuple[str, str], float] = defaultdict(float)
    with suppress(psutil.NoSuchProcess):
        driver = psutil.Process(run.process.pid)
        for process in (driver, *driver.children(recursive=True)):
            with suppress(psutil.Error, OSError):
                name = "driver" if process == driver else name_of(process)
                for measure, value in use_of(process).items():
                    values[measure, name] += value

    for name, size in sizes(run.directory.path).items():
        values["run_mib", name] += size / MIB
    # Beside the directory: what the console got.
    for file in run.directory.path.parent.glob(f"{run.directory.path.name}-*.out"):
        values["run_mib", "console"] += file.stat().st_size / MIB
    for folder in _log_folders(run):
        for name, size in sizes(folder).items():
            values["ray_mib", name] += size / MIB

    for (measure, name), value in values.items():
        yield Sample(seconds=seconds, step=step, measure=measure, name=name, value=value)


def use_of(process: psutil.Process) -> dict[str, float]:
    """Return what a process uses: MiB of memory, threads, open files, and 1 for itself.

    `shared_mib` is the memory in /dev/shm that it has touched; for the raylet that is the object
    store. `private_mib` is anonymous memory, the part that leaks.
    """
    text = Path(f"/proc/{process.pid}/status").read_text()
    fields = {
        name: rest.split() for name, _, rest in (line.partition(":") for line in text.splitlines())
    }

    def mib(name: str) -> float:
        return int(fields[name][0]) / 1024

    return {
        "resident_mib": mib("VmRSS"),
        "private_mib": mib("RssAnon"),
        "shared_mib": mib("RssShmem"),
        "threads": int(fields["Threads"][0]),
        "files": process.num_fds(),
        "processes": 1,
    }


def name_of(process: psutil.Process) -> str:
    """Return a short name, which the processes of one kind share."""
    words = process.cmdline()
    title = words[0] if words else process.name()
    if title.startswith("ray::"):
        return re.split(r"[.(]", title.removeprefix("ray::"))[0]
    if process.name() in ("raylet", "gcs_server"):
        return process.name()
    parent = process.parent()
    if parent and " ".join(parent.cmdline()).startswith("ray::RewardWorker"):
        return "reward process"
    scripts = [Path(word).stem for word in words if word.endswith(".py")]
    return scripts[0] if scripts else "other"


def sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of all files below a folder, by its entry or a pattern of its name."""
    found: dict[str, int] = defaultdict(int)
    for entry in folder.iterdir():
        # Numbers of processes and of parts of a log: worker-3f..-01000000-123.out, gcs.out.1
        name = re.sub(r"[-_.](?:[0-9a-f]*\d[0-9a-f]*|f+)(?=[-_.]|$)", "", entry.name)
        with suppress(OSError):
            files = entry.rglob("*") if entry.is_dir() else [entry]
            found[name] += sum(file.stat().st_size for file in files if file.is_file())
    return found


def _log_folders(run: DisturbedRun) -> set[Path]:
    """Return the folder of the logs of the run's own Ray."""
    words = [word for one in run.processes("head") for word in one.cmdline()]
    named = (word.removeprefix("--log_dir=") for word in words if word.startswith("--log_dir="))
    return {folder for folder in map(Path, named) if folder.is_dir()}


def read_samples(path: Path) -> list[Sample]:
    """Return the samples of a file, with the seconds per step as a further series."""
    with path.open() as file:
        found = [
            Sample(
                seconds=float(row["seconds"]),
                step=int(row["step"]),
                measure=row["measure"],
                name=row["name"],
                value=float(row["value"]),
            )
            for row in csv.DictReader(file)
        ]
    moments = sorted({(one.seconds, one.step) for one in found})
    for (before, first), (after, last) in itertools.pairwise(moments):
        if last > first:
            value = (after - before) / (last - first)
            found.append(
                Sample(seconds=after, step=last, measure="step_s", name="all", value=value)
            )
    return found


def series_of(found: Sequence[Sample]) -> dict[tuple[str, str], np.ndarray]:
    """Return steps and values `[2, n]` of each series, by measure and name."""
    rows: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for one in found:
        rows[one.measure, one.name].append((one.step, one.value))
    return {key: np.array(pairs).T for key, pairs in rows.items()}


def slope_per_1000(steps: np.ndarray, values: np.ndarray) -> float:
    """Return the slope of the least-squares line over the last 80 % of the steps, per 1,000."""
    late = steps >= steps.min() + 0.2 * (steps.max() - steps.min())
    if len(np.unique(steps[late])) < 2:
        return 0.0
    x = steps[late] - steps[late].mean()
    y = values[late] - values[late][0]  # exactly 0 where nothing changes
    return float((x * y).sum() / (x * x).sum()) * 1000


def table(found: Sequence[Sample]) -> str:
    """Return a Markdown table with a row for each series that was measured until the end."""
    series = series_of(found)
    last = max(one.step for one in found)
    lines = [
        "| measure | of | at 10 % | at the end | per 1,000 steps |",
        "|---|---|---|---|---|",
    ]
    for (measure, name), (steps, values) in sorted(series.items()):
        tenth = values[np.argmin(np.abs(steps - last / 10))]
        cells = [f"{number:.4g}" for number in (tenth, values[-1])]
        slope = f"{slope_per_1000(steps, values):+.3g}"
        lines.append("| " + " | ".join([measure, name, *cells, slope]) + " |")
    return "\n".join(lines)


def draw(found: Sequence[Sample], path: Path) -> None:
    """Draw all series over the steps, a panel for each measure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = series_of(found)
    figure, axes = pyplot.subplots(4, 2, figsize=(11, 13.5), layout="constrained")
    for axis, (title, measure) in zip(axes.flat, PANELS.items(), strict=True):
        own = {name: pair for (key, name), pair in series.items() if key == measure}
        _draw_panel(axis, title, own)
    figure.suptitle(f"{max(one.step for one in found):,} steps")
    figure.savefig(path, dpi=64)
    pyplot.close(figure)


MOST_LINES = 10


def _draw_panel(axis: Any, title: str, own: Mapping[str, np.ndarray]) -> None:
    shown = {name: pair for name, pair in own.items() if name not in TRANSIENT}
    largest = sorted(shown, key=lambda name: -shown[name][1].max())[:MOST_LINES]
    for index, name in enumerate(largest):
        steps, values = shown[name]
        axis.plot(steps, values, label=name, linewidth=1.2, linestyle=("-", "--")[index // 5 % 2])
    axis.set(title=title, xlabel="step")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    if len(largest) > 1:
        axis.legend(fontsize=7)


if __name__ == "__main__":
    main()
