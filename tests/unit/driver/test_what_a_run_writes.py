"""metrics.jsonl, the console, the report and the run's directory."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rlsys.config import RunConfig, RunSection
from rlsys.data.batches import ScoredBatch
from rlsys.data.rollout_files import read_rollouts, write_rollouts
from rlsys.run.directory import RunDirectory
from rlsys.run.observers.console import COLUMNS, Progress, duration, phase_line, print_summary
from rlsys.run.observers.html_report import series_over_position, write_report
from rlsys.run.observers.metrics_log import MetricsLog, read_metrics
from rlsys.run.observers.run_status import StatusWriter
from tests.support.rollout_examples import random_rollouts, rewards_of, train_batch

STEP = {
    "reward/mean": 0.25,
    "reward/accuracy": 0.5,
    "rollout/tokens": 100.0,
    "policy/grad_norm": 1.5,
    "time/generate": 2.0,
    "time/update": 5.0,
    "time/step": 8.0,
    "memory/policy": 3.0,
}

PARTLY = {
    "rollout/responses": 96.0,
    "trained/responses": 32.0,
    "trained/reward_mean": 0.5,
    "trained/accuracy": 0.5,
}


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "run")
    made.create(RunConfig())
    return made


def test_metrics_are_written_line_by_line_and_read_back(directory: RunDirectory):
    log = MetricsLog(directory)
    log.on_step(1, STEP)
    log.on_evaluation(1, {"eval/accuracy": 0.75})
    log.on_step(2, {"reward/mean": math.nan})
    assert log.position() == 3
    records = read_metrics(directory.metrics)  # flushed: readable while the run goes on
    assert [(r.kind, r.step) for r in records] == [("train", 1), ("eval", 1), ("train", 2)]
    assert records[0].values == STEP
    assert math.isnan(records[2].values["reward/mean"])
    assert "NaN" not in directory.metrics.read_text()  # JSON has no NaN
    log.on_end("finished", "")
    assert list(directory.tensorboard.iterdir())


def test_every_line_is_valid_json_whatever_the_numbers_are(directory: RunDirectory):
    """NaN and infinities are null, numbers of NumPy are numbers, and a person is told."""

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    log = MetricsLog(directory)
    broken = {"advantage/strength": math.nan, "policy/ratio_max": math.inf}
    numpy_number: Any = np.float32(0.5)
    log.on_step(1, STEP | broken | {"policy/loss": numpy_number})
    log.on_evaluation(1, {"eval/accuracy": -math.inf})
    log.on_end("finished", "")
    lines = [
        json.loads(line, parse_constant=refuse)
        for line in directory.metrics.read_text().splitlines()
    ]
    assert lines[0]["values"]["advantage/strength"] is None
    assert lines[0]["values"]["policy/loss"] == 0.5
    assert lines[0]["notes"] == ["not finite: advantage/strength, policy/ratio_max"]
    assert read_metrics(directory.metrics)[0].notes == tuple(lines[0]["notes"])
    assert "notes" not in lines[1] or lines[1]["notes"] == ["not finite: eval/accuracy"]
    write_report(directory)
    page = directory.report.read_text()
    assert "What went wrong" in page
    assert "NaN" not in page


def test_a_line_that_a_crash_cut_off_is_left_out(directory: RunDirectory):
    log = MetricsLog(directory)
    log.on_step(1, STEP)
    log.on_end("failed", "")
    with directory.metrics.open("a") as file:
        file.write('{"kind": "train", "st')
    assert [record.step for record in read_metrics(directory.metrics)] == [1]


def test_a_resume_drops_what_the_checkpoint_did_not_know(directory: RunDirectory):
    log = MetricsLog(directory)
    for step in (1, 2, 3):
        log.on_step(step, STEP)
    log.on_end("failed", "")
    resumed = MetricsLog(directory, keep_lines=2)
    assert resumed.position() == 2
    resumed.on_step(3, {"reward/mean": 0.5})
    resumed.on_end("finished", "")
    assert [r.values["reward/mean"] for r in read_metrics(directory.metrics)] == [0.25, 0.25, 0.5]


def test_durations():
    assert [duration(seconds) for seconds in (7.4, 61, 3599.7, 3725)] == [
        "7 s",
        "1 m 01 s",
        "1 h 00 m",
        "1 h 02 m",
    ]


def test_phase_line():
    assert phase_line(STEP) == "generate 2.00 s (25%), update 5.00 s (62%)"


def plain_console() -> Console:
    return Console(record=True, width=200, force_terminal=False)


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
        progress.on_step(step, STEP | ({"rollout/truncated_share": 1.0} if step > 2 else {}))
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
    """Rewards of all samples first; a third of them trained; the highest memory, not the last; a failure in two steps; and no end yet."""
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
        "mean of those trained on",
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


def test_lines_of_what_was_trained_are_drawn_only_where_it_differs(directory: RunDirectory):
    log = MetricsLog(directory)
    for step in range(1, 12):
        log.on_step(step, STEP | {"trained/reward_mean": STEP["reward/mean"]})
    log.on_end("finished", "")
    write_report(directory)
    page = directory.report.read_text()
    assert "Reward of all samples" in page
    assert "mean of those trained on" not in page
    assert "Failures a step" not in page


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
        "200, 50 a second",
        "policy 3.00 GiB",
        "1 m 15 s",
    ):
        assert part in text
    assert f"metrics      {directory.metrics}" in text.replace("\n", " ")


def test_shares_over_position_are_drawn_for_the_first_the_middle_and_the_last_step_that_have_them(
    directory: RunDirectory,
):
    log = MetricsLog(directory)
    for step in range(1, 8):
        shares = (
            {f"advantage/effective_share/at_{p:03d}": 1 - step * p / 1000 for p in (100, 0, 50)}
            if step > 2
            else {}
        )
        log.on_step(step, STEP | shares)
    lines = series_over_position(read_metrics(directory.metrics), "advantage/effective_share/at_")
    assert [line.label for line in lines] == ["step 3", "step 5", "step 7"]
    assert lines[-1].points == ((0, 1.0), (50, 1 - 0.35), (100, 1 - 0.7))
    write_report(directory)
    page = directory.report.read_text()
    assert "over position (% of the longest response)" in page
    assert 'data-at="{} % of the longest response"' in page
    assert series_over_position([], "advantage/") == []


def test_the_report_is_one_page_that_needs_nothing_else(directory: RunDirectory):
    log = MetricsLog(directory)
    for step in range(1, 12):
        log.on_step(step, STEP)
    log.on_evaluation(11, {"eval/accuracy": 0.6})
    log.on_end("finished", "")
    write_report(directory)
    page = directory.report.read_text()
    assert "Reward" in page
    assert "algorithm.advantage.name" in page
    for outside in ('src="http', "href=", "@import", "url("):
        assert outside not in page
    assert not list(directory.path.glob("*.partial"))


def test_the_file_of_a_step_holds_everything_that_was_sampled_and_says_what_was_trained(
    directory: RunDirectory,
):
    """Two responses are masked out, a further group was dropped; only the other responses have advantages."""
    batch = train_batch(random_rollouts(4), 4)
    trained = np.arange(len(batch.rollouts)) >= 2
    rest = random_rollouts(5, groups=1)
    dropped = ScoredBatch(rollouts=rest, rewards=rewards_of(rest))
    path = directory.rollouts / "step_000001.parquet"
    write_rollouts(replace(batch, trained=trained), path, dropped=dropped)
    rows = read_rollouts(path)
    assert [row["trained"] for row in rows] == [*trained, *[False] * len(rest)]
    assert [row["response"] for row in rows] == [
        *batch.rollouts.response_texts,
        *rest.response_texts,
    ]
    split = np.split(batch.advantages, batch.rollouts.sequence_offsets[1:-1])
    for row, own in zip(rows, [*split, *[None] * len(rest)], strict=True):
        expected = own.tolist() if row["trained"] and own is not None else None
        assert row["advantages"] == expected
        assert row["correct"] == (row["accuracy"] >= 0.5)
        assert len(row["token_ids"]) == len(row["rollout_logprobs"])


def test_advantages_that_the_update_estimated_take_their_place(directory: RunDirectory):
    rollouts = random_rollouts(4)
    batch = ScoredBatch(rollouts=rollouts, rewards=rewards_of(rollouts))
    path = directory.rollouts / "step_000001.parquet"
    estimated = np.arange(len(batch.rollouts.token_ids), dtype=np.float32)
    write_rollouts(batch, path, advantages=estimated)
    flat = [value for row in read_rollouts(path) for value in row["advantages"]]
    assert flat == estimated.tolist()


@pytest.mark.parametrize(("advantages", "shown"), [(True, "+0.00"), (False, "–")])
def test_the_report_shows_samples_with_the_advantage_that_their_file_holds(
    directory: RunDirectory, advantages: bool, shown: str
):
    """Where each mini-batch estimates its own, there is none."""
    rollouts = random_rollouts(4)
    batch = ScoredBatch(rollouts=rollouts, rewards=rewards_of(rollouts))
    if advantages:
        batch = batch.credited(np.zeros(len(rollouts.token_ids), dtype=np.float32))
    write_rollouts(batch, directory.rollouts / "step_000001.parquet")
    write_report(directory)
    assert f'<td class="num">{shown}</td>' in directory.report.read_text()


def test_the_report_of_a_run_without_steps(directory: RunDirectory):
    write_report(directory)
    assert "No step is complete yet" in directory.report.read_text()


def test_run_directory_refuses_to_overwrite_and_to_resume_nothing(
    directory: RunDirectory, tmp_path: Path
):
    with pytest.raises(ValueError, match=r"run\.directory: .* exists already\. Add --resume"):
        directory.check(resume=False)
    directory.check(resume=True)
    with pytest.raises(ValueError, match="holds no run to resume"):
        RunDirectory(tmp_path / "none").check(resume=True)
    (tmp_path / "empty").mkdir()
    RunDirectory(tmp_path / "empty").check(resume=False)


def test_run_directory_names(tmp_path: Path):
    assert RunDirectory.named_by(RunConfig(run=RunSection(directory="runs/mine"))).path == Path(
        "runs/mine"
    )
    assert RunDirectory.named_by(RunConfig(recipe="dapo_math")).path.name.startswith("dapo_math-")


def test_metrics_of_an_old_kind_stay_readable(directory: RunDirectory):
    line = {"kind": "train", "step": 1, "time": 0.0, "values": {"a": 1.0}, "something": "new"}
    directory.metrics.write_text(json.dumps(line) + "\n")
    assert read_metrics(directory.metrics)[0].values == {"a": 1.0}
