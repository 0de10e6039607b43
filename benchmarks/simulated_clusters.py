"""Throughput, idle time and staleness on simulated clusters of 8, 64 and 512 GPUs.

Tables, docs/data/simulated_clusters.csv and the figure of docs/simulation.md, 3 minutes of a core:

    python -m benchmarks.simulated_clusters

A rough look, which writes nothing there:

    python -m benchmarks.simulated_clusters --sizes 8 --steps 12 --directory /tmp/clusters

Each run is one of `rlsys.simulate`, with its defaults but for the settings of SENSITIVITY. Each
schedule has its best split of the GPUs between sampling and training: of all splits by eighths at
the smallest size, and at the others that to which steps of an eighth lead from the best one of the
size before, as long as the throughput grows.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlsys.simulate.__main__ import make_scenario, name_of
from rlsys.simulate.options import parse_options
from rlsys.simulate.run import SimulatedRun, run_scenario
from rlsys.simulate.scenario import Layout, layouts

SCHEDULES = (0, 1, 2, 4, 8)  # max_staleness; 0: sampling and training take turns
STEPS = {8: 48, 64: 12}  # that count; the smaller the batch, the more a mean needs
LARGE_STEPS = 6  # of other sizes
SENSITIVITY_GPUS = 64
SENSITIVITY_SCHEDULE = 4
SENSITIVITY: dict[str, tuple[str, ...]] = {
    "equal lengths": ("--lengths", "constant:2400"),
    "tail sigma 0.5": ("--lengths", "lognormal:2100,0.5,16000"),
    "tail sigma 1.5": ("--lengths", "lognormal:1050,1.5,16000"),
    "sync 0 s": ("--sync-s", "0"),
    "sync 30 s": ("--sync-s", "30"),
    "training twice as fast": ("--train-tokens", "14000"),
}
COLUMNS = (
    *("GPUs", "schedule", "layout", "step s", "tokens/s", "speed-up", "generation idle"),
    *("training idle", "staleness mean", "max", "dropped"),
)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A schedule with a layout, and what it achieves."""

    setting: str  # "" for the defaults
    layout: Layout
    max_staleness: int
    result: SimulatedRun

    @property
    def schedule(self) -> str:
        if self.max_staleness:
            return f"max_staleness {self.max_staleness}"
        return "by turns, colocated" if self.layout.colocated else "by turns, split"


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate everything, print the tables, and write the CSV file and the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=(8, 64, 512))
    parser.add_argument("--steps", type=int, help="that count, at every size")
    parser.add_argument("--directory", type=Path, default=Path("docs"))
    options = parser.parse_args(arguments)

    start = time.process_time()
    found = sizes(sorted(options.sizes), options.steps)
    print_sizes(found)
    write(found, options.directory / "data" / "simulated_clusters.csv")
    draw(found, options.directory / "images" / "simulated_clusters.png")
    if SENSITIVITY_GPUS in options.sizes:
        print_sensitivity(found, sensitivity(found, options.steps))
    log(f"{time.process_time() - start:.0f} s of one core")


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def sizes(gpus: Sequence[int], steps: int | None) -> list[Found]:
    """Return the best layout of each schedule at each size."""
    found: list[Found] = []
    eighths: dict[int, int] = {}  # the best split of each schedule at the size before
    for size in gpus:
        flags = ("--steps", str(steps or STEPS.get(size, LARGE_STEPS)))
        colocated, *splits = layouts(size, gpus_per_engine=1)
        found.append(simulate_layout(colocated, 0, flags))
        for schedule in SCHEDULES:
            best = best_split(splits, schedule, flags, "", eighths.get(schedule))
            eighths[schedule] = splits.index(best.layout)
            found.append(best)
    return found


def sensitivity(base: Sequence[Found], steps: int | None) -> list[Found]:
    """Return the best layouts at one size, by turns and asynchronous, with other assumptions."""
    counted = str(steps or STEPS[SENSITIVITY_GPUS])
    colocated, *splits = layouts(SENSITIVITY_GPUS, gpus_per_engine=1)
    found: list[Found] = []
    for setting, flags in SENSITIVITY.items():
        flags = (*flags, "--steps", counted)
        found.append(simulate_layout(colocated, 0, flags, setting))
        for schedule in (0, SENSITIVITY_SCHEDULE):
            first = splits.index(row_of(base, SENSITIVITY_GPUS, schedule).layout)
            found.append(best_split(splits, schedule, flags, setting, first))
    return found


def row_of(found: Sequence[Found], gpus: int, schedule: int) -> Found:
    """Return the best split of a schedule."""
    return next(
        row
        for row in found
        if row.layout.gpus == gpus and row.max_staleness == schedule and not row.layout.colocated
    )


def by_turns(found: Sequence[Found], gpus: int, setting: str = "") -> float:
    """Return the throughput of the faster of the two layouts without staleness."""
    return max(
        row.result.tokens_per_s
        for row in found
        if row.layout.gpus == gpus and row.setting == setting and not row.max_staleness
    )


def simulate_layout(
    layout: Layout, schedule: int, flags: Sequence[str], setting: str = ""
) -> Found:
    """Return what one run achieves."""
    start = time.process_time()
    result = run_scenario(make_scenario(layout, schedule, parse_options(flags)))
    row = Found(setting=setting, layout=layout, max_staleness=schedule, result=result)
    log(
        f"{setting} {layout.gpus} GPUs, {row.schedule}, {name_of(layout)}: "
        f"{result.tokens_per_s:.0f} tokens/s ({time.process_time() - start:.1f} s)"
    )
    return row


def best_split(
    splits: Sequence[Layout],
    schedule: int,
    flags: Sequence[str],
    setting: str,
    first: int | None,
) -> Found:
    """Return the fastest split: of all, or the one to which the way up from `first` leads."""

    def run(index: int) -> Found:
        return simulate_layout(splits[index], schedule, flags, setting)

    if first is None:
        return max(map(run, range(len(splits))), key=lambda row: row.result.tokens_per_s)
    return climb(run, first, len(splits))


def climb(run: Callable[[int], Found], first: int, count: int) -> Found:
    """Return the fastest of `count` runs, where there is one maximum; start at `first`."""
    best = run(first)
    for direction in (1, -1):
        index = first + direction
        moved = False
        while 0 <= index < count:
            other = run(index)
            if other.result.tokens_per_s <= best.result.tokens_per_s:
                break
            best = other
            moved = True
            index += direction
        if moved:
            break
    return best


def print_sizes(found: Sequence[Found]) -> None:
    """Print a row for each size and schedule, as Markdown."""
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for row in found:
        result = row.result
        cells = (
            str(row.layout.gpus),
            row.schedule,
            name_of(row.layout),
            f"{result.step_s:.0f}",
            f"{result.tokens_per_s:,.0f}",
            f"{result.tokens_per_s / by_turns(found, row.layout.gpus):.2f}",
            f"{result.generation_idle:.0%}",
            f"{result.training_idle:.0%}",
            f"{result.staleness_mean:.1f}",
            f"{result.staleness_max:.0f}",
            f"{result.dropped_fraction:.1%}",
        )
        print("| " + " | ".join(cells) + " |")


def print_sensitivity(base: Sequence[Found], varied: Sequence[Found]) -> None:
    """Print the speed-up of one schedule at one size, with each setting."""
    print("\n| setting | by turns, tokens/s | asynchronous, tokens/s | best split | speed-up |")
    print("|---|---|---|---|---|")
    for setting in ("", *SENSITIVITY):
        rows = [row for row in (*base, *varied) if row.setting == setting]
        best = row_of(rows, SENSITIVITY_GPUS, SENSITIVITY_SCHEDULE)
        turns, rate = by_turns(rows, SENSITIVITY_GPUS, setting), best.result.tokens_per_s
        print(
            f"| {setting or 'the defaults'} | {turns:,.0f} | {rate:,.0f} | {name_of(best.layout)} "
            f"| {rate / turns:.2f} |"
        )


def write(found: Sequence[Found], path: Path) -> None:
    """Write all figures, a row for each size and schedule."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        fields = [field.name for field in dataclasses.fields(SimulatedRun)]
        # Of all figures only the driver's seconds differ between two runs.
        fields.remove("driver_cpu_s")
        writer = csv.writer(file, lineterminator="\n")
        layout = ("gpus", "generation_gpus", "training_gpus")
        writer.writerow([*layout, "max_staleness", *fields])
        for row in found:
            place = [getattr(row.layout, name) for name in layout]
            numbers = [f"{getattr(row.result, name):.6g}" for name in fields]
            writer.writerow([*place, row.max_staleness, *numbers])


def draw(found: Sequence[Found], path: Path) -> None:
    """Draw throughput, idle time and staleness over the size of the cluster."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    gpus = sorted({row.layout.gpus for row in found})
    schedules = list(dict.fromkeys(row.schedule for row in found))
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4.4), layout="constrained")
    titles = (
        "trained tokens/s and GPU",
        "idle share of all GPUs",
        "staleness: mean, and line up to the maximum",
    )
    width = 0.8 / len(schedules)
    for number, schedule in enumerate(schedules):
        own = [row for row in found if row.schedule == schedule]
        at = [gpus.index(row.layout.gpus) - 0.4 + (number + 0.5) * width for row in own]
        color = f"C{number}"
        rates = [row.result.tokens_per_s / row.layout.gpus for row in own]
        axes[0].bar(at, rates, width, color=color, label=schedule)
        axes[1].bar(at, [idle_share(row) for row in own], width, color=color)
        means = [row.result.staleness_mean for row in own]
        above = [row.result.staleness_max - mean for row, mean in zip(own, means, strict=True)]
        axes[2].bar(at, means, width, color=color, yerr=([0] * len(own), above), capsize=2)

    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=11)
        axis.set_xticks(range(len(gpus)), [f"{size} GPUs" for size in gpus])
        axis.set_ylim(bottom=0)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    axes[1].yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
    figure.legend(loc="outside lower center", ncols=len(schedules), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def idle_share(row: Found) -> float:
    """Return the fraction of all GPUs' time without a sequence or an update."""
    generation, training = row.result.generation_idle, row.result.training_idle
    if row.layout.colocated:
        return generation + training - 1  # each waits while the other works
    weighted = generation * row.layout.generation_gpus + training * row.layout.training_gpus
    return weighted / row.layout.gpus


if __name__ == "__main__":
    main()
