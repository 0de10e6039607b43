"""The signature that all losses of a pack share, and the pass that computes one.

    pack -> forward -> loss(result, columns, sizes) -> backward

A loss is a sum over the pack's tokens divided by a size of the whole mini-batch. So losses and
gradients add up over packs and ranks, and do not depend on how the tokens were packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from rlsys.data.hidden_states import JoinedStates
from rlsys.data.packing import Pack
from workers.training.backends.backend import ModelBackend
from workers.training.packed_model import PackTensors

ResultT = TypeVar("ResultT")  # the model's output for a pack: `PackResult` of a language model


@dataclass(frozen=True, kw_only=True)
class Denominators:
    """Sizes of the whole mini-batch over all ranks."""

    num_tokens: int
    num_sequences: int
    max_tokens: int


class PackColumns:
    """Conversions between three layouts of per-token values.

    [N]       flat, all tokens of the batch
    [m]       the sampled tokens of one pack
    [b, T]    the responses of that pack, padded to the longest
    """

    def __init__(self, pack: Pack, device: torch.device) -> None:
        self.pack_rows = pack.rows  # [b] of the batch
        self._flat_positions = pack.flat_positions
        self._device = device
        self._rows = torch.from_numpy(pack.response_index).to(device)
        self._columns = torch.from_numpy(pack.response_positions).to(device)
        # A pack of empty responses has no sampled token.
        width = int(pack.response_positions.max()) + 1 if len(pack.response_positions) else 1
        self._shape = (len(pack.rows), width)

    def take_rows(self, array: NDArray[Any]) -> Tensor:
        """Return [b] the values of an array [B] of the pack's responses."""
        return torch.from_numpy(array[self.pack_rows]).to(self._device)

    def positions(self) -> Tensor:
        """Return [m] where the pack's sampled tokens are in a flat array [N]."""
        return torch.from_numpy(self._flat_positions).to(self._device)

    def take(self, array: NDArray[Any]) -> Tensor:
        """Return [m] the values of a flat array [N] at the pack's sampled tokens."""
        return torch.from_numpy(array[self._flat_positions]).to(self._device)

    def pad(self, values: Tensor) -> Tensor:
        """Return [b, T] the values [m] at their places, and 0 elsewhere; differentiable."""
        return values.new_zeros(self._shape).index_put((self._rows, self._columns), values)

    def unpad(self, array: Tensor) -> Tensor:
        """Return [m] the values at the sampled tokens of an array [b, T]."""
        return array[self._rows, self._columns]

    def mask(self) -> Tensor:
        """Return [b, T] True at the sampled tokens."""
        return self.pad(torch.ones(len(self._rows), device=self._device)).bool()


@dataclass(frozen=True, kw_only=True)
class PackLoss:
    """The loss of one pack, and the numbers that its metrics are made of."""

    loss: Tensor  # to differentiate
    sums: dict[str, float]  # over the pack's tokens, detached
    maxima: dict[str, float]  # over the pack's tokens, detached

    def scaled(self, factor: float) -> PackLoss:
        """Return the loss and sums of `factor` times as many tokens of the same kind."""
        sums = {name: factor * value for name, value in self.sums.items()}
        return replace(self, loss=factor * self.loss, sums=sums)


TokenLoss = Callable[[ResultT, PackColumns, Denominators], PackLoss]


def backward_passes(
    backend: ModelBackend[ResultT],
    packs: Iterable[Pack],
    loss: TokenLoss[ResultT],
    sizes: Denominators,
    *,
    temperature: float = 1.0,
    ref_hidden: JoinedStates | None = None,
) -> Iterator[tuple[Pack, ResultT, PackLoss]]:
    """Accumulate the gradient of `loss` over this rank's packs.

    Yields:
        Each pack with the model's output and the loss; padding packs are not yielded.
    """
    for pack in packs:
        result = backend.forward(PackTensors.of(pack, backend.device, temperature, ref_hidden))
        pack_loss = loss(result, PackColumns(pack, backend.device), sizes)

        # A padding pack keeps the number of collective calls equal on all ranks. Its backward pass
        # must run, with a gradient of 0.
        if pack.is_padding:
            backend.backward(pack_loss.loss * 0.0)
            continue

        backend.backward(pack_loss.loss)
        yield pack, result, pack_loss
