"""Log-probability and entropy of sampled tokens from hidden states, without ever holding all logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class TokenLogprobs(NamedTuple):
    """All [n] float32 (float64 for float64 inputs)."""

    logprobs: Tensor
    entropies: Tensor
    score_norms: Tensor  # without gradient


def token_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
) -> TokenLogprobs:
    """log pi(target | prefix), the entropy of pi(. | prefix) and the squared norm of the score, at each of n positions.

        z = hidden W^T / temperature,    log pi(a) = z_a - logsumexp(z),    H = logsumexp(z) - sum_k pi_k z_k
        ||d log pi(a) / dz||^2 = 1 - 2 pi(a) + sum_k pi_k^2

    The first two are differentiable. The backward pass computes the logits of a chunk again instead of keeping them:

        d log pi(a) / dz_k = 1[k = a] - pi_k         dH / dz_k = -pi_k (log pi_k + H)

    Shapes: hidden [n, d], lm_head_weight [V, d], targets [n] int64 -> [n], [n], [n].

    Conventions: the products with W run in the dtype of `hidden` (bfloat16 products for bfloat16), softmax and everything after it in float32; the
    gradient of W is summed over chunks in float32. At most `chunk_tokens` x V logits exist at a time.

    Raises:
        ValueError: shapes do not fit.
    """
    if (
        hidden.ndim != 2
        or targets.shape != hidden.shape[:1]
        or lm_head_weight.shape[1:] != hidden.shape[1:]
    ):
        raise ValueError(
            f"hidden [n, d], lm_head_weight [V, d] and targets [n] do not fit: {tuple(hidden.shape)}, {tuple(lm_head_weight.shape)}, "
            f"{tuple(targets.shape)}"
        )
    return TokenLogprobs(
        *_TokenLogprobs.apply(hidden, lm_head_weight, targets, temperature, chunk_tokens)
    )  # pyright: ignore[reportGeneralTypeIssues]


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scaled_logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = hidden @ weight.t()
    # One fresh float32 tile a chunk in low precision; in float32 the product itself is scaled in place.
    logits = logits.to(_work_dtype(logits.dtype))
    return logits.div_(temperature) if temperature != 1.0 else logits


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        n, work = len(hidden), _work_dtype(hidden.dtype)
        logprobs, entropies, norms, normalizers = (
            torch.empty(n, dtype=work, device=hidden.device) for _ in range(4)
        )
        for start in range(0, n, chunk):
            part = slice(start, start + chunk)
            logits = _scaled_logits(hidden[part], weight, temperature)
            chosen = logits.gather(1, targets[part, None])[:, 0]
            top = logits.amax(dim=1, keepdim=True)
            shifted = logits.sub_(top)  # z - max, in place
            probabilities = shifted.exp()
            total = probabilities.sum(dim=1)
            normalizer = total.log()
            expected = torch.linalg.vecdot(probabilities, shifted, dim=1) / total
            normalizers[part] = normalizer + top[:, 0]
            logprobs[part] = chosen - normalizers[part]
            entropies[part] = normalizer - expected
            square = torch.linalg.vecdot(probabilities, probabilities, dim=1) / total**2
            norms[part] = (1 - 2 * logprobs[part].exp() + square).clamp(
                min=0
            )  # rounding, where a token is all but certain
        ctx.save_for_backward(hidden, weight, targets, normalizers, entropies)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(norms)
        return logprobs, entropies, norms

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor, grad_entropies: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, targets, normalizers, entropies = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(
            weight.shape, dtype=_work_dtype(weight.dtype), device=weight.device
        )
        use_entropy = bool((grad_entropies != 0).any())
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logs = _scaled_logits(hidden[part], weight, ctx.temperature).sub_(
                normalizers[part, None]
            )  # log pi
            probabilities = logs.exp()
            grad = probabilities * -grad_logprobs[part, None]
            grad.scatter_add_(1, targets[part, None], grad_logprobs[part, None])
            if use_entropy:
                grad -= grad_entropies[part, None] * probabilities * (logs + entropies[part, None])
            if ctx.temperature != 1.0:
                grad /= ctx.temperature
            grad = grad.to(hidden.dtype)
            grad_hidden[part] = grad @ weight
            if grad_weight.dtype == hidden.dtype:
                grad_weight.addmm_(grad.t(), hidden[part])
            else:
                grad_weight += grad.t() @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None
