"""The interface of a training backend. No loss, role or loop knows which one it is.

forward, backward    for every pack of a mini-batch
step                 after the last pack
weights              for the engines
save, load           for checkpoints
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from workers.training.packed_model import PackTensors
from workers.training.sharded_checkpoint import RankFiles

ResultT_co = TypeVar("ResultT_co", covariant=True)  # `PackResult` of a language model


class OptimizerSettings(Protocol):
    """What a backend reads of an `OptimizerConfig`."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def eps(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def max_grad_norm(self) -> float: ...


class RoleSettings(Protocol):
    """What a backend reads of a `ModelRoleConfig`; so it needs neither pydantic nor Ray."""

    @property
    def compute_dtype(self) -> str: ...


@runtime_checkable
class TrainedRole(RoleSettings, Protocol):
    """What a backend reads of a `TrainableRoleConfig`, which alone has these fields."""

    @property
    def optimizer(self) -> OptimizerSettings: ...
    @property
    def gradient_checkpointing(self) -> bool: ...
    @property
    def offload_optimizer(self) -> bool: ...


class ModelBackend(Protocol[ResultT_co]):
    """One model, distributed over all ranks of its group.

    Every method is collective: call it on all ranks.
    """

    device: torch.device
    module: Any  # the distributed `PackedModel`, for measurements that hook into it

    def forward(self, pack: PackTensors) -> ResultT_co:
        """Run the model on a pack; every rank must run the same number of packs."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of the sum of `loss` over the ranks.

        A backend that averages gradients over ranks makes up for it here.
        """
        ...

    def step(self, learning_rate: float) -> float:
        """Clip the gradient, take one optimizer step and clear the gradient.

        Returns:
            The norm of the gradient before clipping. If it is not finite, the optimizer step is
            skipped; all ranks see the same norm, so they skip together.
        """
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield unsharded weights on the CPU of rank 0, by their names in the model's checkpoint.

        The other ranks get nothing, but must iterate as well.
        """
        ...

    def save(self, files: RankFiles) -> None:
        """Write weights in Hugging Face layout, and the optimizer's state in shards.

        See `workers.training.sharded_checkpoint`. Of a model with adapters the weights are those
        in PEFT's layout. `files.finish` raises what could not be written.
        """
        ...

    def load(self, path: Path) -> None:
        """Continue from what `save` of any number of ranks wrote.

        Raises:
            ValueError: the checkpoint is of another model, or its files are damaged.
        """
        ...
