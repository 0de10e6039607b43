"""The charts that a report shows."""

from __future__ import annotations

from rlsys.run.directory import RunDirectory
from rlsys.run.observers.html_report import write_report
from rlsys.run.observers.metrics_log import MetricsLog, read_metrics
from rlsys.run.observers.run_charts import series_over_position
from tests.support.step_values import STEP


def test_lines_of_what_was_trained_are_drawn_only_where_it_differs(directory: RunDirectory):
    log = MetricsLog(directory)
    for step in range(1, 12):
        log.on_step(step, STEP | {"trained/reward_mean": STEP["reward/mean"]})
    log.on_end("finished", "")
    write_report(directory)
    page = directory.report.read_text()
    assert "Reward of all samples" in page
    assert "mean of trained samples" not in page
    assert "Failures per step" not in page


def test_shares_over_position_are_drawn_for_the_first_the_middle_and_the_last_step_that_have_them(
    directory: RunDirectory,
):
    log = MetricsLog(directory)
    for step in range(1, 8):
        shares = (
            {f"advantage/effective_fraction/at_{p:03d}": 1 - step * p / 1000 for p in (100, 0, 50)}
            if step > 2
            else {}
        )
        log.on_step(step, STEP | shares)
    lines = series_over_position(
        read_metrics(directory.metrics), "advantage/effective_fraction/at_"
    )
    assert [line.label for line in lines] == ["step 3", "step 5", "step 7"]
    assert lines[-1].points == ((0, 1.0), (50, 1 - 0.35), (100, 1 - 0.7))
    write_report(directory)
    page = directory.report.read_text()
    assert "over position (% of the longest response)" in page
    assert 'data-at="{} % of the longest response"' in page
    assert series_over_position([], "advantage/") == []
