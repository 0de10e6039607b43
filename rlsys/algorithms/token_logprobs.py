"""Log-probability and entropy of sampled tokens from hidden states, without holding all logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class TokenLogprobs(NamedTuple):
    """Log-prob, entropy and squared score norm of n tokens, all [n] float32 (or float64)."""

    logprobs: Tensor
    entropies: Tensor
    squared_score_norms: Tensor  # without gradient


@dataclass(frozen=True)
class LogitTransform:
    """The transform that a model applies to the product of its LM head.

        u = scale (h W^T + b), then softcap tanh(u / softcap)

    Granite and Cohere scale, Gemma 2 caps; most models do neither.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap: {self.softcap:g} is not above 0. Give None for no cap.")


def token_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
    lm_head_bias: Tensor | None = None,
    transform: LogitTransform = LogitTransform(),
) -> TokenLogprobs:
    """Return log-probability, entropy and squared score norm at each target token.

        u = scale (h W^T + b),    v = softcap tanh(u / softcap) or u,    z = v / temperature
        log pi(a) = z_a - logsumexp(z),    H = logsumexp(z) - sum_k pi_k z_k
        ||d log pi(a) / dz||^2 = 1 - 2 pi(a) + sum_k pi_k^2

    The first two are differentiable. The backward pass computes the logits of a chunk again instead
    of keeping them:

        d log pi(a) / dz_k = 1[k = a] - pi_k         dH / dz_k = -pi_k (log pi_k + H)
        dz / du = (1 - (v / softcap)^2) / temperature

    Shapes: hidden [n, d], lm_head_weight [V, d], lm_head_bias [V] or None, targets [n] int64
        -> [n], [n], [n].

    Conventions: the products with W run in the dtype of `hidden` (bfloat16 products for bfloat16),
    softmax and everything after it in float32 (float64 for float64 inputs); the gradient of W is
    summed over chunks in float32. At most `chunk_tokens` x V logits exist at a time.

    Raises:
        ValueError: shapes do not fit.
    """
    shapes_fit = (
        hidden.ndim == 2
        and targets.shape == hidden.shape[:1]
        and lm_head_weight.shape[1:] == hidden.shape[1:]
    )
    if not shapes_fit:
        raise ValueError(
            "hidden [n, d], lm_head_weight [V, d] and targets [n] do not fit: "
            f"{tuple(hidden.shape)}, {tuple(lm_head_weight.shape)}, {tuple(targets.shape)}"
        )
    if lm_head_bias is not None and lm_head_bias.shape != lm_head_weight.shape[:1]:
        raise ValueError(
            f"lm_head_bias [V] does not fit lm_head_weight {tuple(lm_head_weight.shape)}: "
            f"{tuple(lm_head_bias.shape)}"
        )
    outputs = _TokenLogprobs.apply(
        hidden, lm_head_weight, lm_head_bias, targets, temperature, chunk_tokens, transform
    )
    return TokenLogprobs(*outputs)  # pyright: ignore[reportGeneralTypeIssues]


def token_logprobs_of_logits(
    logits: Tensor, targets: Tensor, *, temperature: float
) -> TokenLogprobs:
    """Compute the same values as `token_logprobs` from logits that the model computed itself.

    All n x V logits exist at once. Autograd differentiates the first two.

    Shapes: logits [n, V], targets [n] int64 -> [n], [n], [n].
    """
    scaled = logits.to(work_dtype(logits.dtype)) / temperature
    logs = scaled.log_softmax(dim=1)
    probabilities = logs.exp()
    logprobs = logs.gather(1, targets[:, None])[:, 0]
    # Models mask tokens that they never predict with -inf: 0 log 0 is 0.
    finite = logs.clamp(min=torch.finfo(logs.dtype).min)
    entropies = -torch.linalg.vecdot(probabilities, finite, dim=1)

    with torch.no_grad():
        square = torch.linalg.vecdot(probabilities, probabilities, dim=1)
        norms = (1 - 2 * logprobs.exp() + square).clamp(min=0)
    return TokenLogprobs(logprobs, entropies, norms)


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def scaled_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    transform: LogitTransform,
) -> Tensor:
    """Return z of one chunk in a fresh tile, [c, V] in the work dtype."""
    logits = hidden @ weight.t()
    # One fresh float32 tile per chunk in low precision; in float32 the product itself is changed.
    logits = logits.to(work_dtype(logits.dtype))
    if bias is not None:
        logits += bias
    if transform.scale != 1.0:
        logits *= transform.scale
    if transform.softcap is not None:
        logits.div_(transform.softcap).tanh_().mul_(transform.softcap)
    return logits.div_(temperature) if temperature != 1.0 else logits


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk: int,
        transform: LogitTransform,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = len(hidden)
        work = work_dtype(hidden.dtype)
        logprobs, entropies, norms, normalizers = (
            torch.empty(n, dtype=work, device=hidden.device) for _ in range(4)
        )
        for start in range(0, n, chunk):
            part = slice(start, start + chunk)
            logits = scaled_logits(hidden[part], weight, bias, temperature, transform)
            chosen = logits.gather(1, targets[part, None])[:, 0]

            # One pass over the tile; `total` normalizes what follows instead of the tile itself.
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
            # Rounding can go below 0 where the probability of a token is close to 1.
            norms[part] = (1 - 2 * logprobs[part].exp() + square).clamp(min=0)

        ctx.save_for_backward(hidden, weight, bias, targets, normalizers, entropies)
        ctx.temperature, ctx.chunk, ctx.transform = temperature, chunk, transform
        ctx.mark_non_differentiable(norms)
        return logprobs, entropies, norms

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_logprobs: Tensor, grad_entropies: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizers, entropies = ctx.saved_tensors
        transform: LogitTransform = ctx.transform
        gradient = HeadGradient(hidden, weight, bias)
        use_entropy = bool((grad_entropies != 0).any())

        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = scaled_logits(hidden[part], weight, bias, ctx.temperature, transform)
            # Before the logits are changed in place.
            slope = logit_slope(logits, ctx.temperature, transform)
            logs = logits.sub_(normalizers[part, None])  # log pi
            probabilities = logs.exp()

            grad = probabilities * -grad_logprobs[part, None]
            grad.scatter_add_(1, targets[part, None], grad_logprobs[part, None])
            if use_entropy:
                grad -= grad_entropies[part, None] * probabilities * (logs + entropies[part, None])
            if slope is not None:
                grad *= slope
            gradient.add(part, grad)

        return *gradient.result(), None, None, None, None


class HeadGradient:
    """Gradients of hidden states [n, d], head weight [V, d] and bias [V], from chunks of tokens.

    Those of weight and bias are summed in float32 (float64 for float64 inputs).
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        work = work_dtype(weight.dtype)
        self._inputs = (hidden, weight, bias)
        self._hidden = torch.empty_like(hidden)
        self._weight = torch.zeros(weight.shape, dtype=work, device=weight.device)
        self._bias = None if bias is None else torch.zeros_like(bias, dtype=work)

    def add(self, part: slice, grad: Tensor) -> None:
        """Add the gradient [c, V] with respect to h W^T + b of the tokens `part`."""
        hidden, weight, _ = self._inputs
        if self._bias is not None:
            self._bias += grad.sum(dim=0)

        grad = grad.to(hidden.dtype)
        self._hidden[part] = grad @ weight
        if self._weight.dtype == hidden.dtype:
            self._weight.addmm_(grad.t(), hidden[part])
        else:
            self._weight += grad.t() @ hidden[part]

    def result(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the three gradients in the dtypes of the inputs."""
        _, weight, bias = self._inputs
        grad_bias = None
        if bias is not None and self._bias is not None:
            grad_bias = self._bias.to(bias.dtype)
        return self._hidden, self._weight.to(weight.dtype), grad_bias


def logit_slope(
    logits: Tensor, temperature: float, transform: LogitTransform
) -> Tensor | float | None:
    """Return dz / d(h W^T + b), given z; None where it is 1."""
    factor = transform.scale / temperature
    if transform.softcap is None:
        return None if factor == 1.0 else factor
    return (1 - (logits * (temperature / transform.softcap)) ** 2) * factor
