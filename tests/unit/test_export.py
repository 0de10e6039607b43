"""`python -m rlsys.export`: the model of a run, a checkpoint or a directory, on its own."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsys.config.command_line import CONFIG_FILE
from rlsys.export import export, main
from rlsys.models import resolve_model
from rlsys.models.saving import change_model_config
from rlsys.models.weight_files import INDEX, WeightFiles
from rlsys.run.checkpoints import CheckpointStore
from tests.support.saved_weights import saved_weights


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Write a run whose checkpoint is the tiny model with a critic and optimizer files."""
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=2)

    async def write(path: Path) -> None:
        shutil.copytree(resolve_model("tiny"), path, dirs_exist_ok=True)
        shutil.copytree(resolve_model("tiny"), path / "critic")
        for directory in (path, path / "critic"):
            (directory / "optimizer-00001-of-00001.shard").write_bytes(b"moments")
            (directory / "optimizer_shards.json").write_text("{}")
        (path / "policy_state.json").write_text("{}")
        (path / "critic" / "critic_state.json").write_text("{}")

    asyncio.run(store.save(3, write, {"step": 3}))
    (tmp_path / "run" / CONFIG_FILE).write_text("{}\n")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "place", [".", "checkpoints/step_000003", "checkpoints/step_000003/critic"]
)
def test_a_run_a_checkpoint_and_a_critic_become_models(place: str, run: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert main([str(run / place), str(out)]) == 0
    expected = load_file(resolve_model("tiny") / "model.safetensors")
    found = saved_weights(out)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32
    assert AutoTokenizer.from_pretrained(out).chat_template
    names = {file.name for file in out.rglob("*")}
    assert not any("state" in name or "shard" in name or "manifest" in name for name in names)
    assert not (out / "critic").exists()


def test_several_files_in_another_type_load_the_same(tmp_path: Path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(resolve_model("tiny"), source)
    change_model_config(source, {"torch_dtype": "float32"})  # as older configs name it
    export(source, out, dtype=torch.bfloat16, file_bytes=20_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 25_000 or len(load_file(file)) == 1 for file in files)
    assert set(json.loads((out / INDEX).read_text())["weight_map"].values()) == {
        file.name for file in files
    }
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name

    # And back, from several files.
    export(out, tmp_path / "again", dtype=torch.float32)
    assert [file.name for file in (tmp_path / "again").glob("*.safetensors")] == [
        "model.safetensors"
    ]
    again = WeightFiles.of(tmp_path / "again")
    assert all(
        torch.equal(again.read_whole(name), one.float()) for name, one in saved_weights(out).items()
    )


def test_what_cannot_be_exported_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def message(*arguments: Path) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    out = tmp_path / "out"
    assert "is no run, checkpoint or model directory" in message(tmp_path, out)
    assert "exists already" in message(run, tmp_path)

    checkpoint = run / "checkpoints" / "step_000003"
    (checkpoint / "optimizer-00001-of-00001.shard").write_bytes(b"other")
    assert "is damaged (optimizer-00001-of-00001.shard" in message(checkpoint, out)
    assert "has no complete checkpoint" in message(run, out)

    weights = checkpoint / "critic" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "no safetensors file, or a damaged one" in message(checkpoint / "critic", out)
    assert not out.exists()
    assert not out.with_name("out.partial").exists()
