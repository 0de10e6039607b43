"""Console output of a run: plain lines, the live display, and the summary at the end."""

from __future__ import annotations

import math

import pytest
from rich.console import Console

from rlsys.run.directory import RunDirectory
from rlsys.run.observers.console import COLUMNS, Progress, duration, phase_line, print_summary
from rlsys.run.observers.html_report import write_report
from rlsys.run.observers.metrics_log import MetricsLog, read_metrics
from rlsys.run.observers.run_status import StatusWriter
from tests.support.step_values import PARTLY, STEP


def plain_console() -> Console:
    return Console(record=True, width=200, force_terminal=False)


def test_durations():
    assert [duration(seconds) for seconds in (7.4, 61, 3599.7, 3725)] == [
        "7 s",
        "1 m 01 s",
        "1 h 00 m",
        "1 h 02 m",
    ]


def test_phase_line():
    assert phase_line(STEP) == "generate 2.00 s (25%), update 5.00 s (62%)"


def test_plain_progress_prints_a_row_a_step():
    console = plain_console()
    progress = Progress(console, live=True)  # no terminal: plain lines all the same
    progress.on_start(1, 2)
    progress.on_evaluation(0, {"eval/accuracy": 0.1, "eval/pass@4": 0.3})
    progress.on_step(1, STEP)
    progress.on_step(2, STEP)
    progress.on_checkpoint(2, "runs/x/checkpoints/step_000002")
    progress.on_end("interrupted", "stopped")
    lines = console.export_text().splitlines()
    assert lines[0] == "held-out accuracy after 0 steps: 10.0% (pass@4 30.0%)"
    assert lines[1].split()[:4] == ["step", "reward", "correct", "length"]
    assert lines[2].split()[:3] == ["1/2", "0.250", "50.0%"]
    assert "gen 2.0" in lines[2]
    assert lines[3].split()[0] == "2/2"
    assert lines[4:] == [
        "checkpoint runs/x/checkpoints/step_000002",
        "run interrupted after 2 steps: stopped",
    ]


def test_a_row_shows_what_has_no_value_as_a_dash_and_keeps_its_columns():
    console = plain_console()
    progress = Progress(console, live=False)
    progress.on_start(1, 1)
    progress.on_step(1, STEP | {"reward/mean": -123456.7, "policy/grad_norm": math.nan})
    header, row, note = console.export_text().splitlines()
    names = header.split()
    assert row.split()[names.index("reward")] == "-1.2e+05"
    assert row.split()[names.index("grad")] == "-"
    assert note.strip() == "!  not finite: policy/grad_norm"


def test_a_row_of_expert_iteration_shows_what_was_kept_and_keeps_its_columns():
    console = plain_console()
    progress = Progress(console, live=False)
    progress.on_start(1, 2)
    sampled = {"reward/mean": 0.25, "reward/accuracy": 0.5, "expert/kept_fraction": 0.4}
    progress.on_step(1, sampled | {"policy/loss": 1.5, "time/step": 2.0})
    progress.on_step(2, sampled | {"expert/kept_fraction": 0.0, "time/step": 1.0})
    header, first, second = console.export_text().splitlines()
    assert header.split()[:5] == ["step", "loss", "reward", "correct", "kept"]
    assert first.split()[:5] == ["1/2", "1.5000", "0.250", "50.0%", "40.0%"]
    assert second.split()[:5] == ["2/2", "-", "0.250", "50.0%", "0.0%"]
    assert len(first.split()) == len(second.split())


def test_what_a_step_is_to_be_told_of_stands_below_its_row():
    console = plain_console()
    progress = Progress(console, live=False)
    progress.on_start(1, 2)
    progress.on_step(1, STEP)
    progress.on_step(2, STEP | PARTLY | {"policy/skipped_updates": 1.0, "policy/updates": 3.0})
    _, _, row, warning, note = console.export_text().splitlines()
    assert row.split()[0] == "2/2"
    assert warning == "        !  1 of 4 updates skipped: 1 without a trained response"
    assert note == "           trained on 32 of 96 responses: reward 0.500, correct 50.0%"


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_narrow_terminal_cuts_no_number(width: int):
    console = Console(record=True, width=width, force_terminal=True)
    progress = Progress(console, live=True)
    progress.on_start(1, 10)
    wide = {name: 1234567.0 for _, name, _ in COLUMNS}
    progress.on_step(1, wide)
    assert progress._live is not None
    with console.capture() as capture:
        console.print(progress._live.get_renderable())
    progress.on_end("finished", "")
    assert "…" not in capture.get()
    assert capture.get().count("1.2e+06") == len(COLUMNS) - 1
    assert capture.get().count("1234567") == 1  # tok/s, without decimals


def test_a_warning_outlives_its_step_on_a_live_display_once():
    console = Console(record=True, width=120, force_terminal=True)
    progress = Progress(console, live=True)
    progress.on_start(1, 10)
    for step in range(1, 5):
        progress.on_step(step, STEP | ({"rollout/truncated_fraction": 1.0} if step > 2 else {}))
    assert progress._live is not None
    with console.capture() as capture:
        console.print(progress._live.get_renderable())
    progress.on_end("finished", "")
    assert "every response was truncated" in capture.get()
    assert console.export_text().count("! step 3: every response was truncated") == 1
    assert "! step 4" not in console.export_text()


def test_the_live_panel_shows_step_phase_and_numbers():
    console = Console(record=True, width=120, force_terminal=True)
    progress = Progress(console, live=True)
    progress.on_start(1, 10)
    progress.on_evaluation(0, {"eval/accuracy": 0.1})
    progress.on_step(1, STEP)
    progress.on_phase(2, "update")
    assert progress._live is not None
    with console.capture() as capture:
        console.print(progress._live.get_renderable())
    panel = capture.get()
    for text in ("step 1/10", "ETA", "update", "reward", "0.250", "generate 2.00 s", "0: 10.0%"):
        assert text in panel
    progress.on_end("finished", "")


def test_summary_and_report_say_what_was_trained_and_what_went_wrong(directory: RunDirectory):
    """A third of the samples is trained, two steps have failures, and the run is interrupted."""
    log, status = MetricsLog(directory), StatusWriter(directory)
    status.on_start(1, 60)
    for step in (1, 2, 3):
        values = STEP | PARTLY | {"memory/policy": 4.0 - step, "reward/errors": float(step > 1)}
        log.on_step(step, values)
        status.on_step(step, values)
    log.on_step(3, {"reward/mean": math.nan})
    status.on_end("interrupted", "")
    log.on_end("interrupted", "")
    console = plain_console()
    print_summary(console, read_metrics(directory.metrics), directory, 75)
    text = console.export_text()
    for part in (
        "interrupted after 3 of 60 steps",
        "0.250 -> - (mean",
        "33.3% of the responses, their reward 0.500 -> -",
        "2 steps, 2 to 3 (last: reward functions failed on responses of this step: errors 1)",
    ):
        assert part in text
    write_report(directory)
    page = directory.report.read_text()
    for part in (
        "trained on",
        "33.3% of the samples",
        "mean of trained samples",
        "rewards failed",
    ):
        assert part in page


def test_the_peak_memory_of_the_summary_is_the_highest(directory: RunDirectory):
    log = MetricsLog(directory)
    for peak in (2.0, 5.0, 3.0):
        log.on_step(1, STEP | {"memory/policy": peak})
    log.on_end("finished", "")
    console = plain_console()
    print_summary(console, read_metrics(directory.metrics), directory, 75)
    assert "policy 5.00 GiB" in console.export_text()


def test_summary(directory: RunDirectory):
    log = MetricsLog(directory)
    log.on_evaluation(0, {"eval/accuracy": 0.1})
    log.on_step(1, STEP)
    log.on_step(2, STEP | {"reward/mean": 0.75})
    log.on_evaluation(2, {"eval/accuracy": 0.6})
    log.on_end("finished", "")
    console = plain_console()
    print_summary(console, read_metrics(directory.metrics), directory, 75)
    text = console.export_text()
    for part in (
        "10.0% -> 60.0% (steps 0 -> 2)",
        "0.250 -> 0.750",
        "2, 8.00 s each",
        "200, 50 per second",
        "policy 3.00 GiB",
        "1 m 15 s",
    ):
        assert part in text
    assert f"metrics      {directory.metrics}" in text.replace("\n", " ")
