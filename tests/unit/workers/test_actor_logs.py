"""What actors printed is found in Ray's files, and written under the names of the actors."""

from pathlib import Path

import pytest
import ray
from ray.exceptions import RayError

from workers import actor_logs
from workers.actor_logs import Output, keep_actor_logs, read_outputs, write_outputs

MARKERS = ":job_id:01000000\n:actor_name:PolicyWorker\n"


def session_file(folder: Path, process: int, stream: str, text: str) -> None:
    """Write a file as Ray names it."""
    (folder / f"worker-0912a3e1-ffffffff-{process}.{stream}").write_text(text)


def test_only_the_streams_of_the_job_are_read_without_the_lines_of_ray(tmp_path: Path):
    session_file(tmp_path, 11, "out", f"{MARKERS}one\n:task_name:update\ntwo\n")
    session_file(tmp_path, 11, "err", f"{MARKERS}a warning\n")
    session_file(tmp_path, 12, "out", ":job_id:02000000\n:actor_name:Other\nnot ours\n")
    session_file(tmp_path, 13, "out", "")
    (tmp_path / "raylet.out").write_text("not a worker")
    (tmp_path / "python-core-worker-0912a3e1_11.log").write_text("not its output")

    assert read_outputs(tmp_path, "01000000") == [
        Output(process=11, stream="err", actor_class="PolicyWorker", text=b"a warning\n"),
        Output(process=11, stream="out", actor_class="PolicyWorker", text=b"one\ntwo\n"),
    ]


def test_of_a_long_stream_the_end_is_kept_and_the_place_of_the_rest_is_named(tmp_path: Path):
    session_file(tmp_path, 11, "out", MARKERS + "x" * 1000 + "the end\n")
    (output,) = read_outputs(tmp_path, "01000000", limit=8)
    first, last = output.text.decode().splitlines()
    assert last == "the end"
    assert first.startswith(f"[the first {len(MARKERS) + 1000} bytes are in {tmp_path}")


def test_files_are_named_by_actor_and_silent_streams_have_none(tmp_path: Path):
    def output(process: int, text: bytes, stream: str = "out") -> Output:
        return Output(process=process, stream=stream, actor_class="PolicyWorker", text=text)

    outputs = {
        "node a": [output(11, b"rank 0\n"), output(11, b"\n", "err"), output(12, b"died\n")],
        "node b": [output(11, b"rank 1\n")],
    }
    names = {("node a", 11): "policy-0", ("node b", 11): "policy/1"}
    logs = tmp_path / "logs"
    write_outputs(logs, outputs, names)
    assert {file.name: file.read_text() for file in logs.iterdir()} == {
        "policy-0.out": "rank 0\n",
        "policy_1.out": "rank 1\n",
        "PolicyWorker-12.out": "died\n",
    }

    write_outputs(logs, {"node a": [output(11, b"resumed\n")]}, names)
    assert (logs / "policy-0.out").read_text() == "rank 0\nresumed\n"


def test_the_output_of_an_earlier_run_of_the_program_is_not_collected_again(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(actor_logs, "_COLLECTED", set())
    first = Output(process=11, stream="out", actor_class="A", text=b"first run\n")
    second = Output(process=12, stream="out", actor_class="A", text=b"second run\n")
    assert actor_logs.new_outputs({"node": [first]}) == {"node": [first]}
    assert actor_logs.new_outputs({"node": [first, second]}) == {"node": [second]}


def test_a_cluster_that_does_not_answer_changes_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(directory: Path) -> list[str]:
        raise RayError("no GCS")

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(actor_logs, "collect_actor_logs", fails)
    assert keep_actor_logs(tmp_path) == ["RayError: no GCS"]


def test_without_a_connection_no_ray_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started: list[object] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(actor_logs, "collect_actor_logs", started.append)
    assert keep_actor_logs(tmp_path) == []
    assert not started
