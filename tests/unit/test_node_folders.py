"""Model directories on other nodes: recognized by their contents, or written and checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from rlsys.models import folder_files
from rlsys.models.folder_files import FileFacts, FolderFacts, checked_writer, chunks_of
from rlsys.models.saving import model_files
from workers import node_folders
from workers.node_folders import OnSomeNode


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Write the files of a checkpoint, of which a model is a part."""
    directory = tmp_path / "driver" / "step_000004"
    (directory / "critic").mkdir(parents=True)
    (directory / "code").mkdir()
    for name in (
        *("config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin"),
        *("optimizer_rank0.pt", "policy_state.json", "manifest.json", ".hidden"),
        *("critic/model.safetensors", "critic/critic_state.json", "code/model.py"),
        "model.safetensors.index.json",
    ):
        (directory / name).write_text(json.dumps({"of": name}))
    return directory


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let this process have the model cache of another node."""
    monkeypatch.setenv("RLSYS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def facts_of(model: Path) -> FolderFacts:
    return FolderFacts.of(model, model_files(model))


def test_a_model_is_sent_without_optimizer_critic_and_a_second_format(model: Path):
    assert [file.name for file in facts_of(model).files] == [
        *("code/model.py", "config.json", "model.safetensors", "model.safetensors.index.json"),
        "tokenizer.json",
    ]
    (model / "model.safetensors").unlink()
    names = [file.name for file in facts_of(model).files]
    assert "pytorch_model.bin" in names
    assert "optimizer_rank0.pt" not in names


def test_a_node_finds_the_same_files_under_the_path_or_in_its_cache(model: Path, cache: Path):
    facts = facts_of(model)
    assert node_folders._find(str(model), facts) == str(model)

    shutil.copytree(model, cache / model.name)
    (model / "config.json").write_text("another model")
    assert node_folders._find(str(model), facts) == str(cache / model.name)

    # Of the same size, so that only the hash tells.
    (cache / model.name / "tokenizer.json").write_text(json.dumps({"of": "tokenizer.jsoN"}))
    assert node_folders._find(str(model), facts) is None


def test_files_are_written_once_and_found_by_the_next_run(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(folder_files, "CHUNK_BYTES", 7)
    monkeypatch.setattr(node_folders.ray, "get", lambda chunk: chunk)
    facts = facts_of(model)
    chunks = [list(chunks_of(model / file.name)) for file in facts.files]
    assert len(chunks[0]) > 1

    place = node_folders._receive(model.name, facts, chunks, True)
    assert Path(place).parent == cache / "received"
    assert facts.are_in(Path(place))
    (model / "config.json").unlink()
    assert node_folders._find(str(model), facts) == place
    assert [path.name for path in (cache / "received").iterdir()] == [Path(place).name]

    # A copy that was damaged since is replaced.
    (Path(place) / "config.json").write_text("")
    assert node_folders._find(str(model), facts) is None
    assert node_folders._receive(model.name, facts, chunks, True) == place
    assert facts.are_in(Path(place))


def test_damage_on_the_way_is_noticed_and_leaves_nothing(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(node_folders.ray, "get", lambda chunk: chunk ^ 1)
    facts = facts_of(model)
    chunks = [list(chunks_of(model / file.name)) for file in facts.files]
    with pytest.raises(ValueError, match=r"code/model\.py was damaged on the way"):
        node_folders._receive(model.name, facts, chunks, True)
    assert list((cache / "received").iterdir()) == []


def test_an_empty_file_has_no_chunks(tmp_path: Path):
    (tmp_path / "empty").touch()
    assert list(chunks_of(tmp_path / "empty")) == []
    (facts,) = FolderFacts.of(tmp_path, [tmp_path / "empty"]).files
    with checked_writer(tmp_path / "copy", facts):
        pass
    assert (tmp_path / "copy").read_bytes() == b""

    wrong = FileFacts(name="copy", num_bytes=1, sha256=facts.sha256)
    with (
        pytest.raises(ValueError, match="copy was damaged"),
        checked_writer(tmp_path / "copy", wrong) as append,
    ):
        append(np.frombuffer(b"x", dtype=np.uint8))


def test_only_folders_that_were_made_for_it_are_forgotten(tmp_path: Path):
    actor = OnSomeNode()
    actor.forget(str(tmp_path))
    assert tmp_path.exists()

    outbox = Path(actor.open_outbox())
    (outbox / "critic").mkdir()
    (outbox / "critic" / "part.pt").write_bytes(b"abc")
    assert [file.name for file in actor.outbox_contents().files] == ["critic/part.pt"]
    assert b"".join(chunk.tobytes() for chunk in actor.outbox_chunks("critic/part.pt")) == b"abc"
    actor.close_outbox()
    assert not outbox.exists()
