"""Charts show equal lines, missing values, cut bars, a single step, and ten thousand steps."""

from __future__ import annotations

import html
import itertools
import json
import math
import re

import pytest

from rlsys.run.observers.charts import (
    Series,
    format_number,
    line_chart,
    log_ticks,
    needs_log,
    nice_ticks,
    smoothed,
    stacked_bars,
    tick_labels,
)


def polylines(chart: str, kind: str) -> list[list[tuple[float, float]]]:
    """Return the coordinates of each polyline of a class such as "line c0"."""
    found = re.findall(rf'<polyline class="{kind}" points="([^"]*)"', chart)
    return [[_point(pair) for pair in points.split()] for points in found]


def _point(pair: str) -> tuple[float, float]:
    x, y = pair.split(",")
    return float(x), float(y)


def hover(chart: str) -> list[dict]:
    """Return the values that the page shows under the pointer."""
    found = re.search(r'data-series="([^"]*)"', chart)
    assert found is not None
    return json.loads(html.unescape(found[1]), parse_constant=lambda name: pytest.fail(name))


def line(label: str, ys: list[float], *, markers: bool = False) -> Series:
    return Series(label, tuple((float(i), y) for i, y in enumerate(ys, start=1)), markers=markers)


def test_ticks_are_round_and_cover_the_range():
    for low, high in ((0.013, 0.87), (-3.0, 12.0), (5.0, 5.0), (0.0, 1e-6)):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low
        assert ticks[-1] >= high
        assert len({round(b - a, 12) for a, b in itertools.pairwise(ticks)}) == 1


def test_ticks_of_a_log_scale():
    assert log_ticks(0.02, 3.0) == pytest.approx([0.01, 0.1, 1, 10])
    assert log_ticks(1e-12, 1.0) == pytest.approx([10.0**k for k in range(-12, 1, 2)])
    assert log_ticks(1.0, 1.0) == pytest.approx([1, 10])


def test_numbers_are_short():
    shown = {0.0: "0", 0.03125: "0.03125", 1234.0: "1,234", 1.5e-6: "1.5e-06", 12345.6: "12,346"}
    shown |= {1234567.0: "1.23M", -2.5e9: "-2.5G", 123456.0: "123k", math.nan: "not finite"}
    assert {value: format_number(value) for value in shown} == shown
    assert format_number(0.125, percent=True) == "12.5 %"
    for power in range(-12, 16):
        assert len(format_number(-1.2345 * 10.0**power)) <= 8


def test_neighbouring_ticks_have_different_labels():
    assert tick_labels([1000.002, 1000.004]) == ["1000.002", "1000.004"]
    assert tick_labels([0.1, 0.2]) == ["0.1", "0.2"]


def test_a_chart_without_points_is_nothing_and_titles_are_escaped():
    assert line_chart("empty", [Series("a", ())]) == ""
    assert line_chart("never finite", [line("a", [math.nan, math.inf])]) == ""
    chart = line_chart("a < b", [Series("x & y", ((1, 0.5), (2, 0.7)))])
    assert "a &lt; b" in chart
    assert "x &amp; y" in chart
    assert chart.count("<circle") == 2


def test_equal_lines_are_told_apart():
    """Each line has the dashes of its class, and the legend says that they are equal."""
    chart = line_chart("t", [line("k1", [0.1] * 20), line("k3", [0.1] * 20)])
    assert len(polylines(chart, "line c0")) == len(polylines(chart, "line c1")) == 1
    assert "k3 <b>0.1</b> <i>(= k1)</i>" in chart
    assert "(= " not in line_chart("t", [line("k1", [0.1] * 20), line("k3", [0.2] * 20)])


def test_equal_dots_do_not_cover_each_other():
    chart = line_chart("t", [line("a", [0.5]), line("b", [0.5])])
    assert re.findall(r'r="([\d.]+)"', chart) == ["3.2", "2.0"]


def test_a_missing_value_breaks_the_line_and_is_marked():
    chart = line_chart("t", [line("a", [1.0, 2.0, math.nan, 4.0, math.inf, 6.0])])
    assert [len(run) for run in polylines(chart, "line c0")] == [2, 1, 1]
    assert chart.count('class="missing"') == 2
    assert "× not finite at 2 of 6" in chart
    assert [text for _, _, text in hover(chart)[0]["points"]][2] == "not finite"


def test_a_missing_value_is_not_averaged():
    points = [(1.0, 1.0), (2.0, math.nan), (3.0, 1.0)]
    assert [y for _, y in smoothed(points)][::2] == pytest.approx([1, 1])


def test_a_single_step_stands_in_the_middle():
    chart = line_chart("t", [line("a", [0.5])])
    (x,) = re.findall(r'<circle[^>]*cx="([\d.]+)"', chart)
    assert float(x) == pytest.approx((52 + 410) / 2)
    assert ">1</text>" in chart


def test_ten_thousand_steps_stay_small_and_keep_their_peak():
    ys = [math.sin(i / 500) for i in range(10_000)]
    ys[6789] = 40.0
    chart = line_chart("t", [line("a", ys), line("b", ys[:7000])])
    assert len(chart) < 100_000
    (raw,) = polylines(chart, "raw c0")
    assert len(raw) <= 400
    assert min(y for _, y in raw) == 12.0  # the peak touches the upper edge, 40 being a tick
    first = hover(chart)[0]["points"][0]
    assert first[1] == "1–50"
    assert first[2] == format_number(sum(ys[:50]) / 50)
    grids = [[point[0] for point in series["points"]] for series in hover(chart)]
    assert grids[1] == grids[0][: len(grids[1])]  # one grid, so that the pointer finds both


def test_a_log_scale_is_taken_where_it_is_needed():
    spike = [1.0] * 30 + [1e5]
    assert needs_log(spike)
    assert not needs_log([1.0, 2.0, 30.0])
    assert not needs_log([-1.0, *spike])
    assert not needs_log([0.0])
    assert "(log scale)" in line_chart("t", [line("a", spike)], may_be_log=True)
    assert "(log scale)" not in line_chart("t", [line("a", spike)])
    zero = line_chart("t", [line("a", [0.0, *spike])], may_be_log=True)
    (raw,) = polylines(zero, "raw c0")
    assert raw[0][1] == max(y for _, y in raw) <= 190 - 26


def test_a_bar_that_leaves_the_frame_carries_a_sign():
    steps = [(1, [30.0, 5.0]), *((i, [1.0, 1.0]) for i in range(2, 12))]
    chart = stacked_bars("t", ("up", "sync"), steps, "s")
    assert chart.count('class="break"') == chart.count('class="cut"') == 1
    assert "▲ cut off: step 1: 35.0 s" in chart
    assert hover(chart)[0]["points"][0][2] == "30.00 s"
    even = stacked_bars("t", ("up", "sync"), steps[1:], "s")
    assert 'class="break"' not in even
    assert "cut off" not in even


def test_bars_of_many_steps_are_averaged():
    chart = stacked_bars("t", ("a",), [(i, [float(i % 2)]) for i in range(1, 601)], "s")
    assert chart.count('class="bar c0" x=') == 60
    assert hover(chart)[0]["points"][0][1:] == ["1–10", "0.50 s"]
