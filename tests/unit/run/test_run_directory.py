"""The directory of a run: it is claimed by one run, and must be writable."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlsys.config import RunConfig, RunSection
from rlsys.config.command_line import load_yaml
from rlsys.run.directory import RunDirectory
from rlsys.run.observers.metrics_log import MetricsLog, read_metrics


def test_two_runs_of_one_second_get_two_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    directory = RunDirectory(Path("runs/grpo_math-20261125-024500"), is_given=False)
    for _ in range(2):
        directory.check(resume=False)  # neither is refused because of the other
    with ThreadPoolExecutor(4) as pool:
        claimed = list(pool.map(lambda _: directory.claim().path.name, range(4)))
    assert sorted(claimed) == [directory.path.name, *(f"{directory.path.name}-{n}" for n in "234")]


def test_a_name_that_was_given_belongs_to_one_run(tmp_path: Path):
    directory = RunDirectory.named_by(RunConfig(run=RunSection(directory=str(tmp_path / "mine"))))
    assert directory.claim() == directory
    with pytest.raises(ValueError, match=r"run\.directory: .*mine' exists already"):
        directory.claim()


def test_a_refused_run_leaves_its_name_free(tmp_path: Path):
    given = RunDirectory(tmp_path / "given").claim()
    given.create(RunConfig())
    given.log.write_text("x")
    given.discard()
    given.check(resume=False)
    own = RunDirectory(tmp_path / "own", is_given=False).claim()
    own.create(RunConfig())
    own.discard()
    assert not own.path.exists()


def test_a_file_is_no_directory(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run\.directory: .*file' is a file\. Name a directory"):
        RunDirectory(tmp_path / "file").check(resume=False)
    with pytest.raises(ValueError, match=r"run\.directory: .*file/below' cannot be made below"):
        RunDirectory(tmp_path / "file" / "below").check(resume=False)


def test_a_place_that_cannot_be_written_to_is_refused_early():
    """Nobody can write to /proc, not even root."""
    directory = RunDirectory(Path("/proc/runs/a"))
    with pytest.raises(ValueError, match=r"run\.directory: '/proc/runs/a' cannot be written to"):
        directory.check(resume=False)
    with pytest.raises(ValueError, match=r"run\.directory: '/proc/runs/a' cannot be written to"):
        directory.claim()


RAY_WORKING_DIR = "session_2026-11-30_22-25-44_078040_9274/runtime_resources/working_dir_files/_p"


def test_a_directory_that_ray_deletes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = tmp_path / RAY_WORKING_DIR
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    message = r"a directory of Ray's own.*absolute path.*--run\.directory /PATH/NAME"
    for directory in (None, "runs/mine", str(job / "mine")):
        config = RunConfig(run=RunSection(directory=directory))
        for resume in (False, True):
            with pytest.raises(ValueError, match=rf"^run\.directory: .*{message}"):
                RunDirectory.named_by(config).check(resume=resume)
    (tmp_path / "session_latest").symlink_to(job.parents[2])
    with pytest.raises(ValueError, match=message):
        RunDirectory(tmp_path / "session_latest" / "runs").check(resume=False)

    with pytest.raises(ValueError, match=r"^output: .*--output /PATH/NAME"):
        RunDirectory(Path("rankings"), is_given=False, field="output").check(resume=False)

    RunDirectory(tmp_path / "runs" / "session_2026").check(resume=False)


def test_a_directory_with_other_files_is_not_said_to_hold_a_run(tmp_path: Path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="holds other files and no run"):
        RunDirectory(tmp_path).check(resume=False)


def test_a_check_leaves_no_trace(tmp_path: Path):
    RunDirectory(tmp_path / "a" / "b").check(resume=False)
    assert list(tmp_path.iterdir()) == []
    run = RunDirectory(tmp_path / "run")
    run.create(RunConfig())
    before = sorted((path, path.stat().st_mtime_ns) for path in run.path.rglob("*"))
    run.check(resume=True)
    assert sorted((path, path.stat().st_mtime_ns) for path in run.path.rglob("*")) == before


def test_the_configuration_is_replaced_whole(tmp_path: Path):
    run = RunDirectory(tmp_path / "run")
    run.create(RunConfig())
    run.create(RunConfig(recipe="other"))
    assert load_yaml(run.config).recipe == "other"
    assert not list(run.path.glob("*.partial"))


def test_metrics_are_untouched_until_the_loop_starts(tmp_path: Path):
    """A resume that is refused at set-up has created a `MetricsLog` before."""
    run = RunDirectory(tmp_path / "run")
    run.create(RunConfig())
    log = MetricsLog(run)
    for step in (1, 2, 3):
        log.on_step(step, {"reward/mean": 0.5})
    log.on_end("failed", "")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    resumed = MetricsLog(run)
    resumed.load_state(2)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    resumed.on_start(3, 3)
    assert [record.step for record in read_metrics(run.metrics)] == [1, 2]
    resumed.on_end("finished", "")


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
