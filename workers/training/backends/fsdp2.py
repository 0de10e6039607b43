"""FSDP2: one model sharded over one or more ranks.

Master weights are float32; forward and backward run in the compute dtype. Join the process group
before you build the backend.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rlsys.config import ModelRoleConfig, OptimizerConfig, TrainableRoleConfig
from rlsys.models.checkpoint_names import from_checkpoint, to_checkpoint
from rlsys.models.saving import change_model_config, copy_model_files
from workers.training.lora import Adapters, exported_state, save_adapters, saved_adapters
from workers.training.model_setup import DTYPES, decoder_blocks, recompute_in_backward
from workers.training.packed_model import PackedModel, PackTensors
from workers.training.weight_decay import parameter_groups


def build(
    module: PackedModel, settings: ModelRoleConfig, device: torch.device, directory: Path
) -> FSDP2Backend:
    """Shard `module` over all ranks, in place, and return its backend.

    Each decoder block is one FSDP unit; the rest (embeddings, final norm, LM head) is in the root.
    """
    trained = settings if isinstance(settings, TrainableRoleConfig) else None
    blocks = decoder_blocks(module.model)
    if trained and trained.gradient_checkpointing:
        for block in blocks:
            recompute_in_backward(block)

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # Gradients are summed over ranks in float32, whatever the compute dtype.
    precision = MixedPrecisionPolicy(
        param_dtype=DTYPES[settings.compute_dtype], reduce_dtype=torch.float32
    )
    offloads = trained is not None and trained.offload_optimizer and device.type == "cuda"
    offload = CPUOffloadPolicy() if offloads else OffloadPolicy()

    # Blocks first: the root then takes only the parameters that are left.
    for unit in (*blocks, module):
        fully_shard(unit, mesh=mesh, mp_policy=precision, offload_policy=offload)
    return FSDP2Backend(module, device, directory, trained.optimizer if trained else None)


class FSDP2Backend:
    """The `ModelBackend` of a model that FSDP2 has sharded."""

    def __init__(
        self,
        module: PackedModel,
        device: torch.device,
        directory: Path,
        optimizer: OptimizerConfig | None,
    ) -> None:
        """Take a sharded `module`, loaded from `directory`; without an `optimizer` it is frozen."""
        self.module = module
        self.device = device
        self._directory = directory
        self._ranks = dist.get_world_size()
        self._rank = dist.get_rank()

        # A module whose forward pass was the last shows unsharded parameters without gradients.
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._parameters = [parameter for _, parameter in named]
        self._max_norm = math.inf
        self._optimizer: torch.optim.Optimizer | None = None
        if optimizer is not None:
            self._max_norm = optimizer.max_grad_norm or math.inf
            self._optimizer = torch.optim.AdamW(
                parameter_groups(named, optimizer.weight_decay),
                lr=optimizer.learning_rate,
                betas=optimizer.betas,
                eps=optimizer.eps,
                fused=True,
            )

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of a trainable model."""
        assert self._optimizer is not None, "a frozen model takes no steps"
        return self._optimizer

    def forward(self, pack: PackTensors) -> Any:
        """See `ModelBackend`."""
        return self.module(pack)

    def backward(self, loss: Tensor) -> None:
        """See `ModelBackend`."""
        # FSDP averages gradients over ranks; the factor turns the mean into the sum.
        (loss * self._ranks).backward()

    def step(self, learning_rate: float) -> float:
        """See `ModelBackend`."""
        optimizer = self.optimizer
        norm = nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        value = float(_unsharded(norm))

        if math.isfinite(value):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()

        optimizer.zero_grad()
        return value

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `ModelBackend`."""
        # All weights are gathered before the first is yielded: names of the checkpoint are made
        # from the complete set, since transformers may hold several of its weights as one tensor.
        gathered = full_state_dict(self.module)
        if self._rank == 0:
            yield from to_checkpoint(self.module.model, gathered).items()

    def save(self, path: Path) -> None:
        """See `ModelBackend`."""
        if self._rank == 0:
            copy_model_files(self._directory, path)
            if fields := self.module.config_fields():
                change_model_config(path, fields)

        adapters = self.module.adapters
        if adapters is not None:
            target = path if self._rank == 0 else None
            save_adapters(self.module.model, adapters, self._directory, target, _unsharded)
        else:
            self._save_weights(path)
        torch.save(self._optimizer_shards(), path / f"optimizer_rank{self._rank}.pt")

    def _save_weights(self, path: Path) -> None:
        # safetensors needs contiguous tensors that share no memory; some are views of a larger one.
        weights = {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in self.weights()
        }
        if self._rank == 0:
            save_file(weights, path / "model.safetensors", {"format": "pt"})

    def load(self, path: Path) -> None:
        """See `ModelBackend`."""
        adapters = self.module.adapters
        if adapters is not None:
            load_adapters(self.module, adapters, path)
        else:
            saved = load_file(path / "model.safetensors")
            load_full_state_dict(self.module, from_checkpoint(self.module.model, saved))

        shards = torch.load(path / f"optimizer_rank{self._rank}.pt", weights_only=True)
        self._load_optimizer_shards(shards)

    def _optimizer_shards(self) -> list[dict[str, Tensor]]:
        """Return Adam's moments of this rank's shards, in parameter order."""
        return [
            {key: _local(value) for key, value in self.optimizer.state[parameter].items()}
            for parameter in self._parameters
        ]

    def _load_optimizer_shards(self, shards: Sequence[Mapping[str, Tensor]]) -> None:
        for parameter, state in zip(self._parameters, shards, strict=True):
            for key, value in state.items():
                # Moments are sharded like their parameter; the step count is one number.
                if key != "step" and isinstance(parameter, DTensor):
                    value = DTensor.from_local(
                        value.to(self.device),
                        parameter.device_mesh,
                        parameter.placements,
                        shape=parameter.shape,
                        stride=parameter.stride(),
                    )
                self.optimizer.state[parameter][key] = value


def _unsharded(tensor: Any) -> Tensor:
    """Gather a sharded tensor; return any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: Any) -> Tensor:
    """Return this rank's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_state_dict(packed: PackedModel) -> dict[str, Tensor]:
    """Return all weights, unsharded and on the CPU, by the model's names; collective.

    Tied tensors appear once, and adapters are merged into the weights of their layers.
    """
    tied = _tied_names(packed.model)
    return {
        name: tensor.detach().cpu()
        for name, tensor in exported_state(packed.model, packed.adapters, _unsharded)
        if name not in tied
    }


def _tied_names(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the LM head's weight if it is the embedding's, else nothing."""
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return frozenset()
    return frozenset(name + ".weight" for name, module in model.named_modules() if module is head)


def load_full_state_dict(packed: PackedModel, weights: dict[str, Tensor]) -> None:
    """Copy unsharded weights into the sharded parameters; collective.

    Every rank must pass the same weights.

    Raises:
        ValueError: a parameter is missing or has another shape.
    """
    tied = _tied_names(packed.model)
    for name, parameter in packed.model.state_dict().items():
        if name in tied:
            continue
        if name not in weights or weights[name].shape != parameter.shape:
            raise ValueError(
                f"checkpoint: it has no weight {name} of shape {tuple(parameter.shape)}, so it "
                "belongs to another model. Resume with the model that it was written with."
            )

        _copy_whole(parameter, weights[name])


def load_adapters(packed: PackedModel, adapters: Adapters, path: Path) -> None:
    """Copy saved adapters into the sharded parameters; collective.

    Raises:
        ValueError: the checkpoint has no adapters, or those of other layers or another rank.
    """
    state = packed.model.state_dict()
    for name, weight in saved_adapters(packed.model, adapters, path).items():
        if weight.shape != state[name].shape:
            raise ValueError(
                f"model.lora.rank: {name} in {path} has the shape {tuple(weight.shape)} instead of "
                f"{tuple(state[name].shape)}. Resume with the rank that it was written with."
            )
        _copy_whole(state[name], weight)


@torch.no_grad()
def _copy_whole(parameter: Tensor, weight: Tensor) -> None:
    """Copy an unsharded weight into a parameter, of which a rank may hold a shard."""
    if isinstance(parameter, DTensor):
        local = parameter.to_local()
        local.copy_(_own_shard(weight, local, parameter))
    else:
        parameter.copy_(weight)


def _own_shard(weight: Tensor, local: Tensor, parameter: DTensor) -> Tensor:
    """Return this rank's rows of a weight that is sharded along its first dimension."""
    mesh = parameter.device_mesh
    # FSDP2 gives every rank ceil(rows / ranks) rows, and the last ranks what is left.
    rows = -(-weight.shape[0] // mesh.size()) if weight.ndim else 1
    start = min(rows * mesh.get_local_rank(), weight.shape[0])
    return weight[start : start + local.shape[0]].to(local.dtype)
