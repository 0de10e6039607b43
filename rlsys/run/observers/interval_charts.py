"""Charts of estimates with their confidence intervals as SVG, one line for each."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from rlsys.evaluation.intervals import Estimate
from rlsys.run.observers.charts import COLOURS, format_number, nice_ticks

WIDTH = 420
LABELS, RIGHT, TOP, BOTTOM = 120, 14, 8, 24
ROW, GAP = 15, 9  # of one estimate, and between the groups
LONGEST_LABEL = 20  # characters
DOT = 3.2


@dataclass(frozen=True, kw_only=True)
class IntervalRow:
    """One label with an estimate of each series; None where a series has none."""

    label: str
    estimates: tuple[Estimate | None, ...]


def interval_chart(
    title: str, names: Sequence[str], rows: Sequence[IntervalRow], *, signed: bool = False
) -> str:
    """Return an SVG of fractions with intervals, in percent; "" without rows.

    Args:
        names: of the series, for the legend.
        signed: the fractions are differences, drawn around a line at 0.
    """
    if not rows:
        return ""
    low, high = _range(rows, signed)
    ticks = nice_ticks(low, high, 4)
    scale = _Scale(ticks[0], ticks[-1])
    height = TOP + BOTTOM + sum(ROW * len(row.estimates) + GAP for row in rows)

    body = [_tick(scale, tick, height, strong=signed and tick == 0) for tick in ticks]
    y = float(TOP)
    for row in rows:
        middle = y + (ROW * len(row.estimates)) / 2 + 4
        body.append(
            f'<text class="tick" x="{LABELS - 8}" y="{middle:.1f}" text-anchor="end">'
            f"{html.escape(_short(row.label))}</text>"
        )
        for place, estimate in enumerate(row.estimates):
            if estimate is not None:
                body.append(_whisker(scale, estimate, y + ROW / 2, place, row.label))
            y += ROW
        y += GAP

    name = html.escape(title)
    return (
        f"<figure><figcaption>{name}</figcaption>"
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}">'
        f"{''.join(body)}</svg>"
        f'<div class="legend">{_legend(names)}</div></figure>'
    )


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float

    def x(self, value: float) -> float:
        fraction = (value - self.low) / (self.high - self.low)
        return LABELS + fraction * (WIDTH - LABELS - RIGHT)


def _range(rows: Sequence[IntervalRow], signed: bool) -> tuple[float, float]:
    """Return the range of all ends; it includes 0."""
    ends = [0.0]
    for row in rows:
        for estimate in row.estimates:
            if estimate is not None:
                known = (estimate.value, estimate.low, estimate.high)
                ends += [end for end in known if end is not None]
    low, high = min(ends), max(ends)
    if signed:
        low, high = -max(abs(low), high), max(abs(low), high)
    return low, high if high > low else low + 0.1


def _tick(scale: _Scale, value: float, height: int, *, strong: bool) -> str:
    x = scale.x(value)
    line = "cursor" if strong else "grid"
    label = format_number(0.0 if abs(value) < 1e-12 else value, percent=True)
    return (
        f'<line class="{line}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>'
        f'<text class="tick" x="{x:.1f}" y="{height - 8}" text-anchor="middle">{label}</text>'
    )


def _whisker(scale: _Scale, estimate: Estimate, y: float, place: int, label: str) -> str:
    """Draw one estimate as a dot on the line of its interval."""
    colour = place % COLOURS
    shapes = [f'<circle class="dot c{colour}" cx="{scale.x(estimate.value):.1f}" cy="{y:.1f}"']
    shapes[0] += f' r="{DOT}"/>'
    shown = format_number(estimate.value, percent=True)
    if estimate.low is not None and estimate.high is not None:
        first, last = scale.x(estimate.low), scale.x(estimate.high)
        shapes.insert(
            0,
            f'<path class="line solid c{colour}" d="M{first:.1f} {y:.1f}H{last:.1f}'
            f'M{first:.1f} {y - 3:.1f}v6M{last:.1f} {y - 3:.1f}v6"/>',
        )
        ends = [format_number(end, percent=True) for end in (estimate.low, estimate.high)]
        shown += f", {ends[0]} to {ends[1]}"
    return f"<g><title>{html.escape(label)}: {shown}</title>{''.join(shapes)}</g>"


def _short(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 1]}…"


def _legend(names: Sequence[str]) -> str:
    return "".join(
        '<span class="key"><svg class="sample" viewBox="0 0 26 8">'
        f'<path class="line solid c{place % COLOURS}" d="M0 4H26"/></svg>'
        f"{html.escape(name)}</span>"
        for place, name in enumerate(names)
    )
