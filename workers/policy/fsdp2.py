"""FSDP2: one model sharded over 1..n ranks, float32 masters, forward and backward in the compute dtype.

Import this module in the process that holds the rank; `join_process_group` comes first.
"""

from __future__ import annotations

import os
from pathlib import Path

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
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rlsys.config import RunConfig
from rlsys.models.loading import load_causal_lm
from workers.policy.packed_attention import SHARING_KERNELS, register_packed_attention
from workers.policy.packed_forward import PackedCausalLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def join_process_group(address: str, rank: int, world_size: int) -> torch.device:
    """Join the ranks at `tcp://host:port` and return this rank's device: gloo on CPUs, NCCL for tensors on GPUs."""
    on_gpu = torch.cuda.is_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        init_method=address,
        rank=rank,
        world_size=world_size,
    )
    if not on_gpu:
        return torch.device("cpu")
    torch.cuda.set_device(0)  # Ray shows each rank its own GPU only
    return torch.device("cuda", 0)


def choose_kernel(configured: str, device: torch.device) -> str:
    """The attention kernel that `model.attention` means on this device."""
    if configured != "auto":
        return configured
    if device.type == "cuda":
        try:
            import flash_attn  # noqa: F401  # pyright: ignore[reportMissingImports]  (GPU extra)
        except ImportError:
            return "sdpa"
        return "flash_attention_2"
    return "sdpa"


def shares_prompts(config: RunConfig, device: torch.device) -> bool:
    """Whether prompts are computed once a group: asked for, and the kernel can."""
    return (
        config.policy.share_prompts
        and choose_kernel(config.model.attention, device) in SHARING_KERNELS
    )


def build_sharded_model(
    config: RunConfig,
    model_directory: str | Path,
    device: torch.device,
    world_size: int,
    *,
    trainable: bool,
) -> PackedCausalLM:
    """Load the model and shard it: one FSDP unit a decoder layer, the rest (embeddings, final norm, LM head) in the root.

    A trainable model keeps float32 masters; a frozen one is stored in the compute dtype.
    """
    compute = DTYPES[config.policy.compute_dtype]
    kernel = register_packed_attention(choose_kernel(config.model.attention, device))
    model = load_causal_lm(
        model_directory,
        dtype=torch.float32 if trainable else compute,
        attention=kernel,
        trust_remote_code=config.model.trust_remote_code,
    )
    model.train(trainable).requires_grad_(trainable)
    if trainable and config.policy.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    packed = PackedCausalLM(model, chunk_tokens=config.policy.logit_chunk_tokens).to(device)
    mesh = init_device_mesh(device.type, (world_size,))
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    offload = (
        CPUOffloadPolicy()
        if trainable and config.policy.offload_optimizer and device.type == "cuda"
        else OffloadPolicy()
    )
    for layer in _decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=precision, offload_policy=offload)
    fully_shard(packed, mesh=mesh, mp_policy=precision, offload_policy=offload)
    return packed


def _decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"model.path: {type(model).__name__} keeps no `layers` in its decoder, so it cannot be sharded by layer"
        )
    return layers


def full_state_dict(packed: PackedCausalLM) -> dict[str, Tensor]:
    """All weights by Hugging Face name, whole, on the CPU. Every rank must call it; tied tensors appear once."""
    tied = _tied_names(packed.model)
    whole: dict[str, Tensor] = {}
    for name, tensor in packed.model.state_dict().items():
        if name in tied:
            continue
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        whole[name] = tensor.detach().cpu()
    return whole


def _tied_names(model: PreTrainedModel) -> frozenset[str]:
    """Names that are a second mention of another tensor."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return frozenset()
    return frozenset(name + ".weight" for name, module in model.named_modules() if module is head)


def load_full_state_dict(packed: PackedCausalLM, weights: dict[str, Tensor]) -> None:
    """Put whole tensors into the sharded parameters, in place. Every rank calls it with the same weights.

    Raises:
        ValueError: a parameter is missing or has another shape.
    """
    tied = _tied_names(packed.model)
    for name, parameter in packed.model.state_dict().items():
        if name in tied:
            continue
        if name not in weights or weights[name].shape != parameter.shape:
            raise ValueError(
                f"checkpoint: no weight {name} of shape {tuple(parameter.shape)}; it belongs to another model"
            )
        with torch.no_grad():
            if isinstance(parameter, DTensor):
                local = parameter.to_local()
                local.copy_(_own_shard(weights[name], local, parameter))
            else:
                parameter.copy_(weights[name])


def _own_shard(whole: Tensor, local: Tensor, parameter: DTensor) -> Tensor:
    """This rank's rows of a tensor that is sharded along its first dimension."""
    mesh = parameter.device_mesh
    rows = -(-whole.shape[0] // mesh.size()) if whole.ndim else 1
    start = min(rows * mesh.get_local_rank(), whole.shape[0])
    return whole[start : start + local.shape[0]].to(local.dtype)


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory of this process so far: on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1024**3
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def use_all_threads() -> None:
    """Use as many threads as OMP_NUM_THREADS says; Ray may have set torch to fewer before this process knew."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
