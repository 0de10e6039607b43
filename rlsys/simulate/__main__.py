"""Compare ways to use clusters of several sizes; see docs/simulation.md.

python -m rlsys.simulate --gpus 8,64,512 --plot throughput.png
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlsys.simulate.options import parse_options
from rlsys.simulate.run import SimulatedRun, run_scenario
from rlsys.simulate.scenario import Layout, Scenario, Workload, layouts

COLUMNS = (
    *("gpus", "layout", "staleness", "step s", "tokens/s", "speed-up", "engine use"),
    *("training idle", "stale mean", "stale max", "dropped"),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A layout of a cluster with a schedule, and what it achieves."""

    layout: Layout
    max_staleness: int
    result: SimulatedRun


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table, or JSON."""
    options = parse_options(arguments)
    tables = []
    for gpus in options.gpus:
        try:
            rows = simulate_cluster(gpus, options)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        tables.append(rows if options.all else best_rows(rows))

    if options.json:
        print(json.dumps([_as_json(row) for rows in tables for row in rows], indent=1))
    else:
        _print(tables)
    if options.plot:
        draw(tables, options.plot)
    return 0


def simulate_cluster(gpus: int, options: argparse.Namespace) -> list[Row]:
    """Return a row for each layout and schedule that a cluster of this size allows."""
    found = []
    for layout in layouts(gpus, options.gpus_per_engine):
        # Where all GPUs take turns there is nothing to overlap.
        for staleness in (0,) if layout.colocated else (0, *options.staleness):
            scenario = make_scenario(layout, staleness, options)
            found.append(Row(layout=layout, max_staleness=staleness, result=run_scenario(scenario)))
    return found


def best_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the fastest split for each schedule, and the colocated layout."""
    best: dict[tuple[bool, int], Row] = {}
    for row in rows:
        key = (row.layout.colocated, row.max_staleness)
        if key not in best or row.result.tokens_per_s > best[key].result.tokens_per_s:
            best[key] = row
    return list(best.values())


def make_scenario(layout: Layout, staleness: int, options: argparse.Namespace) -> Scenario:
    """Return the run of a layout with a schedule."""
    workload = Workload(
        prompts_per_step=max(layout.engines, math.ceil(options.prompts_per_gpu * layout.gpus)),
        samples_per_prompt=options.samples,
        lengths=options.lengths,
        reward_s=options.reward_s,
        train_token_s=1 / (options.train_tokens * layout.training_gpus),
        train_fixed_s=options.train_fixed_s,
        sync_s=options.sync_s,
    )
    return Scenario(
        workload=workload,
        engines=layout.engines,
        engine=dataclasses.replace(options.engine, max_sequences=options.max_sequences),
        max_staleness=staleness,
        groups_per_call=min(options.groups_per_call, workload.prompts_per_step),
        steps=options.steps,
        failures=options.failures,
        seed=options.seed,
    )


def name_of(layout: Layout) -> str:
    """Return what a layout is called in tables."""
    if layout.colocated:
        return "all, by turns"
    return f"{layout.generation_gpus} + {layout.training_gpus}"


def _print(tables: Sequence[Sequence[Row]]) -> None:
    """Print a Markdown table. The speed-up is over the best layout without staleness."""
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for rows in tables:
        by_turns = max(row.result.tokens_per_s for row in rows if row.max_staleness == 0)
        for row in rows:
            result = row.result
            cells = [
                row.layout.gpus,
                name_of(row.layout),
                row.max_staleness,
                f"{result.step_s:.0f}",
                f"{result.tokens_per_s:.0f}",
                f"{result.tokens_per_s / by_turns:.2f}",
                f"{result.engine_use:.0%}",
                f"{result.training_idle:.0%}",
                f"{result.staleness_mean:.1f}",
                f"{result.staleness_max:.0f}",
                f"{result.dropped_fraction:.1%}",
            ]
            print("| " + " | ".join(map(str, cells)) + " |")


def _as_json(row: Row) -> dict[str, object]:
    return {
        "layout": dataclasses.asdict(row.layout),
        "max_staleness": row.max_staleness,
        **dataclasses.asdict(row.result),
    }


def draw(tables: Sequence[Sequence[Row]], path: Path) -> None:
    """Draw throughput per GPU over the size of the cluster, a line for each schedule."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, list[tuple[int, float]]] = {}
    for rows in tables:
        for row in best_rows(rows):
            name = "all GPUs by turns" if row.layout.colocated else "split, by turns"
            if row.max_staleness:
                name = f"split, max_staleness {row.max_staleness}"
            rate = row.result.tokens_per_s / row.layout.gpus
            lines.setdefault(name, []).append((row.layout.gpus, rate))

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("trained tokens per second and GPU")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
