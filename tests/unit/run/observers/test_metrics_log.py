"""metrics.jsonl: all metrics of a run, written line by line and read back."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from rlsys.run.directory import RunDirectory
from rlsys.run.observers.html_report import write_report
from rlsys.run.observers.metrics_log import MetricsLog, read_metrics
from tests.support.step_values import STEP


def test_metrics_are_written_line_by_line_and_read_back(directory: RunDirectory):
    log = MetricsLog(directory)
    log.on_step(1, STEP)
    log.on_evaluation(1, {"eval/accuracy": 0.75})
    log.on_step(2, {"reward/mean": math.nan})
    assert log.state() == 3
    records = read_metrics(directory.metrics)  # flushed: readable while the run goes on
    assert [(r.kind, r.step) for r in records] == [("train", 1), ("eval", 1), ("train", 2)]
    assert records[0].values == STEP
    assert math.isnan(records[2].values["reward/mean"])
    assert "NaN" not in directory.metrics.read_text()  # JSON has no NaN
    log.on_end("finished", "")
    assert list(directory.tensorboard.iterdir())


def test_every_line_is_valid_json_whatever_the_numbers_are(directory: RunDirectory):
    """NaN and infinities are written as null, NumPy numbers as numbers, and a note is added."""

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    log = MetricsLog(directory)
    broken = {"advantage/shrinkage": math.nan, "policy/ratio_max": math.inf}
    numpy_number: Any = np.float32(0.5)
    log.on_step(1, STEP | broken | {"policy/loss": numpy_number})
    log.on_evaluation(1, {"eval/accuracy": -math.inf})
    log.on_end("finished", "")
    lines = [
        json.loads(line, parse_constant=refuse)
        for line in directory.metrics.read_text().splitlines()
    ]
    assert lines[0]["values"]["advantage/shrinkage"] is None
    assert lines[0]["values"]["policy/loss"] == 0.5
    assert lines[0]["notes"] == ["not finite: advantage/shrinkage, policy/ratio_max"]
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
    resumed = MetricsLog(directory)
    resumed.load_state(2)
    resumed.on_step(3, {"reward/mean": 0.5})
    resumed.on_end("finished", "")
    assert [r.values["reward/mean"] for r in read_metrics(directory.metrics)] == [0.25, 0.25, 0.5]


def test_metrics_of_an_old_kind_stay_readable(directory: RunDirectory):
    line = {"kind": "train", "step": 1, "time": 0.0, "values": {"a": 1.0}, "something": "new"}
    directory.metrics.write_text(json.dumps(line) + "\n")
    assert read_metrics(directory.metrics)[0].values == {"a": 1.0}
