"""Hidden states of one model at the sampled tokens of a batch, on their way to another model.

From a hidden state and the model's LM head follow the logits of the whole vocabulary, at a small
part of their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class HiddenStates:
    """The states of one rank's rows; that of a token is the one that predicts it."""

    batch_id: int
    positions: NDArray[np.int64]  # [k] into the token_ids of the batch
    states: NDArray[Any]  # [k, d]; NumPy has no bfloat16, so these are the bits of `dtype`
    dtype: str  # "float32" or "bfloat16"

    @staticmethod
    def of(batch_id: int, positions: NDArray[np.int64], states: Tensor) -> HiddenStates:
        """Return the record of `states` [k, d]."""
        import torch

        bits = states.view(torch.int16) if states.dtype == torch.bfloat16 else states
        return HiddenStates(
            batch_id=batch_id,
            positions=positions,
            states=bits.cpu().numpy(),
            dtype=str(states.dtype).removeprefix("torch."),
        )


class JoinedStates:
    """The states of all ranks, looked up by the position of a token in the batch."""

    def __init__(self, ranks: Sequence[HiddenStates | None], num_tokens: int) -> None:
        """Join the parts of all ranks, which together hold each sampled token once.

        Args:
            ranks: None is the part of a rank without rows.
            num_tokens: N, the tokens of the batch.
        """
        import torch

        parts = [part for part in ranks if part is not None]
        positions = np.concatenate([part.positions for part in parts])
        bits = np.concatenate([part.states for part in parts])
        self._states = torch.from_numpy(bits).view(getattr(torch, parts[0].dtype))
        self._index = np.full(num_tokens, -1, dtype=np.int64)
        self._index[positions] = np.arange(len(positions))

    def take(self, positions: NDArray[np.int64]) -> Tensor:
        """Return [m, d] the states at `positions` [m], on the CPU."""
        import torch

        index = self._index[positions]
        assert (index >= 0).all(), "a sampled token has no hidden state"
        return self._states[torch.from_numpy(index)]
