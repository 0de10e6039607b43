"""Conversion of flat token arrays to the [B, T] tensors of algorithm functions, and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from rlsys.data.sequences import TokenSequences


@dataclass(frozen=True)
class ResponsePadding:
    """The place in [B, T] of each flat position of a response's span.

    The span runs from the end of the prompt to the end of the sequence.
    """

    flat: NDArray[np.int64]  # [n] positions in the flat arrays
    rows: NDArray[np.int64]  # [n]
    columns: NDArray[np.int64]  # [n]
    shape: tuple[int, int]

    @staticmethod
    def of(sequences: TokenSequences) -> ResponsePadding:
        """Return the padding of all responses of a batch."""
        starts = sequences.offsets[:-1] + sequences.prompt_lengths
        lengths = sequences.offsets[1:] - starts
        rows = np.repeat(np.arange(len(lengths)), lengths)
        columns = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return ResponsePadding(
            np.repeat(starts, lengths) + columns,
            rows,
            columns,
            (len(lengths), max(1, int(lengths.max()))),
        )

    def pad(self, values: NDArray) -> Tensor:
        """Pad [N, ...] to [B, T, ...], with zeros (False) beyond each span."""
        padded = np.zeros((*self.shape, *values.shape[1:]), dtype=values.dtype)
        padded[self.rows, self.columns] = values[self.flat]
        return torch.from_numpy(padded)

    def unpad(
        self, padded: Tensor, num_tokens: int, dtype: DTypeLike = np.float32
    ) -> NDArray[np.float32]:
        """Flatten [B, T, ...] to [N, ...] of `dtype`, with zeros on the prompts."""
        flat = np.zeros((num_tokens, *padded.shape[2:]), dtype=dtype)
        flat[self.flat] = padded.numpy()[self.rows, self.columns]
        return flat
