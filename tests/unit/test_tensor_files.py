"""Files in the format of safetensors, written and read piece by piece."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlsys.models import weight_files
from rlsys.models.tensor_files import DTYPES, TensorFacts, TensorFile, TensorFileWriter
from rlsys.models.weight_files import WeightFiles, divided, file_names, weight_paths


def tensors() -> dict[str, Tensor]:
    """Return tensors of several types and shapes, one of them not contiguous."""
    generator = torch.Generator().manual_seed(0)
    return {
        "flag": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "half": torch.randn(3, 7, generator=generator).bfloat16(),
        "matrix": torch.randn(6, 4, generator=generator).t(),
        "number": torch.tensor(2.5),
        "nothing": torch.zeros(0, 3),
        "positions": torch.arange(11),
    }


def write(path: Path, values: dict[str, Tensor]) -> None:
    facts = [TensorFacts.of(name, tensor) for name, tensor in values.items()]
    with TensorFileWriter(path, facts, {"format": "pt"}) as file:
        for name in reversed(list(values)):  # any order
            file.write(name, values[name])


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path):
    write(tmp_path / "file", tensors())
    found = load_file(tmp_path / "file")
    assert set(found) == set(tensors())
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    with safe_open(tmp_path / "file", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_ranges_of_what_the_library_writes_are_read(tmp_path: Path):
    values = {name: tensor.contiguous() for name, tensor in tensors().items()}
    save_file(values, tmp_path / "file", {"format": "pt"})
    file = TensorFile.open(tmp_path / "file")
    assert set(file.tensors) == set(values)
    for name, tensor in values.items():
        assert file.tensors[name] == TensorFacts.of(name, tensor)
        for start in range(tensor.numel() + 1):
            for stop in range(start, tensor.numel() + 1):
                assert torch.equal(file.read(name, start, stop), tensor.reshape(-1)[start:stop])


@pytest.mark.parametrize("dtype", [one for one in DTYPES.values() if one.is_floating_point])
def test_every_floating_type_survives(dtype: torch.dtype, tmp_path: Path):
    values = torch.tensor([0.5, -1.5, 2.0]).to(dtype)
    write(tmp_path / "file", {"x": values})
    assert torch.equal(load_file(tmp_path / "file")["x"].float(), values.float())
    assert torch.equal(TensorFile.open(tmp_path / "file").read("x").float(), values.float())


def test_a_tensor_that_was_not_written_is_a_bug(tmp_path: Path):
    facts = [TensorFacts.of("x", torch.zeros(2))]
    with pytest.raises(AssertionError, match="never written"):
        TensorFileWriter(tmp_path / "file", facts, {}).__exit__(None, None, None)


def header(data: bytes, change: Callable[[dict], None]) -> bytes:
    """Return a file with another header."""
    length = int.from_bytes(data[:8], "little")
    content = json.loads(data[8 : 8 + length])
    change(content)
    text = json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def move(content: dict, begin: int, end: int) -> None:
    content["x"]["data_offsets"] = [begin, end]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "its header would have 0 bytes"),
    "a pickle": (lambda data: b"\x80\x04\x95" + data, "its header would have"),
    "no JSON": (lambda data: data[:8] + b"x" + data[9:], "its header is no JSON"),
    "truncated": (lambda data: data[:-1], "tensors beyond its end"),
    "another shape": (
        lambda data: header(data, lambda content: content["x"].update(shape=[5])),
        "is wrong about x",
    ),
    "a negative place": (
        lambda data: header(data, lambda content: move(content, -16, 0)),
        "is wrong about x",
    ),
    "an unknown type": (
        lambda data: header(data, lambda content: content["x"].update(dtype="Q4")),
        "its header is not readable",
    ),
    "a list": (lambda data: (8).to_bytes(8, "little") + b"[1, 2]  ", "header is not readable"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path):
    path = tmp_path / "file"
    write(path, {"x": torch.zeros(4)})
    change, message = DAMAGES[damage]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"file: no safetensors file, .*{message}"):
        TensorFile.open(path)


def test_a_model_in_several_files(tmp_path: Path):
    values = {f"layer.{number}": torch.full((10,), float(number)) for number in range(5)}
    facts = [TensorFacts.of(name, tensor) for name, tensor in values.items()]
    files = divided(facts, 80)  # bytes; each tensor has 40
    assert [[one.name for one in file] for file in files] == [
        ["layer.0", "layer.1"],
        ["layer.2", "layer.3"],
        ["layer.4"],
    ]
    assert [len(file) for file in divided(facts, 1)] == [1] * 5
    names = file_names(3)
    assert names[1] == "model-00002-of-00003.safetensors"
    for name, file in zip(names, files, strict=True):
        write(tmp_path / name, {one.name: values[one.name] for one in file})
    weight_files.write_index(tmp_path, files)

    assert [path.name for path in weight_paths(tmp_path)] == names
    found = WeightFiles.of(tmp_path)
    assert set(found.tensors) == set(values)
    assert torch.equal(found.read_whole("layer.3"), values["layer.3"])
    index = json.loads((tmp_path / weight_files.INDEX).read_text())
    assert index["metadata"] == {"total_size": 200}

    (tmp_path / names[1]).unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors is missing"):
        WeightFiles.of(tmp_path)
    (tmp_path / weight_files.INDEX).write_text('{"weight_map": {"x": "../secret"}}')
    with pytest.raises(ValueError, match=r"\.\./secret is missing"):
        WeightFiles.of(tmp_path)
    (tmp_path / weight_files.INDEX).write_text("[]")
    with pytest.raises(ValueError, match="not readable as JSON with a weight_map"):
        WeightFiles.of(tmp_path)
    with pytest.raises(ValueError, match="it has neither"):
        WeightFiles.of(tmp_path / "elsewhere")
