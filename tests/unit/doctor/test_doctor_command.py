"""The command: its lines, its JSON, its exit code, and what it says of clusters."""

import json
import subprocess
import sys
from typing import Any

import pytest

from rlsys.doctor import __main__ as command
from rlsys.doctor.findings import Finding, failure, ok, warning
from workers.cluster_doctor import Examination, connection_error, disagreements, join_failure

SOUND = [ok("cpu", "8 CPUs."), warning("hub", "It does not answer.", "Use a mirror.")]
FAULTY = [*SOUND, failure("disk", "It is full.", "Free space.")]


@pytest.fixture
def _no_facts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "gather", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def said(monkeypatch: pytest.MonkeyPatch, findings: list[Finding], *flags: str) -> int:
    monkeypatch.setattr(command, "machine_findings", lambda facts: findings)
    return command.main(flags)


@pytest.mark.usefixtures("_no_facts")
def test_a_failure_decides_the_exit_code_and_a_warning_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert said(monkeypatch, SOUND) == 0
    assert (
        "warning  hub                It does not answer. Use a mirror." in capsys.readouterr().out
    )
    assert said(monkeypatch, FAULTY) == 1


@pytest.mark.usefixtures("_no_facts")
def test_programs_read_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert said(monkeypatch, FAULTY, "--json") == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False
    assert answer["findings"]["this machine"][2] == {
        "check": "disk",
        "status": "failure",
        "text": "It is full.",
        "remedy": "Free space.",
    }
    assert answer["findings"]["cluster"][0]["status"] == "skipped"


@pytest.mark.usefixtures("_no_facts")
def test_the_findings_of_nodes_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    nodes = {"cluster": SOUND, "10.0.0.2": FAULTY}
    monkeypatch.setattr(command, "cluster_findings", lambda address: nodes)
    assert said(monkeypatch, SOUND, "--address", "auto") == 1
    assert "10.0.0.2:\n" in capsys.readouterr().out


@pytest.mark.usefixtures("_no_facts")
def test_a_local_ray_is_not_a_cluster(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert said(monkeypatch, SOUND) == 0
    assert "No cluster was named" in capsys.readouterr().out


def answering(monkeypatch: pytest.MonkeyPatch, stdout: str, stderr: str = "") -> None:
    """Replace the process that joins a cluster by one with this output."""

    def run(program: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert program == [sys.executable, "-m", "workers.cluster_doctor", "10.0.0.1:6379"]
        return subprocess.CompletedProcess(program, 1, stdout, stderr)

    monkeypatch.setattr(subprocess, "run", run)


def test_the_answer_of_a_cluster_is_its_last_line(monkeypatch: pytest.MonkeyPatch):
    line = json.dumps({"10.0.0.2": [{"check": "cpu", "status": "ok", "text": "8.", "remedy": ""}]})
    answering(monkeypatch, f"some other output\n{line}\n")
    assert command.cluster_findings("10.0.0.1:6379") == {"10.0.0.2": [ok("cpu", "8.")]}


def test_a_cluster_program_that_dies_is_a_failure(monkeypatch: pytest.MonkeyPatch):
    answering(monkeypatch, "", "Traceback ...\nRuntimeError: no GCS")
    (finding,) = command.cluster_findings("10.0.0.1:6379")["cluster"]
    assert finding.status == "failure"
    assert "RuntimeError: no GCS" in finding.text


def test_a_cluster_that_hangs_is_a_failure(monkeypatch: pytest.MonkeyPatch):
    def run(program: list[str], **options: Any) -> None:
        raise subprocess.TimeoutExpired(program, options["timeout"])

    monkeypatch.setattr(subprocess, "run", run)
    (finding,) = command.cluster_findings("10.0.0.1:6379")["cluster"]
    assert "120 s" in finding.text


def test_an_address_where_nothing_listens_is_refused_at_once():
    finding = connection_error("127.0.0.1:1")
    assert finding is not None
    assert "refused" in finding.text
    assert connection_error("auto") is None


def test_the_address_of_a_job_server_is_no_address_of_ray():
    finding = connection_error("http://127.0.0.1:8265")
    assert finding is not None
    assert "6379" in finding.remedy


def test_a_refused_token_has_its_own_remedy():
    cause = RuntimeError("RPC error: InvalidAuthToken: Authentication token is missing")
    connection = ConnectionError("Failed to connect to Ray cluster")
    connection.__cause__ = cause
    refused = join_failure("auto", connection)
    assert "RAY_AUTH_MODE=token" in refused.remedy
    other = join_failure("auto", ConnectionError("could not find any running Ray instance"))
    assert "ray start --head" in other.remedy


def test_nodes_that_differ_are_named():
    def node(ray: str, *bfloat16: str) -> Examination:
        return Examination(findings=(), versions={"ray": ray, "torch": "2.13"}, bfloat16=bfloat16)

    same = {"a": node("2.60.0", "amx_bf16"), "b": node("2.60.0", "amx_bf16")}
    assert disagreements(same) == []

    versions, precision = disagreements({"a": node("2.60.0", "amx_bf16"), "b": node("2.60.1")})
    assert versions.status == "failure"
    assert "ray differs: a 2.60.0; b 2.60.1" in versions.text
    assert precision.status == "warning"
    assert "generation.dtype" in precision.remedy
