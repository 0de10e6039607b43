"""The log of faults: counts for the metrics, and events for console, file and report."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from rlsys.driver.faults import FaultLog
from rlsys.run.directory import RunDirectory
from rlsys.run.fault_events import FAULT_KINDS, Fault, FaultFile, count_faults, read_faults
from rlsys.run.observers.console import Progress
from rlsys.run.observers.html_report import render_report
from rlsys.run.observers.metrics_log import read_metrics
from tests.support.in_process_runs import make_config, start


def test_events_are_counted_by_kind_and_none_is_zero():
    log = FaultLog({"reward_worker": 2})
    log.record("reward_worker", "the reward worker died", "killed", "it is restarted")
    log.record("generation_worker", "generation worker 1 died", "killed", "it is restarted")

    expected = dict.fromkeys(FAULT_KINDS, 0.0) | {"reward_worker": 3.0, "generation_worker": 1.0}
    assert log.metrics() == {f"faults/{kind}": count for kind, count in expected.items()}


def test_a_listener_gets_earlier_events_once():
    log = FaultLog()
    log.record("reward_worker", "the reward worker died", "killed", "it is restarted")
    seen: list[Fault] = []
    log.listen(seen.append)
    log.enter(3, "generate")
    log.record("generation_worker", "generation worker 1 died", "killed", "it is restarted")

    assert [fault.line() for fault in seen] == [
        "fault: the reward worker died (killed); it is restarted",
        "fault in generate of step 3: generation worker 1 died (killed); it is restarted",
    ]


async def test_a_run_writes_its_faults_to_metrics_file_console_and_report(tmp_path: Path):
    run = await start(tmp_path, make_config(steps=4))
    console = Console(record=True, width=200)
    run.session._observers = [
        *run.session._observers,
        FaultFile(run.directory),
        Progress(console, live=False),
    ]
    calls = 0

    async def die() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            run.session.faults.record(
                "reward_worker",
                "the reward worker died",
                "its process was killed",
                "it is restarted",
                evidence="<script>last words</script>",
            )

    run.stage.hooks = {"credit": die}
    await run.finish()

    train = [record for record in read_metrics(run.directory.metrics) if record.kind == "train"]
    assert [record.values["faults/reward_worker"] for record in train] == [0, 0, 1, 1]
    assert {record.values["faults/generation_worker"] for record in train} == {0}

    (fault,) = read_faults(run.directory.faults)
    assert (fault.step, fault.phase, fault.kind) == (3, "advantages", "reward_worker")
    assert count_faults(run.directory.faults) == {"reward_worker": 1}
    assert console.export_text().count("the reward worker died") == 1

    page = render_report(run.directory)
    assert "the reward worker died" in page
    assert "advantages of step 3" in page
    assert "Faults so far" in page
    assert "<script>last words" not in page


async def test_a_run_without_faults_has_no_file_and_no_section(tmp_path: Path):
    run = await start(tmp_path, make_config(steps=2))
    await run.finish()
    assert not run.directory.faults.exists()
    assert "Fault" not in render_report(run.directory)


def test_a_record_that_a_crash_cut_off_is_left_out(tmp_path: Path):
    directory = RunDirectory(tmp_path)
    fault = Fault(kind="reward_worker", event="it died", reason="killed", action="restarted")
    FaultFile(directory).on_fault(fault)
    with directory.faults.open("a") as file:
        file.write('{"kind": "rew')
    assert read_faults(directory.faults) == [fault]
