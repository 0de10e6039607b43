"""Attention kernels of packs beside the model's own forward pass with torch's sdpa.

Reference       the model's own pass in float32 on padded sequences, with transformers' sdpa
Candidates      the packed kernel, with prompts shared (where it can) and not, in each dtype it has
Compared        log-probabilities, and the gradient of a weighted sum of them

In bfloat16 a correct kernel differs from the reference by rounding, which depends on the model. So
it may differ as much again as packed sdpa does in bfloat16, which is measured beside it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_check.catalogue import Place
from benchmarks.gpu_check.examples import Sizes, packs_of, random_sequences
from benchmarks.gpu_check.policy import TINY, Shape, packed, random_model
from benchmarks.gpu_check.results import Figure, Finding, SkippedError, within
from rlsys.data.packing import Pack
from rlsys.data.sequences import TokenSequences
from workers.training.packed_attention import SHARING_KERNELS
from workers.training.packed_model import PackedCausalLM, PackTensors

LOGPROB_LIMIT = 1e-2  # nats
GRADIENT_LIMIT = 1e-2  # of the norm
# Kernels that compute in float32 as well.
FLOAT32_KERNELS = ("sdpa", "eager", "flex_attention")
GPU_SHAPE = Shape(hidden=512, intermediate=1024, layers=4, heads=8, key_heads=2, vocabulary=2048)
WINDOW = 48  # shorter than the sequences, so that it hides tokens
CPU_WINDOW = 12


class Outputs(NamedTuple):
    """The outputs that are compared, in float32 on the CPU."""

    logprobs: Tensor  # [N] 0 outside the loss mask
    gradient: Tensor | None  # of all parameters; None: the kernel has no backward pass here
    seconds: float  # of the second pass, forward and, where there is one, backward


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One model and batch, with the reference's outputs."""

    shape: Shape
    sequences: TokenSequences
    device: torch.device
    weights: Tensor  # [N] of the log-probabilities in the sum that is differentiated

    def outputs(self, kernel: str, dtype: torch.dtype, *, shares: bool) -> Outputs:
        """Run the packed forward and backward pass of a kernel."""
        model = random_model(self.shape, self.device, dtype)
        # On a CPU flex_attention is torch's plain implementation, which has no backward pass.
        model.requires_grad_(kernel != "flex_attention" or self.device.type != "cpu")
        return self._run(packed(model, kernel), shares=shares)

    def reference(self) -> Outputs:
        """Run the model's own pass in float32."""
        model = random_model(self.shape, self.device, torch.float32)
        return self._run(PackedCausalLM(model, chunk_tokens=1024, packing=False), shares=False)

    def _run(self, module: PackedCausalLM, *, shares: bool) -> Outputs:
        packs = packs_of(self.sequences, budget=1 << 40, shares=shares)
        self._pass(module, packs)  # compiles
        module.zero_grad()

        synchronize(self.device)
        began = time.perf_counter()
        flat = self._pass(module, packs)
        synchronize(self.device)
        seconds = time.perf_counter() - began

        grads = [p.grad for p in module.parameters() if p.grad is not None]
        parts = [grad.detach().float().flatten().cpu() for grad in grads]
        return Outputs(flat, torch.cat(parts) if parts else None, seconds)

    def _pass(self, module: PackedCausalLM, packs: list[Pack]) -> Tensor:
        """Run forward and backward pass, and return [N] log-probs, 0 outside the mask."""
        flat = torch.zeros(len(self.sequences.token_ids))
        for pack in packs:
            logprobs = module(PackTensors.of(pack, self.device)).logprobs
            places = torch.from_numpy(pack.flat_positions)
            if logprobs.requires_grad:
                (logprobs * self.weights[places].to(self.device)).sum().backward()
            flat[places] = logprobs.detach().float().cpu()
        return flat


def synchronize(device: torch.device) -> None:
    """Wait for the work that the GPU has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def comparisons(place: Place) -> Iterator[tuple[str, Comparison]]:
    """Yield a model that sees everything before a token, and one with a sliding window."""
    shape = TINY if place.small else GPU_SHAPE
    sizes = Sizes(groups=3, samples=3, prompt=24, response=32, vocabulary=shape.vocabulary)
    if not place.small:
        sizes = replace(sizes, groups=6, samples=4, prompt=192, response=320)
    sequences = random_sequences(sizes)
    weights = np.random.default_rng(1).normal(size=len(sequences.token_ids))
    common = Comparison(
        shape=shape,
        sequences=sequences,
        device=place.device,
        weights=torch.from_numpy(weights).float() / sequences.num_loss_tokens,
    )
    window = CPU_WINDOW if place.small else WINDOW
    yield "", common
    yield f"window of {window}, ", replace(common, shape=replace(shape, window=window))


def largest(one: Tensor, other: Tensor) -> float:
    """Return the largest absolute difference; NaN where one is NaN."""
    return float((one - other).abs().max())


def relative(one: Tensor, other: Tensor) -> float:
    """Return |one - other| / |other|."""
    return float((one - other).norm() / other.norm())


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How far a correct kernel may be from the reference for its dtype alone."""

    logprobs: float = 0.0  # nats
    gradient: float = 0.0  # of the norm

    @staticmethod
    def of(found: Outputs, expected: Outputs) -> Rounding:
        """Measure it on a kernel that is known to be right."""
        assert found.gradient is not None
        assert expected.gradient is not None
        return Rounding(
            logprobs=largest(found.logprobs, expected.logprobs),
            gradient=relative(found.gradient, expected.gradient),
        )


def differences(name: str, found: Outputs, expected: Outputs, rounding: Rounding) -> Finding:
    """Compare the outputs of one kernel with the reference."""
    difference = largest(found.logprobs, expected.logprobs)
    figures = [
        Figure(name=f"{name}: log-prob difference", value=difference, unit="nats"),
        Figure(name=f"{name}: time of a pass", value=found.seconds, unit="s"),
    ]
    limit = LOGPROB_LIMIT + rounding.logprobs
    faults = within(f"{name}: log-prob difference", difference, limit)
    if found.gradient is not None:
        assert expected.gradient is not None
        gradient = relative(found.gradient, expected.gradient)
        figures.append(Figure(name=f"{name}: gradient difference", value=100 * gradient, unit="%"))
        limit = GRADIENT_LIMIT + rounding.gradient
        faults += within(f"{name}: relative gradient difference", gradient, limit)
    return Finding(figures=tuple(figures), faults=faults)


def compare(place: Place, kernel: str) -> Finding:
    """Compare a packed kernel with the model's own pass."""
    figures: list[Figure] = []
    faults: list[str] = []
    for prefix, comparison in comparisons(place):
        expected = comparison.reference()
        # The limits mean something only against the spread of what is compared.
        spread = float(expected.logprobs[expected.logprobs != 0].std())
        figures.append(Figure(name=f"{prefix}spread of the log-probs", value=spread, unit="nats"))

        reduced = comparison.outputs("sdpa", torch.bfloat16, shares=False)
        rounding = {
            torch.float32: Rounding(),
            torch.bfloat16: Rounding.of(reduced, expected),
        }
        dtypes = [dtype for dtype in rounding if dtype.itemsize < 4 or kernel in FLOAT32_KERNELS]
        for dtype in dtypes:
            for shares in (False, True) if kernel in SHARING_KERNELS else (False,):
                name = f"{prefix}{str(dtype).removeprefix('torch.')}, "
                name += "shared prompts" if shares else "prompts not shared"
                found = comparison.outputs(kernel, dtype, shares=shares)
                finding = differences(name, found, expected, rounding[dtype])
                figures += finding.figures
                faults += finding.faults
        figures.append(
            Figure(
                name=f"{prefix}bfloat16, log-prob difference that rounding makes with sdpa",
                value=rounding[torch.bfloat16].logprobs,
                unit="nats",
            )
        )
    return Finding(figures=tuple(figures), faults=tuple(faults))


def sdpa(place: Place) -> Finding:
    """Check torch's sdpa."""
    return compare(place, "sdpa")


def flex(place: Place) -> Finding:
    """Check flex_attention: compiled on a GPU, torch's plain implementation on a CPU."""
    return compare(place, "flex_attention")


def flash_varlen(place: Place) -> Finding:
    """Check flash-attn's kernel for sequences of different lengths."""
    capability = torch.cuda.get_device_capability(place.device)
    if capability < (8, 0):
        raise SkippedError(f"flash-attn 2 needs compute capability 8.0, this GPU has {capability}")
    return compare(place, "flash_attention_2")
