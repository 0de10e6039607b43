"""Checkpoints are complete or absent, whenever the process dies; damaged ones are detected."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlsys.run.checkpoints import MANIFEST, TRAINER_STATE, CheckpointStore, find_damage


async def write_weights(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(bytes(range(256)) * 16)
    (directory / "config.json").write_text("{}")
    (directory / "shards").mkdir()
    (directory / "shards" / "optimizer_rank0.pt").write_bytes(b"123456789")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


async def test_what_was_saved_is_found(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.latest() is None
    path = await store.save(20, write_weights, {"step": 20, "prompts": {"taken": 5}})
    checkpoint = CheckpointStore(tmp_path / "checkpoints", keep=2).latest()
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.path, checkpoint.state) == (
        20,
        path,
        {"step": 20, "prompts": {"taken": 5}},
    )
    assert path.name == "step_000020"
    assert names(path) == ["config.json", MANIFEST, "model.safetensors", "shards", TRAINER_STATE]
    manifest = json.loads((path / MANIFEST).read_text())
    assert set(manifest) == {
        "config.json",
        "model.safetensors",
        "shards/optimizer_rank0.pt",
        TRAINER_STATE,
    }
    # The check value that every description of CRC-32 gives for these nine digits.
    assert manifest["shards/optimizer_rank0.pt"] == {"bytes": 9, "crc32": 0xCBF43926}


async def test_the_newest_are_kept_and_counted_by_number(tmp_path: Path) -> None:
    """Steps are sorted by number: a sort by name would put 1,000,000 before 999,999."""
    store = CheckpointStore(tmp_path, keep=2)
    for step in (999_990, 999_999, 1_000_000):
        await store.save(step, write_weights, {})
    assert names(tmp_path) == ["step_1000000", "step_999999"]
    checkpoint = store.latest()
    assert checkpoint is not None
    assert checkpoint.step == 1_000_000


async def test_other_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "step_best").mkdir()
    store = CheckpointStore(tmp_path, keep=1)
    for step in (1, 2):
        await store.save(step, write_weights, {})
    assert names(tmp_path) == ["step_000002", "step_best"]


def truncate(path: Path) -> None:
    os.truncate(path / "model.safetensors", 100)


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[2000] ^= 1
    (path / "model.safetensors").write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "model.safetensors has 100 bytes instead of 4096"),
    "a bit flipped": (flip_a_bit, "model.safetensors has another checksum"),
    "file missing": (
        lambda path: (path / "shards" / "optimizer_rank0.pt").unlink(),
        "shards/optimizer_rank0.pt is missing",
    ),
    "manifest missing": (
        lambda path: (path / MANIFEST).unlink(),
        "no manifest.json: it was never finished",
    ),
    "manifest cut off": (
        lambda path: os.truncate(path / MANIFEST, 30),
        "manifest.json is not readable",
    ),
    "manifest of another kind": (
        lambda path: (path / MANIFEST).write_text("[]"),
        "trainer_state.json is not part of it",
    ),
    "state changed": (
        lambda path: (path / TRAINER_STATE).write_text('{"step": 21}'),
        "trainer_state.json has ",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
async def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    for step in (10, 20):
        await store.save(step, write_weights, {"step": step})
    damage, reason = DAMAGES[kind]
    damage(tmp_path / "step_000020")
    with caplog.at_level(logging.WARNING):
        checkpoint = store.latest()
    assert checkpoint is not None
    assert checkpoint.step == 10
    (message,) = [record.getMessage() for record in caplog.records]
    assert str(tmp_path / "step_000020") in message
    assert reason in message


async def test_a_damaged_checkpoint_is_replaced_when_the_run_passes_it_again(
    tmp_path: Path,
) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (10, 20):
        await store.save(step, write_weights, {"attempt": 1})
    truncate(tmp_path / "step_000020")
    assert store.latest() is not None
    await store.save(20, write_weights, {"attempt": 2})
    checkpoint = store.latest()
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.state) == (20, {"attempt": 2})
    assert names(tmp_path) == ["step_000010", "step_000020"]


async def test_a_damaged_checkpoint_does_not_count_among_those_kept(tmp_path: Path) -> None:
    """A damaged checkpoint does not count: otherwise keep=2 might leave a single good one."""
    store = CheckpointStore(tmp_path, keep=2)
    for step in (10, 20):
        await store.save(step, write_weights, {})
    truncate(tmp_path / "step_000020")
    assert store.latest() is not None
    await store.save(15, write_weights, {})
    assert names(tmp_path) == ["step_000010", "step_000015"]


async def test_a_failing_write_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    await store.save(10, write_weights, {})

    async def fail(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        await store.save(20, fail, {})
    checkpoint = store.latest()
    assert checkpoint is not None
    assert checkpoint.step == 10
    await store.save(30, write_weights, {})
    assert names(tmp_path) == ["step_000030"]  # the half-written one is cleared away


# Saves step 20 after step 10 with keep=1, and kills itself at its n-th file operation.
KILLED_SAVE = """
import asyncio, os, signal, sys
from pathlib import Path
from rlsys.run.checkpoints import CheckpointStore

directory, fatal, operations = Path(sys.argv[1]), int(sys.argv[2]), 0

async def write(path):
    for name in ("model.safetensors", "optimizer_rank0.pt"):
        with (path / name).open("wb") as file:
            file.write(b"first half ")
            file.flush()
            os.truncate(file.fileno(), 11)  # an operation that is counted between the halves
            file.write(b"second half")

def count(event, arguments):
    global operations
    if armed and (event == "open" or event.startswith(("os.", "shutil."))):
        operations += 1
        if operations == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

armed = False
sys.addaudithook(count)
store = CheckpointStore(directory, keep=1)
asyncio.run(store.save(10, write, {"step": 10}))
armed = True
asyncio.run(store.save(20, write, {"step": 20}))
armed = False
print(operations)
"""


def save_and_die(directory: Path, fatal: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", KILLED_SAVE, str(directory), str(fatal)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
async def test_a_full_disk_is_called_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of torch.save does not say that the disk is full."""

    async def fail(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"some")
        raise RuntimeError("unexpected pos 410658944 vs 410658836")

    store = CheckpointStore(tmp_path, keep=2)
    await store.save(1, write_weights, {})
    with pytest.raises(RuntimeError, match="unexpected pos"):
        await store.save(2, fail, {})
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(
        OSError,
        match=r"trainer\.checkpoints: the disk of .* is full \(1 MiB were free\), so step_000002 "
        r"was not written\. Free",
    ):
        await store.save(2, fail, {})
    assert names(tmp_path) == ["step_000001"]


@pytest.mark.slow
async def test_sigkill_at_any_operation_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    """Kill a save at each of its file operations in turn; keep=1 leaves one fallback only."""
    total = int(save_and_die(tmp_path / "whole", 0).stdout)
    assert total > 15
    survivors = []
    for fatal in range(1, total + 1):
        directory = tmp_path / str(fatal)
        assert save_and_die(directory, fatal).returncode == -signal.SIGKILL
        store = CheckpointStore(directory, keep=1)
        checkpoint = store.latest()
        assert checkpoint is not None, (
            f"nothing left after a kill at operation {fatal}: {names(directory)}"
        )
        assert checkpoint.state == {"step": checkpoint.step}
        assert {find_damage(path) for path in directory.glob("step_??????")} == {None}, (
            "a half-made or half-deleted one is in the list"
        )
        survivors.append(checkpoint.step)
        await store.save(30, write_weights, {})
        assert names(directory) == ["step_000030"]
    assert survivors == sorted(survivors)
    assert set(survivors) == {10, 20}
