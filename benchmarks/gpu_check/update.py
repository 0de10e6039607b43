"""FSDP2 updates beside those of plain torch, which knows nothing of FSDP or bfloat16."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from benchmarks.gpu_check.catalogue import Place
from benchmarks.gpu_check.examples import Sizes, packs_of, random_sequences
from benchmarks.gpu_check.policy import (
    TINY,
    Optimizer,
    Role,
    Shape,
    backend_of,
    join,
    packed,
    random_model,
)
from benchmarks.gpu_check.results import Figure, Finding, at_least, within
from rlsys.data.packing import Pack
from workers.training.backends.fsdp2 import FSDP2Backend
from workers.training.losses import Denominators, PackColumns, PackLoss, backward_passes
from workers.training.packed_model import PackedCausalLM, PackResult, PackTensors
from workers.training.weight_decay import parameter_groups

STEPS = 5
SETTINGS = Optimizer(learning_rate=1e-3, weight_decay=0.1)
# Of float32: only the order of sums differs. Of bfloat16: its 8 bits round by up to 0.4 %.
FLOAT32_LIMIT = 1e-4
BFLOAT16_LIMIT = 0.02
BFLOAT16_COSINE = 0.99
GPU_SHAPE = Shape(hidden=256, intermediate=768, layers=4, heads=4, key_heads=2, vocabulary=2048)


def likelihood_loss(result: PackResult, _: PackColumns, sizes: Denominators) -> PackLoss:
    """Return the negative log-likelihood per token; a `TokenLoss`."""
    loss = -result.logprobs.sum() / sizes.num_tokens
    return PackLoss(loss=loss, sums={"loss": float(loss.detach())}, maxima={})


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Some updates on one batch."""

    losses: tuple[float, ...]  # before each update
    norms: tuple[float, ...]  # of the gradients, before clipping
    gradient: Tensor  # of the first update, all parameters in one float32 array


def sizes_of(packs: list[Pack]) -> Denominators:
    """Return the sizes of a batch that consists of some packs."""
    return Denominators(
        num_tokens=sum(len(pack.targets) for pack in packs),
        num_sequences=sum(len(pack.rows) for pack in packs),
        max_tokens=1,
    )


def plain_updates(module: PackedCausalLM, packs: list[Pack], device: torch.device) -> Trace:
    """Update an unsharded float32 model with torch alone."""
    groups = parameter_groups(module.named_parameters(), SETTINGS.weight_decay)
    optimizer = torch.optim.AdamW(
        groups, lr=SETTINGS.learning_rate, betas=SETTINGS.betas, eps=SETTINGS.eps
    )
    sizes = sizes_of(packs)
    parameters = list(module.parameters())
    losses, norms, gradients = [], [], []
    for _ in range(STEPS):
        total = 0.0
        for pack in packs:
            result = module(PackTensors.of(pack, device))
            loss = likelihood_loss(result, PackColumns(pack, device), sizes).loss
            loss.backward()
            total += float(loss.detach())
        gradients.append(flat([parameter.grad for parameter in parameters]))
        norms.append(float(nn.utils.clip_grad_norm_(parameters, SETTINGS.max_grad_norm)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return Trace(losses=tuple(losses), norms=tuple(norms), gradient=gradients[0])


def backend_updates(backend: FSDP2Backend, packs: list[Pack]) -> Trace:
    """Update a model as the trainer does."""
    sizes = sizes_of(packs)
    parameters = list(backend.module.parameters())
    losses, norms, gradients = [], [], []
    for _ in range(STEPS):
        passes = backward_passes(backend, packs, likelihood_loss, sizes)
        losses.append(sum(pack_loss.sums["loss"] for _, _, pack_loss in passes))
        gradients.append(flat([parameter.grad for parameter in parameters]))
        norms.append(backend.step(SETTINGS.learning_rate))
    return Trace(losses=tuple(losses), norms=tuple(norms), gradient=gradients[0])


def flat(tensors: list[Tensor | None]) -> Tensor:
    """Return all values of some tensors, sharded or not, in one float32 array on the CPU."""
    whole = []
    for tensor in tensors:
        assert tensor is not None, "every parameter has a gradient"
        local = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        whole.append(local.detach().float().flatten().cpu())
    return torch.cat(whole)


def cosine(one: Tensor, other: Tensor) -> float:
    """Return the cosine of the angle between two gradients."""
    return float(torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0))


def largest_relative(found: tuple[float, ...], expected: tuple[float, ...]) -> float:
    """Return the largest relative difference; NaN where one is NaN."""
    differences = [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]
    return max(differences, key=lambda value: math.inf if math.isnan(value) else value)


def fsdp2_update(place: Place) -> Finding:
    """Compare updates of FSDP2 in float32 and bfloat16 with those of plain torch in float32."""
    device = join()
    shape = TINY if place.small else GPU_SHAPE
    sizes = Sizes(groups=3, samples=3, prompt=24, response=32, vocabulary=shape.vocabulary)
    if not place.small:
        sizes = replace(sizes, groups=8, samples=4, prompt=128, response=256)
    packs = packs_of(random_sequences(sizes), budget=128 if place.small else 4096, shares=True)

    def sharded(dtype: str, **options: bool) -> FSDP2Backend:
        role = Role(compute_dtype=dtype, optimizer=SETTINGS, **options)
        module = packed(random_model(shape, device), "sdpa")
        return backend_of(module, role, device, place.folder)

    expected = plain_updates(packed(random_model(shape, device), "sdpa"), packs, device)
    figures = [
        Figure(name="loss before", value=expected.losses[0]),
        Figure(name=f"loss before update {STEPS}", value=expected.losses[-1]),
    ]
    faults = at_least("fall of the loss", expected.losses[0] - expected.losses[-1], 0.1)

    variants: dict[str, tuple[str, dict[str, bool]]] = {
        "float32": ("float32", {}),
        "bfloat16": ("bfloat16", {}),
        "bfloat16, recomputed activations": ("bfloat16", {"gradient_checkpointing": True}),
    }
    if device.type == "cuda":
        variants["bfloat16, optimizer on the host"] = ("bfloat16", {"offload_optimizer": True})
    for name, (dtype, options) in variants.items():
        backend = sharded(dtype, **options)
        found = backend_updates(backend, packs)
        limit = FLOAT32_LIMIT if dtype == "float32" else BFLOAT16_LIMIT
        least = 1 - FLOAT32_LIMIT if dtype == "float32" else BFLOAT16_COSINE
        loss = largest_relative(found.losses, expected.losses)
        norm = largest_relative(found.norms, expected.norms)
        angle = cosine(found.gradient, expected.gradient)
        figures += [
            Figure(name=f"{name}: largest relative difference of a loss", value=loss),
            Figure(name=f"{name}: of a gradient norm", value=norm),
            Figure(name=f"{name}: cosine of the first gradients", value=angle),
        ]
        faults += within(f"{name}: difference of the losses", loss, limit)
        faults += within(f"{name}: difference of the gradient norms", norm, 5 * limit)
        faults += at_least(f"{name}: cosine of the gradients", angle, least)
        faults += master_faults(name, backend)
        faults += skipped_step_faults(name, backend, packs)
    return Finding(figures=tuple(figures), faults=faults)


def master_faults(name: str, backend: FSDP2Backend) -> tuple[str, ...]:
    """Return a fault if a master weight or a moment is not float32."""
    states = [value for state in backend.optimizer.state.values() for value in state.values()]
    found = {tensor.dtype for tensor in (*backend.module.parameters(), *states)}
    return () if found == {torch.float32} else (f"{name}: the optimizer holds {found}",)


def skipped_step_faults(name: str, backend: FSDP2Backend, packs: list[Pack]) -> tuple[str, ...]:
    """Return a fault if a gradient that is not finite changes the weights."""

    def not_finite(result: PackResult, columns: PackColumns, sizes: Denominators) -> PackLoss:
        loss = likelihood_loss(result, columns, sizes)
        return replace(loss, loss=loss.loss * math.inf)

    before = flat(list(backend.module.parameters()))
    for _ in backward_passes(backend, packs, not_finite, sizes_of(packs)):
        pass
    norm = backend.step(SETTINGS.learning_rate)
    if math.isfinite(norm):
        return (f"{name}: the norm of an infinite gradient is {norm}",)
    if not torch.equal(before, flat(list(backend.module.parameters()))):
        return (f"{name}: a gradient that is not finite changed the weights",)
    return ()
