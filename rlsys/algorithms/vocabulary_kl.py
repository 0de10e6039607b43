"""The KL between two language models over the vocabulary, from their hidden states."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlsys.algorithms.kl import exact_token_kl
from rlsys.algorithms.token_logprobs import (
    HeadGradient,
    LogitTransform,
    logit_slope,
    scaled_logits,
)


@dataclass(frozen=True)
class LMHead:
    """The map from a hidden state [d] to logits [V]."""

    weight: Tensor  # [V, d]
    bias: Tensor | None = None  # [V]
    transform: LogitTransform = field(default_factory=LogitTransform)

    def to(self, device: torch.device) -> LMHead:
        """Return a copy of the head on `device`, which shares no memory with a whole model."""
        bias = None if self.bias is None else self.bias.clone().to(device)
        return LMHead(self.weight.clone().to(device), bias, self.transform)


def vocabulary_kl(
    hidden: Tensor,
    head: LMHead,
    ref_hidden: Tensor,
    ref_head: LMHead,
    *,
    temperature: float,
    chunk_tokens: int,
) -> Tensor:
    """Compute `exact_token_kl` from hidden states, without holding all logits.

        KL_t = sum_a pi_a (log pi_a - log ref_a)

    The backward pass computes the logits of a chunk again instead of keeping them:

        dKL / dz_a = pi_a (log pi_a - log ref_a - KL)

    Source: see `exact_token_kl`.

    Shapes: hidden [n, d], ref_hidden [n, e]; weights of the heads [V, d] and [V, e] -> [n].

    Conventions: those of `token_logprobs`. Differentiable in `hidden`, and in weight and bias of
    `head`; the reference gets no gradient. At most 2 x `chunk_tokens` x V logits exist at a time.

    Raises:
        ValueError: shapes do not fit.
    """
    if len(hidden) != len(ref_hidden) or len(head.weight) != len(ref_head.weight):
        raise ValueError(
            "policy and reference must have equally many tokens and one vocabulary, not "
            f"{len(hidden)} and {len(ref_hidden)} tokens, {len(head.weight)} and "
            f"{len(ref_head.weight)} words"
        )
    reference = _Reference(ref_hidden.detach(), ref_head)
    return _VocabularyKL.apply(  # pyright: ignore[reportReturnType]
        hidden, head.weight, head.bias, head.transform, reference, temperature, chunk_tokens
    )


@dataclass(frozen=True)
class _Reference:
    hidden: Tensor
    head: LMHead

    def logits(self, part: slice, temperature: float) -> Tensor:
        head = self.head
        return scaled_logits(self.hidden[part], head.weight, head.bias, temperature, head.transform)


class _VocabularyKL(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transform: LogitTransform,
        reference: _Reference,
        temperature: float,
        chunk: int,
    ) -> Tensor:
        parts = []
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = scaled_logits(hidden[part], weight, bias, temperature, transform)
            parts.append(exact_token_kl(logits, reference.logits(part, temperature)))

        ctx.save_for_backward(hidden, weight, bias)
        ctx.transform, ctx.reference = transform, reference
        ctx.temperature, ctx.chunk = temperature, chunk
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_kl: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        gradient = HeadGradient(hidden, weight, bias)

        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = scaled_logits(hidden[part], weight, bias, ctx.temperature, ctx.transform)
            slope = logit_slope(logits, ctx.temperature, ctx.transform)
            with torch.enable_grad():
                logits.requires_grad_()
                kl = exact_token_kl(logits, ctx.reference.logits(part, ctx.temperature))
            (grad,) = torch.autograd.grad(kl, logits, grad_kl[part])

            if slope is not None:
                grad *= slope
            gradient.add(part, grad)

        return *gradient.result(), None, None, None, None
