"""The table, the files and the page of a grid of expert iterations."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pyarrow.parquet
import pytest
from rich.console import Console

from recipes.expert_iteration_math import expert_iteration_math
from rlsys.config.expert_grid import Cell
from rlsys.config.hardware import Hardware
from rlsys.run.directory import RunDirectory
from rlsys.run.expert_grid_summary import CSV_FILE, PARQUET_FILE, result_of, write_summary
from rlsys.run.observers.expert_grid_report import PAGE, effect_points, summary_table, write_page
from rlsys.run.observers.metrics_log import MetricsLog
from rlsys.run.observers.run_status import StatusWriter

DONE = Cell(samples=4, epochs=2, problems=64)
MISSING = Cell(samples=8, epochs=2, problems=64)


def finished(path: Path, accuracy: float = 0.5) -> RunDirectory:
    """Write the files of a finished run of two steps."""
    directory = RunDirectory(path)
    directory.create(
        expert_iteration_math(Hardware(cpus=2, memory_gib=8, gpus=0, gpu_memory_gib=0))
    )
    log, status = MetricsLog(directory), StatusWriter(directory)
    status.on_start(1, 2)
    log.on_evaluation(0, {"eval/accuracy": 0.1})
    for step, kept in ((1, 0.2), (2, 0.4)):
        values = {
            "reward/accuracy": kept + 0.1,
            "expert/kept_fraction": kept,
            "expert/solved_fraction": 2 * kept,
            "rollout/entropy": 1.0 - kept,
            "rollout/tokens": 100.0,
            "policy/loss": 2.0 / step,
            "policy/updates": 3.0,
            "policy/tokens": 40.0,
            "time/step": 1.5,
        }
        log.on_step(step, values)
        status.on_step(step, values)
        log.on_evaluation(step, {"eval/accuracy": accuracy if step == 2 else 0.9})
    log.on_end("finished", "")
    status.on_end("finished", "")
    directory.report.write_text("<p>")
    return directory


def test_a_row_is_computed_from_the_files_of_a_run(tmp_path: Path):
    result = result_of(DONE, finished(tmp_path / DONE.name))
    assert (result.samples, result.epochs, result.problems) == (4, 2, 64)
    assert (result.state, result.steps, result.updates) == ("finished", 2, 6)
    assert (result.accuracy_before, result.accuracy_after) == (0.1, 0.5)
    assert result.accuracy_best == 0.9
    assert (result.reward_first, result.reward_last) == pytest.approx((0.3, 0.5))
    assert result.kept_fraction == pytest.approx(0.3)
    assert result.solved_fraction == pytest.approx(0.6)
    assert (result.entropy_first, result.entropy_last) == pytest.approx((0.8, 0.6))
    assert (result.sampled_tokens, result.trained_tokens) == (200, 80)
    assert result.loss_last == 1.0
    assert result.seconds == 3.0


def test_a_run_that_was_not_started_has_a_row_without_numbers(tmp_path: Path):
    result = result_of(MISSING, RunDirectory(tmp_path / MISSING.name))
    assert (result.state, result.steps, result.updates) == ("not started", 0, 0)
    assert math.isnan(result.accuracy_after)


def test_files_table_and_page(tmp_path: Path):
    cells = [DONE, MISSING]
    finished(tmp_path / DONE.name)
    results = [result_of(cell, RunDirectory(tmp_path / cell.name)) for cell in cells]
    write_summary(results, tmp_path)

    with (tmp_path / CSV_FILE).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["accuracy_after"] for row in rows] == ["0.5", ""]
    table = pyarrow.parquet.read_table(tmp_path / PARQUET_FILE).to_pylist()
    assert [row["samples"] for row in table] == [4, 8]
    assert table[0]["accuracy_after"] == 0.5

    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table(results))
    text = console.export_text()
    first, second = (line.split() for line in text.splitlines() if " 64 " in line)
    assert first == ["4", "2", "64", "finished", "10.0%", "50.0%", "30.0%", "0.600", "3"]
    assert second == ["8", "2", "64", "not", "started", "-", "-", "-", "-", "0"]

    write_page("grid", "tiny", list(zip(cells, results, strict=True)), tmp_path)
    page = (tmp_path / PAGE).read_text()
    assert page.count("<figure") == 5  # a curve for each of five metrics
    assert f'href="{DONE.name}/report.html"' in page
    assert "G 4, epochs 2, D_b 64" in page


def test_the_effect_of_a_value_is_the_mean_over_the_others(tmp_path: Path):
    """G 2 and 4 with epochs 1 and 2: (0.2 + 0.4) / 2 and (0.6 + 0.8) / 2."""
    runs = []
    for samples, epochs, accuracy in ((2, 1, 0.2), (2, 2, 0.4), (4, 1, 0.6), (4, 2, 0.8)):
        cell = Cell(samples=samples, epochs=epochs, problems=64)
        runs.append((cell, result_of(cell, finished(tmp_path / cell.name, accuracy))))
    write_page("grid", "tiny", runs, tmp_path)
    page = (tmp_path / PAGE).read_text()
    assert "Final held-out accuracy over responses per problem (G)" in page
    assert "Final held-out accuracy over epochs of fine-tuning" in page
    assert "over problems per step" not in page
    results = [result for _, result in runs]
    points = effect_points(results, lambda row: row.samples)
    assert points == [(2, pytest.approx(0.3)), (4, pytest.approx(0.7))]
    # G 8 has no result yet, and neither has epochs 2 of all of them then.
    missing = result_of(MISSING, RunDirectory(tmp_path / MISSING.name))
    assert effect_points([*results, missing], lambda row: row.samples) == points
    epochs = effect_points([*results, missing], lambda row: row.epochs)
    assert epochs == [(1, pytest.approx(0.4))]
