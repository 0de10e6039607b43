"""Safetensors files that are written and read piece by piece.

The safetensors library serializes a whole file in memory, and reads through a memory map whose
pages count as the process's own. Here a process holds only the tensor that it writes or reads:

    with TensorFileWriter(path, facts) as file:      # the header: names, dtypes and shapes
        file.write("model.norm.weight", tensor)      # in any order

    TensorFile.open(path).read("model.norm.weight", start=0, stop=100)

The format is that of https://github.com/huggingface/safetensors#format: the length of the header
(8 bytes, little-endian), the header (JSON), the bytes of all tensors. It holds no code.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

assert sys.byteorder == "little", "safetensors files are little-endian, and are read as they are"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

HEADER_BYTES = 100 << 20  # the limit of the safetensors library
METADATA = "__metadata__"


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    """A tensor without its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @staticmethod
    def of(name: str, tensor: Tensor) -> TensorFacts:
        """Return the facts of a tensor, which may be on the meta device."""
        return TensorFacts(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes in a file."""
        return self.numel * self.dtype.itemsize


class TensorFileWriter:
    """Writes one safetensors file; `close` it, or use it as a context manager."""

    def __init__(
        self, path: Path, tensors: Sequence[TensorFacts], metadata: Mapping[str, str]
    ) -> None:
        """Create the file with its header.

        Raises:
            OSError: the file cannot be written.
        """
        self._path = path
        # Wide types first: readers that view the bytes as numbers need them aligned.
        ordered = sorted(tensors, key=lambda facts: -facts.dtype.itemsize)
        header: dict[str, Any] = {METADATA: dict(metadata)}
        self._places: dict[str, tuple[int, TensorFacts]] = {}
        end = 0
        for facts in ordered:
            assert facts.name not in self._places, f"{facts.name} twice"
            self._places[facts.name] = (end, facts)
            header[facts.name] = {
                "dtype": DTYPE_NAMES[facts.dtype],
                "shape": list(facts.shape),
                "data_offsets": [end, end + facts.num_bytes],
            }
            end += facts.num_bytes

        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._missing = set(self._places)
        self._stream = path.open("wb")
        self._stream.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the values of one tensor."""
        offset, facts = self._places[name]
        assert tensor.numel() == facts.numel, f"{name}: {tuple(tensor.shape)}, not {facts.shape}"
        flat = tensor.detach().to("cpu", facts.dtype).contiguous().reshape(-1)
        self._stream.seek(self._start + offset)
        if facts.numel:
            self._stream.write(flat.view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self._stream.close()

    def close(self) -> None:
        """Close the file, in which every tensor has been written.

        Raises:
            OSError: the last bytes cannot be written.
        """
        self._stream.close()
        assert not self._missing, f"{self._path}: never written: {sorted(self._missing)[:3]}"


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """A safetensors file of which parts can be read."""

    path: Path
    tensors: Mapping[str, TensorFacts]
    offsets: Mapping[str, int]  # bytes, from the start of the file

    @staticmethod
    def open(path: Path) -> TensorFile:
        """Read the header of a file.

        Raises:
            ValueError: it is no safetensors file, or is truncated.
            OSError: it cannot be read.
        """
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(HEADER_BYTES, size - 8):
                raise _invalid(path, f"its header would have {length} bytes")
            text = stream.read(length)

        tensors, offsets = {}, {}
        try:
            header = dict(json.loads(text))
            header.pop(METADATA, None)
            for name, entry in header.items():
                shape = tuple(int(extent) for extent in entry["shape"])
                facts = TensorFacts(name=name, dtype=DTYPES[entry["dtype"]], shape=shape)
                begin, end = entry["data_offsets"]
                tensors[name] = facts
                offsets[name] = 8 + length + int(begin)
                if min(shape, default=0) < 0 or begin < 0 or end - begin != facts.num_bytes:
                    raise _invalid(path, f"its header is wrong about {name}")
                if 8 + length + end > size:
                    raise _invalid(path, f"its header has tensors beyond its end of {size} bytes")
        except (UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
            raise _invalid(path, "its header is not readable") from error
        except json.JSONDecodeError as error:
            raise _invalid(path, "its header is no JSON") from error
        return TensorFile(path=path, tensors=tensors, offsets=offsets)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return [stop - start] elements of a tensor in row-major order; None: up to its end.

        Raises:
            OSError: the file cannot be read, or is shorter than its header says.
        """
        facts = self.tensors[name]
        stop = facts.numel if stop is None else stop
        assert 0 <= start <= stop <= facts.numel, f"{name}: [{start}, {stop}) of {facts.numel}"
        values = torch.empty(stop - start, dtype=facts.dtype)
        if stop == start:
            return values

        space = values.view(torch.uint8).numpy().data
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(self.offsets[name] + start * facts.dtype.itemsize)
            while space:
                taken = stream.readinto(space)
                if not taken:
                    raise OSError(f"{self.path}: it ends in the middle of {name}")
                space = space[taken:]
        return values


def _invalid(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path}: no safetensors file, or a damaged one ({reason})")
