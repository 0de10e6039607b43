"""DeepSpeed: one model with ZeRO over one or more ranks.

ZeRO 1 shards the optimizer state, ZeRO 2 the gradients as well, ZeRO 3 the weights as well. Master
weights are float32; forward and backward run in the compute dtype. Join the process group before
you build the backend.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlsys.config import ModelRoleConfig, OptimizerConfig, TrainableRoleConfig
from rlsys.models.checkpoint_names import CheckpointNames, from_checkpoint, tied_names
from rlsys.models.loading import UnsupportedModelError
from rlsys.models.saving import change_model_config, copy_model_files
from rlsys.models.weight_files import weight_paths
from workers.training.expert_modules import experts_of_their_own
from workers.training.model_setup import decoder_blocks, recompute_in_backward
from workers.training.packed_model import PackedModel, PackTensors
from workers.training.sharded_checkpoint import RankFiles
from workers.training.weight_decay import parameter_groups

# Gradients per collective. DeepSpeed holds buffers of this size; its own default is ten times it.
BUCKET_ELEMENTS = 50_000_000
# An operator that DeepSpeed would compile when it starts on a CPU. gloo does the same.
COMPILED_ON_CPU = "deepspeed_shm_comm"


def build(
    module: PackedModel, settings: ModelRoleConfig, device: torch.device, directory: Path
) -> DeepSpeedBackend:
    """Distribute `module` over all ranks, in place, and return its backend.

    A frozen model has no gradients and no optimizer, so that only ZeRO 3 shards anything of it;
    with ZeRO 1 and 2 every rank holds it whole.

    Raises:
        UnsupportedModelError: see `check_modules`.
    """
    check_modules(module)
    trained = settings if isinstance(settings, TrainableRoleConfig) else None
    if trained and trained.gradient_checkpointing:
        for block in decoder_blocks(module.model):
            recompute_in_backward(block)

    zero_stage = settings.deepspeed.zero_stage
    if trained is None and zero_stage < 3:
        return DeepSpeedBackend(module, device, directory, zero_stage)

    optimizer = None if trained is None else _adamw(module, trained.optimizer)
    # DeepSpeed rounds the weights to the compute dtype before it copies them as masters.
    exact = {}
    if trained and settings.compute_dtype == "bfloat16":
        exact = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    deepspeed = import_deepspeed(device)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config=engine_settings(settings, module, on_gpu=device.type == "cuda"),
        dist_init_required=False,
    )
    backend = DeepSpeedBackend(module, device, directory, zero_stage, engine, optimizer)
    for name, parameter in module.named_parameters():
        if name in exact:
            backend.set_master(parameter, exact.pop(name))
    return backend


def check_modules(module: PackedModel) -> None:
    """Refuse a mixture whose experts are modules of their own: a rank runs those that it needs.

    The collectives of DeepSpeed follow the modules that run, so they must be the same on all ranks.
    transformers holds the experts of a layer as one module.

    Raises:
        UnsupportedModelError: names the module.
    """
    for name, _ in experts_of_their_own(module.model):
        raise UnsupportedModelError(
            f"backend: 'deepspeed' needs the same modules on all ranks, and {name} of "
            f"{type(module.model).__name__} has a module for each expert. Use fsdp2, which trains "
            "them on one rank."
        )


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for `device`, and forget the process group of a former model.

    Raises:
        ValueError: it cannot be imported here.
    """
    # DeepSpeed takes its device from the environment. Ray shows each rank its own GPU only.
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ["LOCAL_RANK"] = "0"
    try:
        deepspeed = _library()
    except ImportError as error:
        raise ValueError(
            f"backend: 'deepspeed' cannot be imported on a node of the ranks ({error}). Install it "
            "there, or choose fsdp2."
        ) from error
    deepspeed.ops.__compatible_ops__[COMPILED_ON_CPU] = False

    # It keeps the groups that it was first used with, also when they have been destroyed.
    deepspeed.comm.comm.cdb = None
    deepspeed.utils.groups._WORLD_GROUP = None
    return deepspeed


def _library() -> Any:
    """Return DeepSpeed, which is imported only where it is used."""
    return importlib.import_module("deepspeed")


def engine_settings(
    settings: ModelRoleConfig, module: nn.Module, *, on_gpu: bool
) -> dict[str, Any]:
    """Return DeepSpeed's configuration for the model of a role; its defaults hold for the rest."""
    trained = settings if isinstance(settings, TrainableRoleConfig) else None
    elements = sum(parameter.numel() for parameter in module.parameters())
    zero: dict[str, Any] = {
        "stage": settings.deepspeed.zero_stage,
        "reduce_bucket_size": min(elements, BUCKET_ELEMENTS),
        # Small weights, such as those of norms, are sharded as well.
        "stage3_param_persistence_threshold": 0,
    }
    if on_gpu and trained and trained.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if on_gpu and settings.deepspeed.offload_weights:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}

    return {
        "train_micro_batch_size_per_gpu": 1,
        # `step` ends an accumulation, whatever the number of packs before it.
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": trained.optimizer.max_grad_norm if trained else 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": settings.compute_dtype == "bfloat16", "check_grad_overflow": True},
        # Gradients are summed over packs and ranks in float32, whatever the compute dtype.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }


def _adamw(module: nn.Module, optimizer: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW over whole parameters; DeepSpeed replaces them by its float32 partitions."""
    return torch.optim.AdamW(
        parameter_groups(module.named_parameters(), optimizer.weight_decay),
        lr=optimizer.learning_rate,
        betas=optimizer.betas,
        eps=optimizer.eps,
        fused=True,
    )


class DeepSpeedBackend:
    """The `ModelBackend` of a model that DeepSpeed distributes."""

    def __init__(
        self,
        module: PackedModel,
        device: torch.device,
        directory: Path,
        zero_stage: int,
        engine: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Take a `module`, loaded from `directory`, that `engine` distributes.

        Without an `engine` every rank has the whole module; without an `optimizer` it is frozen.
        """
        self.module = module
        self.device = device
        self._directory = directory
        self._zero_stage = zero_stage
        self._engine = engine
        self._optimizer = optimizer
        self._ranks = dist.get_world_size()
        self._rank = dist.get_rank()
        self._names: CheckpointNames | None = None  # planned at the first export

    def forward(self, pack: PackTensors) -> Any:
        """See `ModelBackend`."""
        return self.module(pack) if self._engine is None else self._engine(pack)

    def backward(self, loss: Tensor) -> None:
        """See `ModelBackend`."""
        # DeepSpeed averages gradients over ranks; the factor turns the mean into the sum.
        self._engine.backward(loss * self._ranks)

    def step(self, learning_rate: float) -> float:
        """See `ModelBackend`."""
        assert self._optimizer is not None, "a frozen model takes no steps"
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate

        # A step is left out where the gradient is not finite; then there is no norm either.
        self._engine.step()
        taken = self._engine.was_step_applied()
        return float(self._engine.get_global_grad_norm()) if taken else math.inf

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `ModelBackend`."""
        tensors = dict(_named_tensors(self.module))
        if self._names is None:
            shapes = {
                name: torch.empty(whole_shape(tensor), device="meta", dtype=tensor.dtype)
                for name, tensor in tensors.items()
            }
            self._names = CheckpointNames(self.module.model, shapes)

        # One weight at a time, or those that transformers can only convert together.
        for group in self._names.groups:
            here: dict[str, Tensor] = {}
            for name in group.names:
                whole = self._whole(tensors[name])
                if self._rank == 0:
                    here[name] = whole.detach().to("cpu", copy=True)
                del whole  # before the next is gathered
            if self._rank == 0:
                yield from self._names.convert(group, here).items()

    def _whole(self, tensor: Tensor) -> Tensor:
        """Return a weight unsharded, in float32 if it is trained; collective."""
        if self._engine is None or not isinstance(tensor, nn.Parameter):
            return tensor

        if self._optimizer is not None:
            return _library().utils.safe_get_full_fp32_param(tensor)
        with _library().zero.GatheredParameters([tensor]):
            return tensor.detach().clone()

    def save(self, files: RankFiles) -> None:
        """See `ModelBackend`; it writes at once, and raises its errors itself."""
        path = files.path
        weights = {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in self.weights()
        }
        if self._rank == 0:
            copy_model_files(self._directory, path)
            if fields := self.module.config_fields():
                change_model_config(path, fields)
            save_file(weights, path / "model.safetensors", {"format": "pt"})

        torch.save(self._optimizer_state(), path / self._optimizer_file)

    def load(self, path: Path) -> None:
        """See `ModelBackend`."""
        # Several files are those of fsdp2, whose optimizer state is refused by name below.
        found = {
            name: tensor for file in weight_paths(path) for name, tensor in load_file(file).items()
        }
        saved = from_checkpoint(self.module.model, found)
        for name, tensor in _named_tensors(self.module):
            shape = whole_shape(tensor)
            if name not in saved or saved[name].shape != shape:
                raise ValueError(
                    f"checkpoint: it has no weight {name} of shape {tuple(shape)}, so it belongs "
                    "to another model. Resume with the model that it was written with."
                )
            self._set(tensor, saved[name])

        self._load_optimizer_state(path)

    def _set(self, tensor: Tensor, value: Tensor) -> None:
        """Set a weight, its master and its copy in the compute dtype; collective."""
        value = value.to(self.device)
        if not isinstance(tensor, nn.Parameter) or self._engine is None:
            with torch.no_grad():
                tensor.copy_(value)
            return

        # With ZeRO 3 the change of rank 0 reaches all shards. Below it, this only makes the copy.
        gathered = _library().zero.GatheredParameters([tensor], modifier_rank=0)
        with gathered, torch.no_grad():
            if self._zero_stage < 3 or self._rank == 0:
                tensor.copy_(value)
        if self._optimizer is not None:
            self.set_master(tensor, value)

    def set_master(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set the float32 weight that the optimizer changes; every rank passes the whole value."""
        if self._zero_stage < 3:
            _library().utils.safe_set_full_fp32_param(parameter, value)
            return

        # Every rank has a part of equal length; that of the last one is padded.
        length = parameter.ds_tensor.numel()  # pyright: ignore[reportAttributeAccessIssue]
        padded = value.new_zeros(length * self._ranks)
        padded[: value.numel()] = value.flatten()
        own = padded[length * self._rank : length * (self._rank + 1)]
        _library().utils.safe_set_local_fp32_param(parameter, own)

    @property
    def _optimizer_file(self) -> str:
        return f"optimizer_rank{self._rank}.pt"

    def _partitions(self) -> list[Tensor]:
        """Return the flat float32 weights of this rank, with which the optimizer keeps moments."""
        optimizer = self._engine.optimizer
        attribute = {
            "DeepSpeedZeroOptimizer": "single_partition_of_fp32_groups",
            "BF16_Optimizer": "fp32_groups_flat_partition",
            "DeepSpeedZeroOptimizer_Stage3": "fp32_partitioned_groups_flat",
        }[type(optimizer).__name__]
        return list(getattr(optimizer, attribute))

    def _optimizer_state(self) -> dict[str, Any]:
        """Return Adam's moments of this rank's partitions, which depend on the ZeRO stage."""
        assert self._optimizer is not None, "a frozen model has no optimizer state"
        state = [dict(self._optimizer.state[partition]) for partition in self._partitions()]
        return {"zero_stage": self._zero_stage, "ranks": self._ranks, "state": state}

    def _load_optimizer_state(self, path: Path) -> None:
        assert self._optimizer is not None, "a frozen model has no optimizer state"
        # The first rank's file tells of how many ranks there were, where this one has none.
        files = [path / self._optimizer_file, path / "optimizer_rank0.pt"]
        saved = None
        if file := next(filter(Path.exists, files), None):
            saved = torch.load(file, weights_only=True, map_location=self.device)
        if not isinstance(saved, dict) or saved["zero_stage"] != self._zero_stage:
            stage = saved["zero_stage"] if isinstance(saved, dict) else None
            was = f"zero_stage {stage}" if stage else "another backend"
            raise ValueError(
                f"deepspeed.zero_stage: the optimizer in {path} was saved with {was}, now it is "
                f"{self._zero_stage}. Resume with the backend and stage that it was written with."
            )

        if saved["ranks"] != self._ranks:
            raise ValueError(
                f"ranks: {path} was written by {saved['ranks']} ranks of DeepSpeed, now there are "
                f"{self._ranks}. Resume with as many, or start a new run with --model.path {path}."
            )

        for partition, state in zip(self._partitions(), saved["state"], strict=True):
            self._optimizer.state[partition] = {
                # The step count is one number on the CPU, the moments are where the weights are.
                key: value.to(partition.device) if value.ndim else value.cpu()
                for key, value in state.items()
            }


def _named_tensors(module: PackedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and saved buffers by the model's names; a tied LM head is left out."""
    left_out = tied_names(module.model)
    for name, tensor in module.model.state_dict(keep_vars=True).items():
        if name not in left_out:
            yield name, tensor


def whole_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of a weight before ZeRO 3 sharded it."""
    return getattr(tensor, "ds_shape", tensor.shape)
