"""The model catalogue and the weight manifest."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from rlsys.models import check_model_path, resolve_model
from rlsys.models.loading import context_length, load_causal_lm, load_tokenizer, parameter_count
from rlsys.models.weights import pack_weights, unpack_weights


def test_tiny_is_the_same_model_every_time(tmp_path: Path):
    one, two = (
        resolve_model("tiny", cache=tmp_path / "a"),
        resolve_model("tiny", cache=tmp_path / "b"),
    )
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert (one / "tokenizer.json").read_bytes() == (two / "tokenizer.json").read_bytes()
    assert context_length(one) == 2048
    model = load_causal_lm(one, dtype=torch.float32, attention="sdpa")
    assert parameter_count(one) == sum(p.numel() for p in model.parameters())
    assert model.config.vocab_size == len(load_tokenizer(one))


def test_a_damaged_cache_is_recognised_and_built_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    directory = resolve_model("tiny", cache=tmp_path)
    weights = directory / "model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))  # same size, one bit
    assert resolve_model("tiny", cache=tmp_path) == directory
    assert weights.read_bytes() == original
    assert "is damaged (model.safetensors differs" in caplog.text
    weights.unlink()
    resolve_model("tiny", cache=tmp_path)
    assert weights.read_bytes() == original


def test_a_local_directory_is_used_as_it_is(tmp_path: Path):
    shutil.copytree(resolve_model("tiny"), tmp_path / "mine")
    assert resolve_model(str(tmp_path / "mine")) == tmp_path / "mine"


def test_unusable_paths_get_one_clear_message(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    shutil.copytree(resolve_model("tiny"), tmp_path / "mute")
    for file in (tmp_path / "mute").glob("tokenizer*"):
        file.unlink()
    for path, message in [
        (str(tmp_path / "empty"), "has no config.json"),
        (str(tmp_path / "mute"), "has no tokenizer"),
        (str(tmp_path / "none.gguf"), "no such file"),
        ("smolm2-135m", "Did you mean smollm2-135m?"),
        ("/no/such/dir", "nor an existing directory"),
    ]:
        with pytest.raises(ValueError, match=r"^model\.path: ") as error:
            check_model_path(path)
        assert message in str(error.value)
    check_model_path("owner/name")


def test_weights_survive_the_journey_in_either_precision():
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a.weight": torch.randn(3, 5, generator=generator),
        "b": torch.randn(7, generator=generator),
        "c": torch.randn(1, 1),
    }
    for dtype in (torch.float32, torch.bfloat16):
        manifest, shards = pack_weights(tensors.items(), version=4, dtype=dtype, shard_bytes=16)
        assert len(shards) > 1
        assert manifest.num_bytes == sum(shard.nbytes for shard in shards)
        for shard in shards:
            shard.flags.writeable = False  # as Ray hands them out
        received = dict(unpack_weights(manifest, shards))
        assert all(
            torch.equal(received[name], tensor.to(dtype)) for name, tensor in tensors.items()
        )


def test_damaged_or_missing_shards_are_refused():
    manifest, shards = pack_weights([("a", torch.arange(8.0))], version=1, dtype=torch.float32)
    with pytest.raises(ValueError, match="a lies outside the shards"):
        list(unpack_weights(manifest, []))
    shards[0] = np.roll(shards[0], 1)
    with pytest.raises(ValueError, match="a was damaged on the way"):
        list(unpack_weights(manifest, shards))
