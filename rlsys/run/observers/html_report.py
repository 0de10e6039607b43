"""report.html: one self-contained page about a run, made from its directory.

The page opens from disk without a network: curves are SVG, the little script for hover values is inline. A run writes it as it goes; it can be
made again at any time, also of a run that died:

    python -m rlsys.run.observers.html_report runs/NAME
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import yaml

from rlsys.data.rollout_files import read_rollouts
from rlsys.run.directory import RunDirectory
from rlsys.run.observers.charts import Series, format_number, line_chart, stacked_bars
from rlsys.run.observers.metrics_log import MetricsRecord, read_metrics
from rlsys.run.observers.observer import PHASES, Observer, Outcome
from rlsys.run.observers.run_status import RunStatus, read_status
from rlsys.run.observers.run_summary import (
    counted_notes,
    numbers,
    sampled_tokens,
    share,
    trained_differs,
)
from rlsys.run.reward_failures import total_failures

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).parent / "report_template.html"
SAMPLES_PER_STEP = 12


@dataclass(frozen=True)
class ChartSpec:
    """A chart: its title and the metrics that it draws, as (label, metric name, "train" or "eval").

    `unless_equal`: lines that are drawn only where they differ from the first one.
    """

    title: str
    lines: tuple[tuple[str, str, str], ...]
    percent: bool = False
    may_be_log: bool = False
    unless_equal: tuple[tuple[str, str, str], ...] = ()
    unless_zero: bool = False  # a chart of failures: not drawn where there are none


CHARTS = (
    ChartSpec(
        "Reward of all samples",
        (("mean", "reward/mean", "train"), ("standard deviation", "reward/std", "train")),
        unless_equal=(("mean of those trained on", "trained/reward_mean", "train"),),
    ),
    ChartSpec(
        "Accuracy",
        (("training samples", "reward/accuracy", "train"), ("held out", "eval/accuracy", "eval")),
        percent=True,
        unless_equal=(("those trained on", "trained/accuracy", "train"),),
    ),
    ChartSpec("Response length (tokens)", (("mean", "rollout/response_length", "train"),)),
    ChartSpec("Entropy (nats a token)", (("policy", "policy/entropy", "train"),)),
    ChartSpec(
        "KL to the reference (nats a token)",
        (("k1", "policy/kl_ref_k1", "train"), ("k3", "policy/kl_ref_k3", "train")),
        may_be_log=True,
    ),
    ChartSpec("Loss", (("mean of the mini-batches", "policy/loss", "train"),)),
    ChartSpec(
        "Gradient norm", (("before clipping", "policy/grad_norm", "train"),), may_be_log=True
    ),
    ChartSpec(
        "Log-probability gap, engine and trainer",
        (
            ("sampled tokens", "policy/logprob_gap_mean", "train"),
            ("probe after sync", "sync/logprob_gap_mean", "train"),
            ("drift since sampling", "policy/drift_mean", "train"),
        ),
        may_be_log=True,
    ),
    ChartSpec(
        "Share of groups and responses",
        (
            ("groups of equal rewards", "rollout/equal_reward_groups", "train"),
            ("truncated responses", "rollout/truncated_share", "train"),
            ("clipped tokens", "policy/clipped_share", "train"),
        ),
        percent=True,
    ),
    ChartSpec(
        "Failures a step",
        (
            ("reward errors", "reward/errors", "train"),
            ("reward timeouts", "reward/timeouts", "train"),
            ("reward crashes", "reward/crashes", "train"),
            ("updates skipped", "policy/skipped_updates", "train"),
        ),
        may_be_log=True,
        unless_zero=True,
    ),
    ChartSpec(
        "Gradient second moment over that of the leave-one-out mean",
        (
            ("in use", "advantage/variance_ratio/used", "train"),
            ("group mean", "advantage/variance_ratio/group_mean", "train"),
            ("OPO", "advantage/variance_ratio/opo", "train"),
        ),
        may_be_log=True,
    ),
    ChartSpec(
        "True gradient variance over that of the leave-one-out mean",
        (
            ("in use", "gradient/variance_ratio/used", "train"),
            ("in use, as the proxy has it", "gradient/proxy_ratio/used", "train"),
            ("group mean", "gradient/variance_ratio/group_mean", "train"),
        ),
        may_be_log=True,
    ),
    ChartSpec(
        "Share of the gradient's second moment between different positions",
        (
            ("in use", "gradient/cross_position_share/used", "train"),
            ("leave-one-out mean", "gradient/cross_position_share/leave_one_out", "train"),
        ),
    ),
    ChartSpec("Learning rate", (("AdamW", "policy/learning_rate", "train"),)),
)


def series_of(records: Sequence[MetricsRecord], label: str, name: str, kind: str) -> Series:
    """One metric over the steps that have it."""
    points = tuple((r.step, r.values[name]) for r in records if r.kind == kind and name in r.values)
    return Series(label, points, markers=kind == "eval")


def series_over_position(records: Sequence[MetricsRecord], prefix: str) -> list[Series]:
    """Metrics `<prefix><percent of the longest response>` of the first, the middle and the last step that have any, a line each."""
    steps = [
        r
        for r in records
        if r.kind == "train" and any(name.startswith(prefix) for name in r.values)
    ]
    shown = sorted({0, len(steps) // 2, len(steps) - 1}) if steps else []
    return [
        Series(
            f"step {steps[i].step}",
            tuple(
                (float(name.removeprefix(prefix)), v)
                for name, v in sorted(steps[i].values.items())
                if name.startswith(prefix) and math.isfinite(v)
            ),
            markers=True,
        )
        for i in shown
    ]


def charts_of(records: Sequence[MetricsRecord]) -> list[str]:
    """Every chart that has something to draw."""
    charts = [_chart(spec, records) for spec in CHARTS]
    components = sorted({n for r in records for n in r.values if n.startswith("reward/component/")})
    if len(components) > 1:
        parts = [
            series_of(records, name.removeprefix("reward/component/"), name, "train")
            for name in components
        ]
        charts.insert(1, line_chart("Reward by function (unweighted mean)", parts))
    shares = series_over_position(records, "advantage/effective_share/at_")
    title = "Effective sample size of the ratios over position (% of the longest response)"
    charts.append(line_chart(title, shares, percent=True, at="{} % of the longest response"))
    steps = [
        (r.step, [next(iter(numbers([r], f"time/{phase}")), 0.0) for phase in PHASES])
        for r in records
        if r.kind == "train"
    ]
    charts.append(stacked_bars("Time by phase (seconds a step)", PHASES, steps, "s"))
    return [chart for chart in charts if chart]


def _chart(spec: ChartSpec, records: Sequence[MetricsRecord]) -> str:
    lines = [series_of(records, *line) for line in spec.lines]
    extra = [series_of(records, *line) for line in spec.unless_equal]
    lines += [line for line in extra if line.points != lines[0].points]
    if spec.unless_zero:
        lines = [replace(line, smooth=False) for line in lines if any(y for _, y in line.points)]
    return line_chart(spec.title, lines, percent=spec.percent, may_be_log=spec.may_be_log)


def _tiles(records: Sequence[MetricsRecord], status: RunStatus | None) -> list[tuple[str, str]]:
    train = [record for record in records if record.kind == "train"]
    evaluations = numbers((r for r in records if r.kind == "eval"), "eval/accuracy")
    tiles = []
    if evaluations:
        tiles.append(("held-out accuracy", f"{evaluations[0]:.1%} → {evaluations[-1]:.1%}"))
    if train:
        rewards = numbers(train, "reward/mean")
        tokens, generating = sampled_tokens(train), sum(numbers(train, "time/generate"))
        total = f" of {status.steps}" if status and status.steps else ""
        tiles += [
            ("training reward", f"{rewards[0]:.3f} → {rewards[-1]:.3f}" if rewards else "–"),
            ("steps", f"{train[-1].step}{total}"),
            ("seconds a step", f"{sum(numbers(train, 'time/step')) / len(train):.2f}"),
            ("sampled tokens", f"{tokens:,.0f}"),
            ("tokens/s generating", f"{tokens / max(generating, 1e-9):,.0f}"),
        ]
        if trained_differs(train):
            part = share(train, "trained/responses", "rollout/responses")
            tiles.append(("trained on", f"{part:.1%} of the samples"))
        if failures := total_failures(record.values for record in train):
            tiles.append(("failed rewards", failures))
    return tiles


def status_line(status: RunStatus | None, now: float) -> tuple[str, str]:
    """(css class, text): how the run ended, or that it had not when the page was written."""
    if status is None:
        return "unknown", "No status.json: nothing says how this run ended"
    after = f" after {status.step}" + (f" of {status.steps} steps" if status.steps else " steps")
    if status.state == "finished":
        return "finished", f"Finished{after}"
    if not status.is_over:
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        return (
            status.state,
            f"{status.state.capitalize()}{after} when this page was written, {written}",
        )
    where = f", in {status.phase}" if status.state == "died" and status.phase else ""
    return status.state, f"{status.state.capitalize()}{after}{where}" + (
        f": {status.message}" if status.message else ""
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, json.dumps(value, ensure_ascii=False)))
    return rows


def _samples(directory: RunDirectory) -> list[tuple[str, list[dict[str, Any]]]]:
    files = sorted(directory.rollouts.glob("step_*.parquet"))
    chosen = files if len(files) < 2 else [files[0], files[-1]]
    return [
        (f"Step {int(file.stem.removeprefix('step_'))}", _spread(read_rollouts(file)))
        for file in chosen
    ]


def _spread(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Some rows from all over a batch, with the columns that the table shows."""
    step = max(1, len(rows) // SAMPLES_PER_STEP)
    return [
        {
            "prompt": row["prompt"],
            "question": row["prompt"].rstrip().split("\n\n")[-1][-300:],
            "response": row["response"],
            "answer": row["extracted_answer"],
            "truth": row["ground_truth"],
            "reward": format_number(row["reward"]),
            "right": row.get("correct", row["accuracy"] >= 0.5),
            "trained": row.get("trained", True),
            "reason": row["reason"],
            "advantage": _first_advantage(row),
        }
        for row in rows[::step][:SAMPLES_PER_STEP]
    ]


def _first_advantage(row: Mapping[str, Any]) -> str:
    """That of the first sampled token; a dash where each mini-batch estimates its own, which the file does not hold."""
    if row["advantages"] is None:
        return "–"
    return format(
        next(
            (
                a
                for a, sampled in zip(row["advantages"], row["response_mask"], strict=True)
                if sampled
            ),
            0.0,
        ),
        "+.2f",
    )


def render_report(directory: RunDirectory) -> str:
    """The page."""
    records = read_metrics(directory.metrics)
    config = yaml.safe_load(directory.config.read_text())
    status, now = read_status(directory), time.time()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE.read_text()).render(
        name=directory.path.resolve().name,
        recipe=config.get("recipe", ""),
        model=config.get("model", {}).get("path", ""),
        status=status_line(status, now),
        written=now,
        tiles=_tiles(records, status),
        notes=counted_notes(record for record in records if record.kind == "train"),
        charts=charts_of(records),
        config=_flat(config),
        samples=_samples(directory),
    )


def write_report(directory: RunDirectory) -> None:
    """Write report.html, whole or not at all."""
    partial = directory.report.with_suffix(".partial")
    partial.write_text(render_report(directory), encoding="utf-8")
    os.replace(partial, directory.report)


def update_report(directory: RunDirectory) -> None:
    """`write_report`, where a page that cannot be drawn must not end a night of training."""
    try:
        write_report(directory)
    except Exception:
        logger.exception("the report could not be written")


class ReportWriter(Observer):
    """Keeps report.html up to date: after each evaluation and checkpoint, and at the end."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory

    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        update_report(self._directory)

    def on_checkpoint(self, step: int, path: str) -> None:
        update_report(self._directory)

    def on_end(self, outcome: Outcome, message: str) -> None:
        update_report(self._directory)


def main(arguments: Sequence[str]) -> None:
    """Make the report of a run again, from its directory."""
    directory = RunDirectory(Path(arguments[0])) if len(arguments) == 1 else None
    if directory is None or not directory.config.is_file():
        sys.exit(
            "usage: python -m rlsys.run.observers.html_report runs/NAME, the directory of a run"
        )
    write_report(directory)
    print(directory.report)


if __name__ == "__main__":
    main(sys.argv[1:])
