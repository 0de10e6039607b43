"""report.html: one self-contained page about a run, made from its directory.

The page opens from disk without a network: curves are SVG drawn here, the little script for hover values is inline.
"""

from __future__ import annotations

import html
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from rlsys.data.rollout_files import read_rollouts
from rlsys.driver.metrics_log import MetricsRecord, read_metrics
from rlsys.driver.observer import PHASES, Outcome
from rlsys.driver.run_directory import RunDirectory

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).parent / "report_template.html"
SAMPLES_PER_STEP = 12
WIDTH, HEIGHT = 420, 190
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 26


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    label: str
    points: tuple[tuple[float, float], ...]
    markers: bool = False


@dataclass(frozen=True)
class ChartSpec:
    """A chart: its title and the metrics that it draws, as (label, metric name, "train" or "eval")."""

    title: str
    lines: tuple[tuple[str, str, str], ...]
    percent: bool = False


CHARTS = (
    ChartSpec(
        "Reward", (("mean", "reward/mean", "train"), ("standard deviation", "reward/std", "train"))
    ),
    ChartSpec(
        "Accuracy",
        (("training samples", "reward/accuracy", "train"), ("held out", "eval/accuracy", "eval")),
        percent=True,
    ),
    ChartSpec("Response length (tokens)", (("mean", "rollout/response_length", "train"),)),
    ChartSpec("Entropy (nats a token)", (("policy", "policy/entropy", "train"),)),
    ChartSpec(
        "KL to the reference (nats a token)",
        (("k1", "policy/kl_ref_k1", "train"), ("k3", "policy/kl_ref_k3", "train")),
    ),
    ChartSpec("Gradient norm", (("before clipping", "policy/grad_norm", "train"),)),
    ChartSpec(
        "Log-probability gap, engine and trainer",
        (
            ("sampled tokens", "policy/logprob_gap_mean", "train"),
            ("probe after sync", "sync/logprob_gap_mean", "train"),
        ),
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
        "Gradient second moment over that of the leave-one-out mean",
        (
            ("in use", "advantage/variance_ratio/used", "train"),
            ("group mean", "advantage/variance_ratio/group_mean", "train"),
            ("OPO", "advantage/variance_ratio/opo", "train"),
        ),
    ),
    ChartSpec(
        "True gradient variance over that of the leave-one-out mean",
        (
            ("in use", "gradient/variance_ratio/used", "train"),
            ("in use, as the proxy has it", "gradient/proxy_ratio/used", "train"),
            ("group mean", "gradient/variance_ratio/group_mean", "train"),
        ),
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
    """The finite values of one metric over steps."""
    points = tuple(
        (r.step, r.values[name])
        for r in records
        if r.kind == kind and math.isfinite(r.values.get(name, math.nan))
    )
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
                if name.startswith(prefix)
            ),
            markers=True,
        )
        for i in shown
    ]


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers that span [low, high]."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    return [k * step for k in range(first, math.ceil(high / step - 1e-9) + 1)]


def format_number(value: float, *, percent: bool = False) -> str:
    """Short: 12 %, 0.031, 1.5e-06."""
    if percent:
        return f"{value * 100:.3g} %"
    return f"{value:.1e}" if value and abs(value) < 1e-3 else f"{value:,.4g}"


def _smoothed(
    points: Sequence[tuple[float, float]], weight: float = 0.8
) -> list[tuple[float, float]]:
    """Exponential moving average with its start corrected, as in Adam."""
    average, result = 0.0, []
    for i, (x, y) in enumerate(points, start=1):
        average = weight * average + (1 - weight) * y
        result.append((x, average / (1 - weight**i)))
    return result


class _Frame:
    """The coordinate system of one chart."""

    def __init__(
        self, xs: Sequence[float], ys: Sequence[float], *, percent: bool, from_zero: bool
    ) -> None:
        low, high = (0.0 if from_zero else min(ys)), max(ys)
        self.ticks = nice_ticks(min(low, high), high)
        self.percent = percent
        self.x_low, self.x_high = min(xs), max(max(xs), min(xs) + 1)
        self.y_low, self.y_high = self.ticks[0], self.ticks[-1]

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return (
            HEIGHT
            - BOTTOM
            - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)
        )

    def axes(self) -> str:
        parts = []
        for tick in self.ticks:
            y = self.y(tick)
            text = format_number(tick, percent=self.percent)
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            parts.append(
                f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>'
            )
        for tick in nice_ticks(self.x_low, self.x_high, 5):
            if self.x_low <= tick <= self.x_high and tick == round(tick):
                parts.append(
                    f'<text class="tick" x="{self.x(tick):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{tick:g}</text>'
                )
        return "".join(parts)


def line_chart(
    title: str, lines: Sequence[Series], *, percent: bool = False, at: str = "step {}"
) -> str:
    """An SVG of lines over steps, smoothed with the raw values behind; "" where there is nothing to draw. `at` names an x under the pointer."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    frame = _Frame(xs, ys, percent=percent, from_zero=min(ys) >= 0)
    body = [frame.axes()]
    for i, line in enumerate(lines):
        raw = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in line.points)
        if line.markers or len(line.points) < 8:
            body.append(f'<polyline class="line c{i}" points="{raw}"/>')
            body += [
                f'<circle class="dot c{i}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3"/>'
                for x, y in line.points
            ]
        else:
            smooth = " ".join(
                f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in _smoothed(line.points)
            )
            body.append(
                f'<polyline class="raw c{i}" points="{raw}"/><polyline class="line c{i}" points="{smooth}"/>'
            )
    data = [
        {
            "label": line.label,
            "points": [
                [round(frame.x(x), 1), x, format_number(y, percent=percent)] for x, y in line.points
            ],
        }
        for line in lines
    ]
    legend = "".join(
        f'<span class="key c{i}">{html.escape(line.label)}</span>' for i, line in enumerate(lines)
    )
    return _figure(title, legend, "".join(body), data, at)


def stacked_bars(title: str, records: Sequence[MetricsRecord]) -> str:
    """Seconds of each phase, a bar a step (or a bar for several steps, averaged, where there are many)."""
    steps = [record for record in records if record.kind == "train"]
    if not steps:
        return ""
    size = math.ceil(len(steps) / 60)
    buckets = [steps[i : i + size] for i in range(0, len(steps), size)]
    heights = [
        [sum(r.values.get(f"time/{phase}", 0.0) for r in bucket) / len(bucket) for phase in PHASES]
        for bucket in buckets
    ]
    xs = [bucket[0].step for bucket in buckets]
    # The first step pays for warming up; it may leave the frame rather than flatten all the others.
    tallest = max(map(sum, heights[1:] or heights))
    frame = _Frame([xs[0], xs[-1] + size], [0.0, tallest], percent=False, from_zero=True)
    body, data = [frame.axes()], []
    width = max(1.0, (frame.x(xs[0] + size) - frame.x(xs[0])) * 0.86)
    for start, parts in zip(xs, heights, strict=True):
        base = 0.0
        for i, seconds in enumerate(parts):
            top = min(base + seconds, frame.y_high)
            if top > base:
                body.append(
                    f'<rect class="bar c{i}" x="{frame.x(start):.1f}" width="{width:.1f}" y="{frame.y(top):.1f}" '
                    f'height="{frame.y(base) - frame.y(top):.1f}"/>'
                )
            base = top
    for i, phase in enumerate(PHASES):
        data.append(
            {
                "label": phase,
                "points": [
                    [round(frame.x(x) + width / 2, 1), x, f"{h[i]:.2f} s"]
                    for x, h in zip(xs, heights, strict=True)
                ],
            }
        )
    legend = "".join(f'<span class="key c{i}">{phase}</span>' for i, phase in enumerate(PHASES))
    return _figure(title, legend, "".join(body), data)


def _figure(
    title: str, legend: str, body: str, data: Sequence[Mapping[str, Any]], at: str = "step {}"
) -> str:
    points = html.escape(json.dumps(data), quote=True)
    return (
        f'<figure><figcaption>{html.escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}" '
        f'data-at="{html.escape(at)}" data-series="{points}">{body}<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/></svg>'
        f'<div class="legend">{legend}</div><div class="readout" aria-live="polite"></div></figure>'
    )


def _tiles(records: Sequence[MetricsRecord]) -> list[tuple[str, str]]:
    train = [record for record in records if record.kind == "train"]
    evaluations = [record for record in records if record.kind == "eval"]
    tiles = []
    if evaluations:
        first, last = (r.values["eval/accuracy"] for r in (evaluations[0], evaluations[-1]))
        tiles.append(("held-out accuracy", f"{first:.1%} → {last:.1%}"))
    if train:
        seconds = sum(r.values.get("time/step", 0.0) for r in train)
        tokens = sum(r.values.get("rollout/tokens", 0.0) for r in train)
        generating = sum(r.values.get("time/generate", 0.0) for r in train)
        tiles += [
            (
                "training reward",
                f"{train[0].values.get('reward/mean', math.nan):.3f} → {train[-1].values.get('reward/mean', math.nan):.3f}",
            ),
            ("steps", f"{train[-1].step}"),
            ("seconds a step", f"{seconds / len(train):.2f}"),
            ("sampled tokens", f"{tokens:,.0f}"),
            ("tokens/s generating", f"{tokens / max(generating, 1e-9):,.0f}"),
        ]
    return tiles


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
            "reward": row["reward"],
            "right": row["accuracy"] >= 0.5,
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
    charts = [
        line_chart(
            spec.title, [series_of(records, *line) for line in spec.lines], percent=spec.percent
        )
        for spec in CHARTS
    ]
    shares = series_over_position(records, "advantage/effective_share/at_")
    title = "Effective sample size of the ratios over position (% of the longest response)"
    charts.append(line_chart(title, shares, percent=True, at="{} % of the longest response"))
    charts.append(stacked_bars("Time by phase (seconds a step)", records))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE.read_text()).render(
        name=directory.path.resolve().name,
        recipe=config.get("recipe", ""),
        model=config.get("model", {}).get("path", ""),
        tiles=_tiles(records),
        charts=[chart for chart in charts if chart],
        config=_flat(config),
        samples=_samples(directory),
    )


def write_report(directory: RunDirectory) -> None:
    """Write report.html, whole or not at all."""
    partial = directory.report.with_suffix(".partial")
    partial.write_text(render_report(directory), encoding="utf-8")
    os.replace(partial, directory.report)


class ReportWriter:
    """Observer that keeps report.html up to date: after each evaluation and checkpoint, and at the end."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory

    def on_start(self, first_step: int, total_steps: int) -> None: ...

    def on_phase(self, step: int, phase: str) -> None: ...

    def on_step(self, step: int, values: Mapping[str, float]) -> None: ...

    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        self._write()

    def on_checkpoint(self, step: int, path: str) -> None:
        self._write()

    def on_end(self, outcome: Outcome, message: str) -> None:
        self._write()

    def _write(self) -> None:
        try:
            write_report(self._directory)
        except Exception:  # a page that cannot be drawn must not end a night of training
            logger.exception("the report could not be written")
