"""Estimators of the KL divergence to the reference policy."""

from __future__ import annotations

from torch import Tensor

KL_KINDS = ("k1", "k2", "k3", "k3_k2")
KL_DIRECTIONS = ("reverse", "forward")


def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, kind: str, *, direction: str = "reverse"
) -> Tensor:
    """Per-token estimate of a KL divergence from tokens that the policy sampled.

        d = logprobs - ref_logprobs,  r = exp(-d)

               reverse: KL(policy || reference)      forward: KL(reference || policy)
        k1     d                                     -r d
        k2     d^2 / 2                               r d^2 / 2
        k3     r - 1 + d                             1 - r - r d
        k3_k2  the value of k3, the gradient of k2

    k1 is unbiased with a large variance and may be negative; k2 is biased with a small variance; k3 is unbiased, has a small
    variance and is never negative. As a loss, only k2 of the reverse direction has the gradient of KL(policy || reference): the
    mean gradient of k1 is 0 and that of k3 belongs to the forward KL. Hence k3_k2.

    Source: Schulman 2020, Approximating KL Divergence. Gradients: Tang and Munos 2025, On a Few Pitfalls in KL Divergence Gradient
    Estimation (arXiv:2506.09477).

    Shapes: any, elementwise.

    Conventions: differentiable in `logprobs`. In float32 exp overflows for d < -88, to inf: such a reference is no reference.

    Raises:
        ValueError: unknown kind or direction, or k3_k2 of the forward direction.
    """
    if direction not in KL_DIRECTIONS:
        raise ValueError(
            f"algorithm.kl.direction: unknown {direction!r}. Choose from {', '.join(KL_DIRECTIONS)}."
        )
    if kind not in KL_KINDS:
        raise ValueError(
            f"algorithm.kl.kind: unknown estimator {kind!r}. Choose from {', '.join(KL_KINDS)}."
        )
    difference = logprobs - ref_logprobs
    if direction == "forward":
        return _forward(difference, kind)
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference**2 / 2
    k3 = (-difference).expm1() + difference
    if kind == "k3":
        return k3
    k2 = difference**2 / 2
    return k3.detach() + (k2 - k2.detach())


def _forward(difference: Tensor, kind: str) -> Tensor:
    if kind == "k3_k2":
        raise ValueError(
            "algorithm.kl.kind: k3_k2 corrects the reverse direction; the forward k1, k2 and k3 need no correction of that kind"
        )
    ratio = (-difference).exp()
    if kind == "k1":
        return -ratio * difference
    return (
        ratio * difference**2 / 2 if kind == "k2" else -(-difference).expm1() - ratio * difference
    )


def adapted_coefficient(
    coefficient: float, kl: float, *, target: float, horizon: float, tokens: float = 1.0
) -> float:
    """The KL coefficient for the next batch, so that the measured KL moves towards `target`.

        beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) tokens / horizon)

    Source: Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences, section 2.2 (arXiv:1909.08593), where n counts
    samples and the horizon is 10,000 of them.

    Conventions: `tokens` and `horizon` count the same thing; here training steps (tokens = 1).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * tokens / horizon)
