"""The model catalogue and the weight manifest."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from rlsys.models import check_model_path, resolve_model
from rlsys.models.loading import context_length, load_causal_lm, load_tokenizer, parameter_count
from rlsys.models.weights import WeightEntry, buckets_of, pack_weights, unpack_weights


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
        manifest, buckets = pack_weights(tensors.items(), version=4, dtype=dtype, bucket_bytes=16)
        assert len(buckets) > 1
        arrays = [array for bucket in buckets for array in bucket]
        assert manifest.num_bytes == sum(array.nbytes for array in arrays)
        for array in arrays:
            array.flags.writeable = False  # as Ray hands them out
        received = dict(unpack_weights(manifest, buckets))
        assert all(
            torch.equal(received[name], tensor.to(dtype)) for name, tensor in tensors.items()
        )


def test_buckets_hold_as_many_tensors_as_fit_and_none_is_split():
    sizes = (3, 3, 9, 1, 5, 2)
    tensors = [(str(i), torch.arange(float(size))) for i, size in enumerate(sizes)]
    packed = buckets_of(tensors, dtype=torch.float32, bucket_bytes=4 * 7)
    found = [[int(entry.name) for entry in bucket.entries] for bucket in packed]
    assert found == [[0, 1], [2], [3, 4], [5]]


def test_a_tensor_that_needs_no_cast_is_not_copied():
    weight = torch.ones(4)
    (bucket,) = buckets_of([("a", weight)], dtype=torch.float32, bucket_bytes=100)
    weight[0] = 5
    assert bucket.arrays[0].view(np.float32).tolist() == [5, 1, 1, 1]


def test_damaged_or_missing_buckets_are_refused():
    manifest, buckets = pack_weights([("a", torch.arange(8.0))], version=1, dtype=torch.float32)
    with pytest.raises(ValueError, match="a lies outside the buckets"):
        list(unpack_weights(manifest, []))
    with pytest.raises(ValueError, match="a was damaged on the way"):
        list(unpack_weights(manifest, [[np.roll(buckets[0][0], 1)]]))


@pytest.mark.parametrize("length", [0, 5, 4096, 3 * 4096 + 7])
def test_every_changed_byte_and_exchanged_block_changes_the_checksum(length: int):
    generator = np.random.default_rng(0)
    values = torch.from_numpy(generator.integers(0, 256, length).astype(np.uint8))
    ((entry,), (data,)) = _only_bucket(values)
    for place in {0, length // 2, length - 1} & set(range(length)):
        other = values.clone()
        other[place] ^= 1
        assert _only_bucket(other)[0][0].checksum != entry.checksum
    if length > 2 * 4096:
        swapped = np.concatenate([data[4096:8192], data[:4096], data[8192:]])
        assert _only_bucket(torch.from_numpy(swapped))[0][0].checksum != entry.checksum


def _only_bucket(values: torch.Tensor) -> tuple[tuple[WeightEntry, ...], tuple[np.ndarray, ...]]:
    (bucket,) = buckets_of([("a", values)], dtype=torch.uint8, bucket_bytes=2**20)
    return bucket.entries, bucket.arrays
