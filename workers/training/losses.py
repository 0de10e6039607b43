"""What every loss of a pack takes and gives, and the pass that runs one.

    pack -> forward -> loss(result, columns, sizes) -> backward

Losses are sums over the pack's tokens divided by sizes of the whole mini-batch, so they add up over
packs and ranks: neither depends on how the tokens were packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from rlsys.data.packing import Pack
from workers.training.backends.backend import ModelBackend
from workers.training.packed_model import PackTensors

ResultT = TypeVar("ResultT")  # what the model gives of a pack: `PackResult` of a language model


@dataclass(frozen=True, kw_only=True)
class Denominators:
    """Sizes of the whole mini-batch over all ranks."""

    num_tokens: int
    num_sequences: int
    max_tokens: int


class PackColumns:
    """Between flat arrays of a batch [N], the m sampled tokens of a pack, and its b responses padded to T."""

    def __init__(self, pack: Pack, device: torch.device) -> None:
        self._flat_positions = pack.flat_positions
        self._device = device
        self._rows = torch.from_numpy(pack.response_index).to(device)
        self._columns = torch.from_numpy(pack.response_positions).to(device)
        width = int(pack.response_positions.max()) + 1 if len(pack.response_positions) else 1
        self._shape = (len(pack.rows), width)

    def take(self, array: NDArray[Any]) -> Tensor:
        """Return [m] the values of a flat array [N] of the batch at the pack's tokens."""
        return torch.from_numpy(array[self._flat_positions]).to(self._device)

    def pad(self, values: Tensor) -> Tensor:
        """Return [b, T] of [m] values, 0 elsewhere; differentiable."""
        return values.new_zeros(self._shape).index_put((self._rows, self._columns), values)

    def unpad(self, array: Tensor) -> Tensor:
        """Return [m] of [b, T] values."""
        return array[self._rows, self._columns]

    def mask(self) -> Tensor:
        """Return [b, T] where there is a token."""
        return self.pad(torch.ones(len(self._rows), device=self._device)).bool()


@dataclass(frozen=True, kw_only=True)
class PackLoss:
    """The loss to differentiate, and detached sums and maxima over the pack's tokens for the metrics."""

    loss: Tensor
    sums: dict[str, float]
    maxima: dict[str, float]


TokenLoss = Callable[[ResultT, PackColumns, Denominators], PackLoss]


def backward_passes(
    backend: ModelBackend[ResultT],
    packs: Iterable[Pack],
    loss: TokenLoss[ResultT],
    sizes: Denominators,
    *,
    temperature: float = 1.0,
) -> Iterator[tuple[Pack, ResultT, PackLoss]]:
    """Accumulate the gradient of `loss` over this rank's packs, and yield what each pack gave.

    A padding pack keeps the collectives of the ranks in step: it is run with a loss of 0 and not yielded.
    """
    for pack in packs:
        result = backend.forward(PackTensors.of(pack, backend.device, temperature))
        made = loss(result, PackColumns(pack, backend.device), sizes)
        if pack.is_padding:
            backend.backward(made.loss * 0.0)
            continue
        backend.backward(made.loss)
        yield pack, result, made
