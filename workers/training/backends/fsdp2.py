"""FSDP2: one model sharded over 1..n ranks, float32 masters, forward and backward in the compute dtype.

Import this module in the process that holds the rank; `join_process_group` comes first.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlsys.config import RunConfig
from rlsys.models.loading import load_causal_lm
from workers.training.forward_check import ForwardCheck, Lengths, check_forward
from workers.training.packed_attention import register_packed_attention
from workers.training.packed_model import PackedCausalLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What the model's own forward pass runs with; transformers compiles flex_attention anew for each shape.
OWN_KERNEL = {"flex_attention": "sdpa"}


def open_rendezvous(host: str, world_size: int) -> TCPStore:
    """Return the store at which the ranks meet, listening on a free port of `host`; rank 0 keeps it.

    The port is bound once and stays bound: one that was only looked up could be taken by another
    process before the ranks meet.
    """
    return TCPStore(host, 0, world_size, is_master=True, wait_for_workers=False)


def join_process_group(
    address: str, rank: int, world_size: int, store: TCPStore | None = None
) -> torch.device:
    """Join the ranks and return this rank's device: gloo on CPUs, NCCL for tensors on GPUs.

    Args:
        address: host:port of the store of rank 0.
        store: that store itself, on rank 0.
    """
    if store is None:
        host, _, port = address.rpartition(":")
        store = TCPStore(host, int(port), world_size, is_master=False)
    on_gpu = torch.cuda.is_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world_size
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


def build_sharded_model(
    config: RunConfig,
    model_directory: str | Path,
    device: torch.device,
    world_size: int,
    *,
    trainable: bool,
) -> tuple[PackedCausalLM, ForwardCheck]:
    """Load the model, find out how it can be run, and shard it.

    Each decoder block is one FSDP unit; the rest (embeddings, final norm, LM head) is in the root. A
    trainable model keeps float32 masters; a frozen one is stored in the compute dtype. Both run in
    evaluation mode: dropout and router jitter would make the log-probabilities of one policy differ
    from pass to pass.
    """
    compute = DTYPES[config.policy.compute_dtype]
    kernel = choose_kernel(config.model.attention, device)
    model = load_causal_lm(
        model_directory,
        dtype=torch.float32 if trainable else compute,
        attention=OWN_KERNEL.get(kernel, kernel),
        trust_remote_code=config.model.trust_remote_code,
    )
    model.requires_grad_(trainable)
    nn.Module.to(model, device)
    verdict = _agreed(lambda: _check(config, model, kernel, device, Path(model_directory)))
    # FSDP wants one dtype: some models keep a few parameters in float32 whatever is asked for.
    nn.Module.to(model, torch.float32 if trainable else compute)
    if verdict.packing:
        model.set_attn_implementation(register_packed_attention(kernel))

    packed = PackedCausalLM(
        model, chunk_tokens=config.policy.logit_chunk_tokens, packing=verdict.packing
    )
    blocks = decoder_blocks(model)
    if trainable and config.policy.gradient_checkpointing:
        for block in blocks:
            recompute_in_backward(block)

    mesh = init_device_mesh(device.type, (world_size,))
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    offload = (
        CPUOffloadPolicy()
        if trainable and config.policy.offload_optimizer and device.type == "cuda"
        else OffloadPolicy()
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision, offload_policy=offload)
    fully_shard(packed, mesh=mesh, mp_policy=precision, offload_policy=offload)
    return packed, verdict


def _check(
    config: RunConfig, model: PreTrainedModel, kernel: str, device: torch.device, directory: Path
) -> ForwardCheck:
    """Run the check in float32, so that a difference is a missing feature and not rounding."""
    nn.Module.to(model, torch.float32)
    return check_forward(
        model,
        kernel=kernel,
        lengths=Lengths(
            prompt=config.data.max_prompt_tokens, response=config.generation.max_tokens
        ),
        packing=config.policy.packing,
        device=device,
        code=directory,
    )


def _agreed(decide: Callable[[], ForwardCheck]) -> ForwardCheck:
    """Return what rank 0 decides, on every rank; an error of rank 0 is raised on every rank."""
    decision: list[ForwardCheck | Exception | None] = [None]
    if dist.get_rank() == 0:
        try:
            decision = [decide()]
        except Exception as error:  # the other ranks wait for an answer
            decision = [error]
    dist.broadcast_object_list(decision, src=0)
    (answer,) = decision
    if isinstance(answer, Exception):
        raise answer
    assert answer is not None, "rank 0 has answered"
    return answer


def decoder_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the repeated blocks of the model, inner ones first: what is sharded and recomputed as one.

    They are the members of module lists whose class the model names as not to be split.
    """
    names = set(model._no_split_modules or ())
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    found = [block for blocks in lists for block in blocks if type(block).__name__ in names]
    return list(dict.fromkeys(reversed(found)))


def recompute_in_backward(block: nn.Module) -> None:
    """Keep only the block's inputs in the forward pass, and run it again in the backward pass.

    transformers' own switch works in training mode only, which would bring dropout with it.
    """
    forward = block.forward

    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    block.forward = recomputed


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
