"""What protects a Ray that a run starts: its token, and where it listens."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import psutil
import pytest

from workers import local_ray
from workers.local_ray import protect_token
from workers.training.process_group import open_rendezvous


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        # Set first, so that what the test sets is removed after it.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def permissions(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def test_a_new_token_is_for_its_owner_alone(home: Path):
    protect_token()
    token = home / ".ray" / "auth_token"
    first = token.read_text()
    assert permissions(token) == 0o600
    assert len(first) >= 32
    protect_token()
    assert token.read_text() == first


def test_of_processes_that_start_at_once_none_sees_an_unfinished_token(
    home: Path, monkeypatch: pytest.MonkeyPatch
):
    token = home / ".ray" / "auth_token"

    def generate() -> str:
        assert not token.exists(), "another process would read it"
        token.write_text("of the other process, which was faster")
        return "late"

    monkeypatch.setattr(local_ray, "generate_new_authentication_token", generate)
    protect_token()
    assert token.read_text() == "of the other process, which was faster"
    assert [file.name for file in token.parent.iterdir()] == ["auth_token"]


def test_a_token_that_everybody_can_read_is_closed(home: Path):
    token = home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("as Ray writes it")
    token.chmod(0o644)
    protect_token()
    assert permissions(token) == 0o600
    assert token.read_text() == "as Ray writes it"


def test_a_home_without_room_for_a_token(home: Path):
    (home / ".ray").write_text("a file")
    protect_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) >= 32


def test_other_sources_of_a_token_are_left_alone(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    protect_token()
    assert os.environ["RAY_AUTH_TOKEN"] == "given"
    assert not (home / ".ray").exists()


def test_ray_without_a_token_is_said_in_the_log(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    protect_token()
    assert "RAY_AUTH_MODE is not token" in caplog.text
    assert not (home / ".ray").exists()


def test_ranks_meet_on_one_address_only():
    """torch itself would listen on every address of the machine."""
    store = open_rendezvous("127.0.0.1", 1)
    connections = psutil.Process().net_connections("inet")
    listening = {one.laddr.ip for one in connections if one.laddr and one.laddr.port == store.port}
    assert listening - {"127.0.0.1"} == set()
    assert listening
    store.set("a", "1")
    assert store.get("a") == b"1"
