"""status.json: how a run ended, even if it was killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from rlsys.run.directory import RunDirectory
from rlsys.run.observers.html_report import main, write_report
from rlsys.run.observers.run_status import (
    RunStatus,
    StatusWriter,
    read_status,
    refuse_running,
)


def read(directory: RunDirectory) -> RunStatus:
    status = read_status(directory)
    assert status is not None
    return status


def reported(directory: RunDirectory) -> str:
    write_report(directory)
    return directory.report.read_text()


def test_a_run_from_start_to_end(directory: RunDirectory):
    assert read_status(directory) is None
    writer = StatusWriter(directory)
    assert read(directory).state == "starting"
    writer.on_start(6, 10)
    writer.on_phase(6, "update")
    writer.on_step(6, {})
    status = read(directory)
    assert (status.state, status.step, status.steps, status.phase) == (
        "running",
        6,
        10,
        "update of step 6",
    )
    assert "Running after 6 of 10 steps when this page was written" in reported(directory)
    writer.on_step(10, {})
    writer.on_end("finished", "")
    assert read(directory).state == "finished"
    assert "Finished after 10 of 10 steps" in reported(directory)
    assert not list(directory.path.glob("*.partial"))


def test_a_failure_names_phase_and_message(directory: RunDirectory):
    writer = StatusWriter(directory)
    writer.on_start(1, 10)
    writer.on_end("failed", "update of step 1: RuntimeError: <no memory>")
    writer.fail("a second message changes nothing")
    page = reported(directory)
    assert 'class="status failed"' in page
    assert "Failed after 0 of 10 steps: update of step 1: RuntimeError: &lt;no memory&gt;" in page


def test_a_failure_before_the_loop_began(directory: RunDirectory):
    StatusWriter(directory).fail("RuntimeError: no GPU")
    assert "Failed after 0 steps: RuntimeError: no GPU" in reported(directory)


def test_an_interrupted_run_does_not_look_finished(directory: RunDirectory):
    writer = StatusWriter(directory)
    writer.on_start(1, 10)
    writer.on_step(1, {})
    writer.on_end("interrupted", "")
    assert "Interrupted after 1 of 10 steps" in reported(directory)


def test_a_killed_run_is_found_dead_at_the_next_look(directory: RunDirectory):
    """Start a process that writes "running" and is then killed."""
    code = f"""
import os
from pathlib import Path
from rlsys.run.directory import RunDirectory
from rlsys.run.observers.run_status import StatusWriter
writer = StatusWriter(RunDirectory(Path({str(directory.path)!r})))
writer.on_start(1, 10)
writer.on_phase(1, "update")
os._exit(9)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert json.loads(directory.status.read_text())["state"] == "running"
    status = read(directory)
    assert (status.state, status.is_over) == ("died", True)
    page = reported(directory)
    assert 'class="status died"' in page
    assert "Died after 0 of 10 steps, in update of step 1: its process is gone" in page


def test_a_process_that_got_the_number_of_a_dead_one_is_another(directory: RunDirectory):
    StatusWriter(directory)
    fields = json.loads(directory.status.read_text())
    directory.status.write_text(
        json.dumps(fields | {"process_began": fields["process_began"] - 60})
    )
    assert read(directory).state == "died"


def test_a_run_on_another_machine_may_still_run(directory: RunDirectory):
    StatusWriter(directory)
    fields = json.loads(directory.status.read_text())
    directory.status.write_text(json.dumps(fields | {"host": "elsewhere", "process": 1 << 30}))
    assert read(directory).state == "starting"


def test_a_file_that_is_none_of_ours_is_no_status(directory: RunDirectory):
    for text in ("", "[]", '{"state": "running"}'):
        directory.status.write_text(text)
        assert read_status(directory) is None
    assert "it is not known how this run ended" in reported(directory)


def test_the_report_can_be_made_again_from_the_command_line(
    directory: RunDirectory, capsys: pytest.CaptureFixture[str]
):
    StatusWriter(directory).fail("RuntimeError: no GPU")
    main([str(directory.path)])
    assert capsys.readouterr().out == f"{directory.report}\n"
    assert "RuntimeError: no GPU" in directory.report.read_text()
    for wrong in ([], [str(directory.path / "none")], ["a", "b"]):
        with pytest.raises(
            SystemExit, match=r"usage: python -m rlsys\.run\.observers\.html_report runs/NAME"
        ):
            main(wrong)


def test_a_resume_leaves_the_file_alone_until_the_loop_begins_or_the_start_fails(
    directory: RunDirectory,
):
    StatusWriter(directory).on_end("interrupted", "")
    before = directory.status.read_bytes()
    writer = StatusWriter(directory, held=True)
    assert directory.status.read_bytes() == before
    writer.fail("RuntimeError: no GPU")
    assert read(directory).state == "failed"
    StatusWriter(directory, held=True).on_start(6, 10)
    assert read(directory).state == "running"


def test_a_run_that_is_still_at_work_is_not_continued(directory: RunDirectory):
    refuse_running(directory)  # nothing was started
    writer = StatusWriter(directory)
    writer.on_start(1, 10)
    with pytest.raises(ValueError, match=rf"^run\.directory: .*at work, in process {os.getpid()}"):
        refuse_running(directory)
    died = json.loads(directory.status.read_text()) | {"process_began": 1.0}
    directory.status.write_text(json.dumps(died))  # its number belongs to a later process
    refuse_running(directory)
    writer.on_end("failed", "")
    refuse_running(directory)
