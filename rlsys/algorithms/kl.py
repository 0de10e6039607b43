"""Estimators of the KL divergence to the reference policy."""

from __future__ import annotations

from torch import Tensor

KL_KINDS = ("k1", "k2", "k3")


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from tokens that the policy sampled.

        d = logprobs - ref_logprobs
        k1 = d                       unbiased, large variance, may be negative
        k2 = d^2 / 2                 biased, small variance; its gradient is that of the KL
        k3 = exp(-d) - 1 + d         unbiased, small variance, never negative

    Source: Schulman 2020, Approximating KL Divergence.

    Shapes: any, elementwise.

    Conventions: differentiable in `logprobs`; the gradient of k1's mean is 0 in expectation and that of k3 is not the KL's. In
    float32 exp overflows for d < -88, to inf: such a reference is no reference.

    Raises:
        ValueError: unknown kind.
    """
    difference = logprobs - ref_logprobs
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference**2 / 2
    if kind == "k3":
        return (-difference).expm1() + difference
    raise ValueError(f"algorithm.kl.kind: unknown estimator {kind!r}. Choose from {', '.join(KL_KINDS)}.")
