"""Charts as SVG: lines over steps, and stacked bars. This module does not interpret the numbers.

Lines that coincide differ by their dashes. A missing value breaks its line and is marked. A bar
that exceeds the frame is marked too. Thousands of steps are drawn as ranges that keep every peak.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rlsys.run.shown_text import visible

WIDTH, HEIGHT = 420, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 26
COLOURS = 7  # styles of lines and bars in the page's CSS
FEW_POINTS = 8  # a line with fewer points is drawn with dots, and is not smoothed
MOST_POINTS = 400  # a line with more points is drawn as the ranges of BUCKETS buckets
BUCKETS = 200
BARS = 60
DOT = 3.2  # radius
TALL = 3.0  # a bar of more than this times the median is cut off, so that the others stay visible
LOG_SPREAD = 300.0  # ratio of a large to a small value at which the axis becomes logarithmic

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart. A y that is not finite is a missing value."""

    label: str
    points: tuple[Point, ...]
    markers: bool = False
    smooth: bool = True

    @cached_property
    def finite(self) -> list[Point]:
        return [(x, y) for x, y in self.points if math.isfinite(y)]


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about `count` round numbers that span [low, high]."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    return [k * step for k in range(first, math.ceil(high / step - 1e-9) + 1)]


def log_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Return powers of ten that span [low, high], at most about `count`."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    every = math.ceil((last - first) / count)
    return [10.0**k for k in range(first, last + every, every)]


def format_number(value: float, *, percent: bool = False) -> str:
    """Return at most eight characters: 12 %, 0.031, 1.5e-06, 12,300, 1.23M."""
    if not math.isfinite(value):
        return "not finite"
    if percent:
        return f"{value * 100:.3g} %"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    if abs(value) < 1e-2:
        return f"{value:.3g}"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        scaled = abs(value) / unit
        if scaled >= 1e4 and name == "G":
            return f"{value:.1e}"
        if scaled >= (100 if name == "k" else 1):
            return f"{value / unit:.0f}{name}" if scaled >= 100 else f"{value / unit:.3g}{name}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:,.4g}"


def tick_labels(ticks: Sequence[float], *, percent: bool = False) -> list[str]:
    """Return labels with enough digits to distinguish neighbours."""
    labels = [format_number(tick, percent=percent) for tick in ticks]
    if len(set(labels)) == len(labels):
        return labels
    scale = 100.0 if percent else 1.0
    digits = max(0, -math.floor(math.log10(scale * (ticks[1] - ticks[0])) + 1e-9))
    return [f"{scale * tick:.{digits}f}" + (" %" if percent else "") for tick in ticks]


def needs_log(values: Sequence[float]) -> bool:
    """Return whether a linear axis would show only the largest of the positive values."""
    positive = sorted(value for value in values if value > 0)
    if not positive or min(values) < 0:
        return False
    return positive[-1] > LOG_SPREAD * positive[len(positive) // 20]


class _Frame:
    """The coordinate system of one chart."""

    def __init__(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        *,
        percent: bool = False,
        log: bool = False,
    ) -> None:
        self.percent, self.log = percent, log
        self.x_low, self.x_high = min(xs), max(xs)
        if self.x_low == self.x_high:  # a single step is drawn in the middle
            self.x_low, self.x_high = self.x_low - 0.5, self.x_high + 0.5
        if log:
            self.ticks = log_ticks(min(y for y in ys if y > 0), max(ys))
        else:
            low = 0.0 if min(ys) >= 0 else min(ys)
            self.ticks = nice_ticks(low, max(ys))
        self.y_low, self.y_high = self._scaled(self.ticks[0]), self._scaled(self.ticks[-1])

    def _scaled(self, value: float) -> float:
        if not self.log:
            return value
        return math.log10(max(value, self.ticks[0]))  # 0 is drawn on the lower edge

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        fraction = (self._scaled(value) - self.y_low) / (self.y_high - self.y_low)
        return HEIGHT - BOTTOM - fraction * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Sequence[Point]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)

    def axes(self) -> str:
        return "".join([*self._horizontal_lines(), *self._step_labels()])

    def _horizontal_lines(self) -> Iterator[str]:
        """Yield a grid line for each tick, with its label at the left."""
        labels = tick_labels(self.ticks, percent=self.percent)
        for tick, label in zip(self.ticks, labels, strict=True):
            y = self.y(tick)
            yield (
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            yield (
                f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">'
                f"{label}</text>"
            )

    def _step_labels(self) -> Iterator[str]:
        """Yield the whole numbers below the chart; the last one is shifted into the frame."""
        for tick in nice_ticks(self.x_low, self.x_high, 5):
            if not self.x_low <= tick <= self.x_high or tick != round(tick):
                continue
            label, x = f"{tick:g}", self.x(tick)
            anchor = "end" if x + 3 * len(label) > WIDTH else "middle"
            x = min(x, WIDTH - 1) if anchor == "middle" else WIDTH - 1
            yield (
                f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">'
                f"{label}</text>"
            )


@dataclass(frozen=True)
class _Drawn:
    """The drawn part of one line, and the values that the page shows under the pointer."""

    raw: tuple[Point, ...]
    smooth: tuple[Point, ...]  # () where only the raw line is drawn
    hover: tuple[tuple[float, str, float], ...]  # x, its name, y


def smoothed(
    points: Sequence[Point], *, weight: float = 0.8, floor: float | None = None
) -> list[Point]:
    """Return the exponential moving average, with the bias correction of Adam.

    A missing value stays missing and is not averaged. With `floor`, for a logarithmic axis, the
    logarithms are averaged, of at least that value: one peak would otherwise hide many later steps.
    """
    average, count, result = 0.0, 0, []
    for x, y in points:
        if not math.isfinite(y):
            result.append((x, y))
            continue
        count += 1
        value = y if floor is None else math.log10(max(y, floor))
        average = weight * average + (1 - weight) * value
        mean = average / (1 - weight**count)
        result.append((x, mean if floor is None else 10.0**mean))
    return result


def _drawn(line: Series, frame: _Frame, x_low: float, size: int) -> _Drawn:
    """Reduce a line to buckets of `size` steps; with a size of 1, keep every point."""
    smooth: tuple[Point, ...] = ()
    if line.smooth and not line.markers and len(line.points) >= FEW_POINTS:
        smooth = tuple(smoothed(line.points, floor=frame.ticks[0] if frame.log else None))
    if size == 1:
        hover = tuple((x, f"{x:g}", y) for x, y in line.points)
        return _Drawn(line.points, smooth, hover)

    raw: list[Point] = []
    hover = []
    for middle, name, bucket in _buckets(line.points, x_low, size):
        raw += _extremes(bucket)
        finite = [y for _, y in bucket if math.isfinite(y)]
        hover.append((middle, name, sum(finite) / len(finite) if finite else math.nan))
    last = [bucket[-1] for _, _, bucket in _buckets(smooth, x_low, size)]
    return _Drawn(tuple(raw), tuple(last), tuple(hover))


def _extremes(bucket: Sequence[Point]) -> list[Point]:
    """Return the lowest and the highest point in order; one missing point where all are missing."""
    finite = [(x, y) for x, y in bucket if math.isfinite(y)]
    if not finite:
        return [bucket[0]]
    ends = {min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])}
    return sorted(ends)


def _buckets(
    points: Sequence[Point], x_low: float, size: int
) -> Iterator[tuple[float, str, list[Point]]]:
    """Yield the points of `size` steps each: the middle, a name such as 101–150, and the points.

    The grid is the same for all lines of a chart.
    """
    grouped: dict[int, list[Point]] = {}
    for x, y in points:
        grouped.setdefault(int((x - x_low) // size), []).append((x, y))
    for number, bucket in sorted(grouped.items()):
        first = x_low + number * size
        yield first + (size - 1) / 2, f"{first:g}–{first + size - 1:g}", bucket


def _segments(points: Sequence[Point]) -> Iterator[list[Point]]:
    """Yield the runs of finite values between missing ones."""
    run: list[Point] = []
    for x, y in points:
        if math.isfinite(y):
            run.append((x, y))
        elif run:
            yield run
            run = []
    if run:
        yield run


def line_chart(
    title: str,
    lines: Sequence[Series],
    *,
    percent: bool = False,
    may_be_log: bool = False,
    at: str = "step {}",
) -> str:
    """Return an SVG of lines over steps, smoothed, with the raw values behind them.

    It is "" where there is nothing to draw. `at` is the text for an x under the pointer. With
    `may_be_log` the axis is logarithmic where the values need it; 0 is then on the lower edge.
    """
    lines = [line for line in lines if line.finite]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.finite]
    log = may_be_log and needs_log(ys)
    frame = _Frame(xs, ys, percent=percent, log=log)
    size = _bucket_size(lines, xs)

    body, data, legend = [frame.axes()], [], []
    for place, line in enumerate(lines):
        drawn = _drawn(line, frame, min(xs), size)
        body.append(_line_shapes(frame, drawn, place % COLOURS, _dot_radius(lines, place)))
        data.append(_hover_data(frame, line.label, drawn))
        legend.append(_line_key(place, line, lines[:place], percent=percent))
    name = title + (" (log scale)" if log else "")
    return _figure(name, "".join(legend), "".join(body), data, at)


def _dot_radius(lines: Sequence[Series], place: int) -> float:
    """Return the radius of a line's dots, 0 for none; on an equal line they are smaller."""
    line = lines[place]
    if not line.markers and len(line.points) >= FEW_POINTS:
        return 0.0
    below = sum(other.points == line.points for other in lines[:place])
    return (DOT, 2.0, 1.2)[min(below, 2)]


def _hover_data(frame: _Frame, label: str, drawn: _Drawn) -> dict[str, Any]:
    """Return what the page shows under the pointer: position, name of the step, value."""
    points = [
        [round(frame.x(x), 1), name, format_number(y, percent=frame.percent)]
        for x, name, y in drawn.hover
    ]
    return {"label": label, "points": points}


def _bucket_size(lines: Sequence[Series], xs: Sequence[float]) -> int:
    if max(len(line.points) for line in lines) <= MOST_POINTS:
        return 1
    return math.ceil((max(xs) - min(xs) + 1) / BUCKETS)


def _line_shapes(frame: _Frame, drawn: _Drawn, colour: int, radius: float) -> str:
    """Draw one line; a run of a single point is a dot, since a line of one point is invisible."""
    parts = []
    if drawn.smooth:
        parts += [
            f'<polyline class="raw c{colour}" points="{frame.path(run)}"/>'
            for run in _segments(drawn.raw)
        ]
    for run in _segments(drawn.smooth or drawn.raw):
        parts.append(f'<polyline class="line c{colour}" points="{frame.path(run)}"/>')
        if radius or len(run) == 1:
            parts += [_dot(frame, point, colour, radius or DOT) for point in run]
    parts += [
        f'<text class="missing" x="{frame.x(x):.1f}" y="{HEIGHT - BOTTOM - 2}" '
        'text-anchor="middle">×</text>'
        for x, y in drawn.raw
        if not math.isfinite(y)
    ]
    return "".join(parts)


def _dot(frame: _Frame, point: Point, colour: int, radius: float) -> str:
    x, y = frame.x(point[0]), frame.y(point[1])
    return f'<circle class="dot c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'


def _line_key(place: int, line: Series, before: Sequence[Series], *, percent: bool) -> str:
    """Return the legend of a line: its style, name, last value, and remarks."""
    same = next((other.label for other in before if other.points == line.points), None)
    missing = len(line.points) - len(line.finite)
    remarks = [
        *([f"= {same}"] if same else []),
        *([f"× not finite at {missing} of {len(line.points)}"] if missing else []),
    ]
    last = format_number(line.finite[-1][1], percent=percent)
    remark = f" <i>({html.escape(', '.join(remarks))})</i>" if remarks else ""
    return (
        '<span class="key"><svg class="sample" viewBox="0 0 26 8">'
        f'<path class="line c{place % COLOURS}" d="M0 4H26"/></svg>'
        f"{html.escape(line.label)} <b>{last}</b>{remark}</span>"
    )


@dataclass(frozen=True)
class _Bar:
    """One bar: the mean of one step or of several."""

    start: int
    label: str  # 7, or 101–110
    parts: tuple[float, ...]

    @property
    def height(self) -> float:
        return sum(self.parts)


def stacked_bars(
    title: str,
    names: Sequence[str],
    steps: Sequence[tuple[int, Sequence[float]]],
    unit: str,
    *,
    at: str = "step {}",
    cuts_tall: bool = True,
) -> str:
    """Return an SVG of parts of a whole, a bar for each (step, values).

    `at` is the text for a bar under the pointer. Without `cuts_tall` no bar is cut off.

    With many steps, a bar shows the mean of several. A bar of more than three times the median is
    cut off at the frame and marked, and its height is in the legend.
    """
    if not steps:
        return ""
    size = math.ceil(len(steps) / BARS)
    bars = [_bar(steps[first : first + size]) for first in range(0, len(steps), size)]
    first, last = bars[0].start, bars[-1].start
    highest = _highest_drawn(bars) if cuts_tall else max(bar.height for bar in bars)
    frame = _Frame([first, max(last + size, first + 2)], [0.0, highest])
    width = max(1.0, (frame.x(first + size) - frame.x(first)) * 0.86)

    body = frame.axes() + "".join(_bar_shapes(frame, bar, width) for bar in bars)
    data = [
        {
            "label": name,
            "points": [
                [round(frame.x(bar.start) + width / 2, 1), bar.label, f"{bar.parts[i]:.2f} {unit}"]
                for bar in bars
            ],
        }
        for i, name in enumerate(names)
    ]
    return _figure(title, _bar_keys(names) + _cut_off(frame, bars, unit), body, data, at)


def _bar(steps: Sequence[tuple[int, Sequence[float]]]) -> _Bar:
    first, last = steps[0][0], steps[-1][0]
    sums = (sum(part) for part in zip(*(values for _, values in steps), strict=True))
    return _Bar(
        start=first,
        label=f"{first}" if len(steps) == 1 else f"{first}–{last}",
        parts=tuple(part / len(steps) for part in sums),
    )


def _highest_drawn(bars: Sequence[_Bar]) -> float:
    """Return the height of the highest bar that is not cut off."""
    heights = sorted(bar.height for bar in bars)
    limit = TALL * heights[len(heights) // 2]
    return max((height for height in heights if height <= limit), default=heights[-1])


def _bar_keys(names: Sequence[str]) -> str:
    return "".join(
        '<span class="key"><svg class="sample square" viewBox="0 0 10 10">'
        f'<rect class="bar c{i % COLOURS}" width="10" height="10"/></svg>'
        f"{html.escape(name)}</span>"
        for i, name in enumerate(names)
    )


def _cut_off(frame: _Frame, bars: Sequence[_Bar], unit: str) -> str:
    """Return the legend of the bars that are cut off."""
    cut = [
        f"step {bar.label}: {bar.height:.1f} {unit}" for bar in bars if bar.height > frame.y_high
    ]
    if not cut:
        return ""
    more = f" and {len(cut) - 3} more" if len(cut) > 3 else ""
    return f'<span class="key cut">▲ cut off: {html.escape(", ".join(cut[:3]))}{more}</span>'


def _bar_shapes(frame: _Frame, bar: _Bar, width: float) -> str:
    """Draw one bar, with a mark where it is cut off."""
    x = frame.x(bar.start)
    shapes, base = [], 0.0
    for i, value in enumerate(bar.parts):
        top = min(base + value, frame.y_high)
        if top > base:
            height = frame.y(base) - frame.y(top)
            shapes.append(
                f'<rect class="bar c{i % COLOURS}" x="{x:.1f}" width="{width:.1f}" '
                f'y="{frame.y(top):.1f}" height="{height:.1f}"/>'
            )
        base = top
    if bar.height > frame.y_high:
        shapes.append(_break_sign(frame, x, width))
    return "".join(shapes)


def _break_sign(frame: _Frame, x: float, width: float) -> str:
    """Draw a zigzag through the top of a bar, and an arrow above it."""
    edge, middle, half = frame.y(frame.y_high), x + width / 2, (width + 4) / 2
    zigzag = f"M{x - 2:.1f} {edge + 12:.1f}l{half:.1f} -4l{half:.1f} 4"
    arrow = f"M{middle - 5:.1f} {edge - 2:.1f}h10l-5 -8z"
    return f'<path class="break" d="{zigzag}"/><path class="cut" d="{arrow}"/>'


def _figure(
    title: str, legend: str, body: str, data: Sequence[Mapping[str, Any]], at: str = "step {}"
) -> str:
    # The page's script shows what JSON.parse returns, so that JSON's own escapes do not help.
    labelled = [{**line, "label": visible(line["label"])} for line in data]
    points = html.escape(json.dumps(labelled, allow_nan=False), quote=True)
    name = html.escape(title)
    cursor = f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/>'
    return (
        f"<figure><figcaption>{name}</figcaption>"
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}" '
        f'data-at="{html.escape(at)}" data-series="{points}">{body}{cursor}</svg>'
        f'<div class="legend">{legend}</div>'
        '<div class="readout" aria-live="polite"></div></figure>'
    )
