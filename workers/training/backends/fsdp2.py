"""FSDP2: one model sharded over one or more ranks.

Master weights are float32; forward and backward run in the compute dtype. Join the process group
before you build the backend.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from rlsys.models.adapters import check_base, merged_weight
from rlsys.models.checkpoint_names import CheckpointNames, untied_state_dict
from rlsys.models.loading import UnsupportedModelError
from rlsys.models.saving import change_model_config, copy_model_files
from rlsys.models.sharded_state import Piece
from rlsys.models.tensor_files import TensorFacts
from workers.training.backends.backend import OptimizerSettings, RoleSettings, TrainedRole
from workers.training.expert_modules import experts_of_their_own
from workers.training.lora import (
    AdapterParts,
    Adapters,
    ExportedWeight,
    exported_weights,
    saved_adapters,
    write_adapters,
)
from workers.training.model_setup import DTYPES, decoder_blocks, recompute_in_backward
from workers.training.packed_model import PackedModel, PackTensors
from workers.training.sharded_checkpoint import (
    RankFiles,
    load_weights,
    optimizer_state,
    save_optimizer,
    save_weights,
)
from workers.training.sharded_loading import fill
from workers.training.weight_decay import parameter_groups

GATHERED_BYTES = 16 << 20  # of all ranks together, while a whole weight is gathered in blocks


def build(
    module: PackedModel, settings: RoleSettings, device: torch.device, directory: Path
) -> FSDP2Backend:
    """Shard `module` over all ranks, in place, and return its backend.

    Each decoder block is one FSDP unit; the rest (embeddings, final norm, LM head) is in the root.
    """
    trained = settings if isinstance(settings, TrainedRole) else None
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
    fill(module, module.own_rows)
    return FSDP2Backend(module, device, directory, trained.optimizer if trained else None)


def check_modules(module: PackedModel, ranks: int) -> None:
    """Refuse to train experts that are modules of their own on several ranks.

    FSDP2 reduces the gradients that a unit has on a rank. An expert that this rank did not run has
    none there, so that the ranks would add up the gradients of different experts.

    Raises:
        UnsupportedModelError: names the module.
    """
    for name, experts in experts_of_their_own(module.model):
        if ranks > 1 and any(parameter.requires_grad for parameter in experts.parameters()):
            raise UnsupportedModelError(
                f"ranks: {ranks} ranks of the backend 'fsdp2' must run the same modules, and "
                f"{name} of {type(module.model).__name__} has a module for each expert. Set it to "
                "1, or leave the experts untrained (frozen, or model.lora.target_modules)."
            )


class FSDP2Backend:
    """The `ModelBackend` of a model that FSDP2 has sharded."""

    def __init__(
        self,
        module: PackedModel,
        device: torch.device,
        directory: Path,
        optimizer: OptimizerSettings | None,
    ) -> None:
        """Take a sharded `module`, loaded from `directory`; without an `optimizer` it is frozen.

        Raises:
            UnsupportedModelError: see `check_modules`.
        """
        self.module = module
        self.device = device
        self._directory = directory
        self._ranks = dist.get_world_size()
        check_modules(module, self._ranks)
        self._rank = dist.get_rank()
        self._names: CheckpointNames | None = None  # planned at the first export

        # Those that are trained, by their names in the model, which is the packed model's only
        # submodule. A module whose forward pass was the last shows unsharded parameters without
        # gradients, so they are listed once.
        self._trained = {
            name.removeprefix("model."): parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self._max_norm = math.inf
        self._optimizer: torch.optim.Optimizer | None = None
        if optimizer is not None:
            self._max_norm = optimizer.max_grad_norm or math.inf
            self._optimizer = torch.optim.AdamW(
                parameter_groups(self._trained.items(), optimizer.weight_decay),
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
        norm = nn.utils.clip_grad_norm_(self._trained.values(), self._max_norm)
        value = float(_unsharded(norm))

        if math.isfinite(value):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()

        optimizer.zero_grad()
        return value

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `ModelBackend`."""
        model = self.module.model
        exported = exported_weights(untied_state_dict(model), self.module.adapters)
        if self._names is None:
            stored = {name: weight.stored for name, weight in exported.items()}
            self._names = CheckpointNames(model, stored)

        # One weight at a time, or those that transformers can only convert together.
        for group in self._names.groups:
            whole = {name: self._gathered(exported[name]) for name in group.names}
            here = {name: weight for name, weight in whole.items() if weight is not None}
            if self._rank == 0:
                yield from self._names.convert(group, here).items()
            del whole, here  # before the next is gathered

    def _gathered(self, weight: ExportedWeight) -> Tensor | None:
        """Return a whole weight on rank 0, merged with its adapter; collective."""
        stored, adapter = weight.stored, weight.adapter
        if adapter is not None:
            stored = _merged(stored, adapter)
        return gathered(stored, self._rank == 0)

    def save(self, files: RankFiles) -> None:
        """See `ModelBackend`."""
        if self._rank == 0:
            files.write(lambda: self._copy_model_files(files.path))

        model, adapters = self.module.model, self.module.adapters
        state = model.state_dict()
        if adapters is None:
            facts = _saved_weights(model)
            save_weights(model, facts, lambda name, wanted: gathered(state[name], wanted), files)
        else:
            self._save_adapters(adapters, state, files)
        save_optimizer(self._optimizer_pieces(), files)

    def _save_adapters(
        self, adapters: Adapters, state: Mapping[str, Tensor], files: RankFiles
    ) -> None:
        """Write the adapters, and the heads that are trained whole, on rank 0; collective."""
        weights: dict[str, Tensor] = {}
        for name, saved in adapters.saved_names(state).items():
            whole = gathered(state[name], self._rank == 0)
            if whole is not None:
                kept = files.attempt(partial(files.kept, f"weight/{saved}", whole))
                weights |= {} if kept is None else {saved: kept}
        if self._rank == 0:
            files.write(lambda: write_adapters(adapters, weights, self._directory, files.path))

    def _copy_model_files(self, path: Path) -> None:
        copy_model_files(self._directory, path)
        if fields := self.module.config_fields():
            change_model_config(path, fields)

    def load(self, path: Path) -> None:
        """See `ModelBackend`."""
        model, adapters = self.module.model, self.module.adapters
        state = model.state_dict()
        if adapters is None:
            for name, read in load_weights(model, _saved_weights(model), path):
                shard = DTensorShard.of(state[name])
                shard.copy(read(shard.start, shard.stop))
        else:
            if self._rank == 0:  # which reads all files of the base
                check_base(path, self._directory)
            for name, weight in saved_adapters(adapters, state, path).items():
                shard = DTensorShard.of(state[name])
                shard.copy(weight.reshape(-1)[shard.start : shard.stop])

        self._load_optimizer(path)

    def _optimizer_pieces(self) -> Iterator[Piece]:
        """Yield Adam's moments of this rank's shards, and from one rank the step counts."""
        for name, parameter in self._trained.items():
            for kind, value in self.optimizer.state[parameter].items():
                shard = DTensorShard.of(value)
                if shard.is_first_copy:
                    yield Piece(
                        name=f"{kind}/{name}",
                        shape=tuple(value.shape),
                        start=shard.start,
                        values=shard.local,
                    )

    def _load_optimizer(self, path: Path) -> None:
        facts_of_trained = [TensorFacts.of(name, one) for name, one in self._trained.items()]
        source = optimizer_state(path, facts_of_trained)
        kinds = sorted({name.partition("/")[0] for name in source.tensors})
        self.optimizer.state.clear()
        for name, parameter in self._trained.items():
            shard = DTensorShard.of(parameter)
            for kind in kinds:
                facts = source.tensors.get(f"{kind}/{name}")
                if facts is None:  # a parameter that never had a gradient
                    continue
                # Moments are sharded like their parameter; the step count is one number.
                start, stop = (shard.start, shard.stop) if facts.shape else (0, 1)
                value = source.read(facts.name, start, stop).to(shard.local.device)
                self.optimizer.state[parameter][kind] = (
                    _sharded_like(parameter, value) if facts.shape else value.reshape(())
                )


@dataclass(frozen=True, kw_only=True)
class DTensorShard:
    """This rank's part of a tensor: consecutive elements in row-major order."""

    local: Tensor
    start: int
    stop: int
    is_first_copy: bool  # of ranks that have the same part, this is the first

    @staticmethod
    def of(tensor: Tensor) -> DTensorShard:
        """Return the part of a tensor that is sharded along its first dimension, or replicated."""
        if not isinstance(tensor, DTensor):
            return DTensorShard(
                local=tensor, start=0, stop=tensor.numel(), is_first_copy=dist.get_rank() == 0
            )
        local = tensor.to_local()
        mesh, placements = tensor.device_mesh, tensor.placements
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
        assert tuple(shape[1:]) == tuple(tensor.shape[1:]), "sharded along the first dimension"

        row = math.prod(tensor.shape[1:])
        start = offset[0] * row if local.numel() else 0
        coordinate = mesh.get_coordinate()
        assert coordinate is not None, "every rank is in the mesh"
        replicas = zip(coordinate, placements, strict=True)
        return DTensorShard(
            local=local,
            start=start,
            stop=start + local.numel(),
            is_first_copy=all(not place for place, kind in replicas if kind.is_replicate()),
        )

    @torch.no_grad()
    def copy(self, flat: Tensor) -> None:
        """Copy [stop - start] elements, in row-major order, into the part."""
        self.local.copy_(flat.reshape(self.local.shape))


def _sharded_like(parameter: Tensor, flat: Tensor) -> Tensor:
    """Return a tensor whose shard on this rank has the values `flat`, sharded like a parameter."""
    if not isinstance(parameter, DTensor):
        return flat.reshape(parameter.shape)
    return DTensor.from_local(
        flat.reshape(parameter.to_local().shape),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _saved_weights(model: PreTrainedModel) -> list[TensorFacts]:
    """Return the weights of a checkpoint by the model's names; tied ones once."""
    return [TensorFacts.of(name, tensor) for name, tensor in untied_state_dict(model).items()]


@torch.no_grad()
def _merged(weight: Tensor, adapter: AdapterParts) -> Tensor:
    """Return W + scale * B A in float32, sharded like W; collective.

    W and B have the same number of rows, and so the same rows on a rank: it merges its own, with
    the whole of A.
    """
    local = DTensorShard.of(weight).local
    down = gathered(adapter.down, True)
    assert down is not None
    up = DTensorShard.of(adapter.up).local
    merged = merged_weight(local, down.to(local.device), up, adapter.scale)
    return _sharded_like(weight, merged)


def gathered(tensor: Tensor, wanted: bool) -> Tensor | None:
    """Return a whole tensor on the CPU of the ranks that want it, None on the others; collective.

    The rows come in blocks, so that a rank which does not want the tensor never holds all of it,
    and one which does holds it once.
    """
    if not isinstance(tensor, DTensor) or tensor.device_mesh.size() == 1:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return local.detach().cpu() if wanted else None

    assert tensor.placements == (Shard(0),), "FSDP2 shards parameters along their first dimension"
    ranks, group = tensor.device_mesh.size(), tensor.device_mesh.get_group()
    local = tensor.to_local().detach()
    # FSDP2 gives every rank ceil(rows / ranks) rows, and the last ranks what is left.
    rows = tensor.shape[0]
    rows_of_rank = -(-rows // ranks)
    row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    block = max(1, GATHERED_BYTES // max(1, row_bytes * ranks))

    whole = torch.empty(tensor.shape, dtype=tensor.dtype) if wanted else None
    for first in range(0, rows_of_rank, block):
        count = min(block, rows_of_rank - first)
        own = local[first : first + count]
        sent = local.new_zeros(count, *tensor.shape[1:])
        sent[: len(own)] = own
        received = [torch.empty_like(sent) for _ in range(ranks)]
        dist.all_gather(received, sent, group=group)
        for rank, part in enumerate(received if whole is not None else ()):
            assert whole is not None
            start = rank * rows_of_rank + first
            whole[start : start + count] = part[: max(0, rows - start)]
    return whole


def _unsharded(tensor: Any) -> Tensor:
    """Gather a sharded tensor; return any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
