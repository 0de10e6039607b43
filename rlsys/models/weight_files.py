"""The weights of a model directory in Hugging Face layout, in one or in several files.

model.safetensors                    or
model-00001-of-00003.safetensors ... and model.safetensors.index.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rlsys.models.tensor_files import TensorFacts, TensorFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FILE_BYTES = 5 * 10**9  # the limit of save_pretrained
FORMAT = {"format": "pt"}  # transformers reads it


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The weights of a directory; the headers are in memory, values are read when asked for."""

    directory: Path
    tensors: Mapping[str, TensorFacts]
    files: Mapping[str, TensorFile]  # by the name of the tensor

    @staticmethod
    def of(directory: Path) -> WeightFiles:
        """Read the headers of all files of weights in a directory.

        Raises:
            ValueError: there are none, one is missing or damaged, or the index is.
        """
        tensors: dict[str, TensorFacts] = {}
        files: dict[str, TensorFile] = {}
        for path in weight_paths(directory):
            file = TensorFile.open(path)
            tensors |= file.tensors
            files |= dict.fromkeys(file.tensors, file)
        return WeightFiles(directory=directory, tensors=tensors, files=files)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return [stop - start] elements of a tensor; see `TensorFile.read`."""
        return self.files[name].read(name, start, stop)

    def read_whole(self, name: str) -> Tensor:
        """Return a tensor in its shape."""
        return self.read(name).reshape(self.tensors[name].shape)


def weight_paths(directory: Path) -> list[Path]:
    """Return the files of weights that belong to a directory's model.

    Raises:
        ValueError: there are none, one is missing, or the index is damaged.
    """
    index = directory / INDEX
    if not index.is_file():
        if not (directory / SINGLE).is_file():
            raise ValueError(
                f"{directory}: it has neither {SINGLE} nor {INDEX}. Give a directory with weights "
                "in safetensors."
            )
        return [directory / SINGLE]

    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: it is not readable as JSON with a weight_map") from error
    for name in names:
        if Path(name).name != name or not (directory / name).is_file():
            raise ValueError(
                f"{directory}: {name} is missing, which {INDEX} names. Use another copy of the "
                "checkpoint, or the one before it."
            )
    return [directory / name for name in names]


def divided(tensors: Sequence[TensorFacts], limit: int) -> list[list[TensorFacts]]:
    """Return the tensors in their order, in files of at most `limit` bytes or of one tensor."""
    files: list[list[TensorFacts]] = []
    size = 0
    for facts in tensors:
        if not files or (size + facts.num_bytes > limit and size):
            files.append([])
            size = 0
        files[-1].append(facts)
        size += facts.num_bytes
    return files


def file_names(count: int) -> list[str]:
    """Return the names of `count` files of weights."""
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(directory: Path, files: Sequence[Sequence[TensorFacts]]) -> None:
    """Write the index of several files; a single one needs none."""
    if len(files) == 1:
        return
    names = file_names(len(files))
    places = {
        facts.name: name for name, tensors in zip(names, files, strict=True) for facts in tensors
    }
    size = sum(facts.num_bytes for tensors in files for facts in tensors)
    content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (directory / INDEX).write_text(json.dumps(content, indent=2) + "\n")
