"""What a training backend does. No loss, role or loop knows which one it is.

forward -> backward  for every pack of a mini-batch, then  step
weights              for the engines
save, load           for checkpoints
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from workers.training.packed_model import PackTensors

ResultT_co = TypeVar("ResultT_co", covariant=True)  # `PackResult` of a language model


class ModelBackend(Protocol[ResultT_co]):
    """One model, distributed over all ranks of its group. Every method is collective: call it on all ranks."""

    device: torch.device
    module: Any  # the distributed `PackedModel`, for measurements that hook into it

    def forward(self, pack: PackTensors) -> ResultT_co:
        """Run the model on a pack; every rank runs equally many packs."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of the sum over ranks of `loss`; how ranks average is the backend's affair."""
        ...

    def step(self, learning_rate: float) -> float:
        """Clip the gradient, take one optimizer step, clear the gradient; return its norm before clipping.

        A gradient whose norm is not finite changes nothing: all ranks see the same norm and skip together.
        """
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield whole weights on the CPU of rank 0, under the names of the model's checkpoint.

        The other ranks get nothing, but must iterate as well.
        """
        ...

    def save(self, path: Path) -> None:
        """Write weights in Hugging Face layout, and each rank's optimizer state, into the directory `path`."""
        ...

    def load(self, path: Path) -> None:
        """Continue from what `save` wrote.

        Raises:
            ValueError: the checkpoint is of another model or of another number of ranks.
        """
        ...
