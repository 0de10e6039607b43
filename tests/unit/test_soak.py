"""The figures of benchmarks.soak: slopes, names of processes, and sizes of files."""

from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks.soak import (
    PANELS,
    Sample,
    draw,
    name_of,
    read_samples,
    sizes,
    slope_per_1000,
    table,
    use_of,
)


def test_the_slope_is_that_of_the_last_80_percent():
    steps = np.arange(0.0, 1001.0, 100.0)
    # It rises by 50 in the first 100 steps, and then by 2 per 1,000.
    values = np.where(steps < 100, 0.0, 50.0 + 0.002 * steps)
    assert slope_per_1000(steps, values) == pytest.approx(2.0)
    assert slope_per_1000(np.array([5.0]), np.array([1.0])) == 0.0


def write(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(["seconds,step,measure,name,value", *rows]) + "\n")
    return path


def test_a_table_has_a_row_for_each_series_and_the_seconds_per_step(tmp_path: Path):
    rows = [f"{10 * i},{100 * i},private_mib,driver,{100 + i}" for i in range(11)]
    lines = table(read_samples(write(tmp_path / "soak.csv", *rows))).splitlines()
    assert lines[2:] == [
        "| private_mib | driver | 101 | 110 | +10 |",  # one per 100 steps
        "| step_s | all | 0.1 | 0.1 | +0 |",
    ]


def test_seconds_per_step_skip_samples_without_a_new_step(tmp_path: Path):
    rows = ["1,5,threads,driver,3", "2,5,threads,driver,3", "6,7,threads,driver,3"]
    found = read_samples(write(tmp_path / "soak.csv", *rows))
    assert [one for one in found if one.measure == "step_s"] == [
        Sample(seconds=6.0, step=7, measure="step_s", name="all", value=2.0)
    ]


def test_a_figure_is_drawn_of_every_measure(tmp_path: Path):
    rows = [f"{i},{i},{measure},a,{i}" for measure in PANELS.values() for i in (1, 2)]
    draw(read_samples(write(tmp_path / "soak.csv", *rows)), tmp_path / "soak.png")
    assert (tmp_path / "soak.png").read_bytes()[:4] == b"\x89PNG"


def test_files_of_one_kind_count_together(tmp_path: Path):
    for name, size in (("worker-3fa2-01000000-12.out", 3), ("worker-77-ffffffff-9.out", 4)):
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step_1.parquet").write_bytes(b"x" * 5)
    assert sizes(tmp_path) == {"worker.out": 7, "rollouts": 5}


def test_a_process_is_measured():
    own = psutil.Process()
    found = use_of(own)
    assert 0 < found["private_mib"] < found["resident_mib"]
    assert found["threads"] >= 1
    assert found["files"] >= 3
    assert name_of(own)
