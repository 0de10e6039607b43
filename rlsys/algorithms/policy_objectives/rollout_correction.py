"""Corrections of the mismatch between the policy that sampled and the policy that is trained.

rollout_correction         importance weights, truncated or masked
responses_within_kl        rejection of responses that are too far from the sampler
off_policy_sequence_mask   rejection of those among them whose advantage is negative
"""

from __future__ import annotations

import torch
from torch import Tensor

CORRECTION_LEVELS = ("none", "token", "sequence", "geometric")
SEQUENCE_KL_ESTIMATORS = ("k1", "k2", "k3")


def rollout_correction(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    response_mask: Tensor,
    *,
    level: str,
    cap: float = 2.0,
    mask_below: float | None = None,
    mask_above: float | None = None,
) -> Tensor:
    """Compute importance weights that multiply the token losses of any objective.

        d_t = old_logprobs_t - rollout_logprobs_t
        rho = exp(d_t) (token)  or  exp(sum_s d_s) (sequence)  or  exp(mean_s d_s) (geometric)
        w = min(rho, cap), and 0 where rho < mask_below or rho > mask_above

    Engine and trainer compute the same policy with different kernels and precisions (and, in
    asynchronous training, with older weights), so tokens come from a slightly different
    distribution than the one that is differentiated. Truncation bounds the variance and biases
    towards the sampler where it binds; masking drops the tokens (or responses) with the largest
    mismatch. The geometric mean does not shrink or grow with the length of a response, so one band
    fits all lengths; as a weight it is biased.

    IcePop is level token with mask_below 0.5, mask_above 5 and a cap of 5, which then never binds.

    Source: Yao et al. 2025, Your Efficient RL Framework Secretly Brings You Off-Policy RL Training
    (truncated importance sampling); masking: Liu et al. 2025, When Speed Kills Stability
    (sequence-level masked importance sampling, and the geometric mean); IcePop: Zhao et al. 2025,
    Small Leak Can Sink a Great Ship.

    Shapes: [B, T] -> [B, T] float32 or better, no gradient, 0 outside the mask.

    Conventions: truncation is done in log space, before the exponential, so that d of +-80 does not
    overflow; the bounds compare rho before the cap. `none`: 1 on the mask. A token of weight 0 has
    no objective; it keeps its KL and entropy terms, and counts where losses are averaged.

    Raises:
        ValueError: unknown level, cap not positive, or an empty band.
    """
    if level not in CORRECTION_LEVELS:
        raise ValueError(
            f"algorithm.rollout_correction.level: unknown {level!r}. Choose from "
            f"{', '.join(CORRECTION_LEVELS)}."
        )
    if cap <= 0:
        raise ValueError(f"algorithm.rollout_correction.cap: {cap} must be above 0")
    if mask_below is not None and mask_above is not None and mask_below >= mask_above:
        raise ValueError(
            f"algorithm.rollout_correction.mask_below: {mask_below} is not below mask_above "
            f"{mask_above}"
        )

    differences = _differences(old_logprobs, rollout_logprobs, response_mask)
    if level == "none":
        return response_mask.to(differences.dtype)

    logs = differences
    if level == "sequence":
        logs = differences.sum(1, keepdim=True).expand_as(differences)
    elif level == "geometric":
        logs = _mean_of_response(differences, response_mask).expand_as(differences)
    weights = logs.clamp(max=float(torch.tensor(cap).log())).exp()

    kept = response_mask
    if mask_below is not None:
        kept = kept & (logs >= torch.tensor(mask_below).log())
    if mask_above is not None:
        kept = kept & (logs <= torch.tensor(mask_above).log())
    return torch.where(kept, weights, 0.0)


def responses_within_kl(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    response_mask: Tensor,
    *,
    estimator: str,
    threshold: float,
) -> Tensor:
    """Compute which responses are close enough to the policy that sampled them.

        d_t = old_logprobs_t - rollout_logprobs_t
        k1 = -d_t,  k2 = d_t^2 / 2,  k3 = exp(d_t) - 1 - d_t
        kept where mean_t k(t) <= threshold

    The mean over the tokens of a response estimates KL(rollout || old) per token. k1 is unbiased
    and of either sign, k3 is unbiased and never negative, k2 is biased and has the lowest variance.

    Source: Schulman 2020, Approximating KL Divergence (estimators); Liu et al. 2025, When Speed
    Kills Stability (rejection by the mismatch of a sequence).

    Shapes: [B, T] -> [B, T] bool, the same for all tokens of a response, False outside the mask.

    Raises:
        ValueError: unknown estimator.
    """
    if estimator not in SEQUENCE_KL_ESTIMATORS:
        raise ValueError(
            f"algorithm.rollout_correction.sequence_kl: unknown {estimator!r}. Choose from "
            f"{', '.join(SEQUENCE_KL_ESTIMATORS)}."
        )

    d = _differences(old_logprobs, rollout_logprobs, response_mask)
    if estimator == "k1":
        terms = -d
    elif estimator == "k2":
        terms = d.square() / 2
    else:
        terms = d.expm1() - d

    divergence = _mean_of_response(terms, response_mask)
    return (divergence <= threshold) & response_mask


def off_policy_sequence_mask(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    threshold: float,
) -> Tensor:
    """Compute which tokens remain when far responses with a negative advantage are masked out.

        dropped where A_t < 0  and  mean_s (rollout_logprobs_s - logprobs_s) > threshold

    The live policy has moved away from a response with a large mean: it would hardly sample it any
    more. A negative advantage would push it further away, with a large and useless gradient.

    Source: DeepSeek-AI 2025, DeepSeek-V3.2 (arXiv:2512.02556), section 3.1, off-policy sequence
    masking.

    Args:
        logprobs: of the live policy; no gradient flows through them.

    Shapes: [B, T] -> [B, T] bool, False outside the mask.
    """
    away = -_differences(logprobs, rollout_logprobs, response_mask)
    far = _mean_of_response(away, response_mask) > threshold
    return response_mask & ~(far & (advantages < 0))


def _differences(logprobs: Tensor, rollout_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """Return [B, T] log-probabilities less those of the rollout, detached, 0 outside the mask."""
    policy = logprobs if logprobs.dtype == torch.float64 else logprobs.float()
    return torch.where(response_mask, (policy - rollout_logprobs.to(policy.dtype)).detach(), 0.0)


def _mean_of_response(values: Tensor, response_mask: Tensor) -> Tensor:
    """Return [B, 1] the mean over the tokens of each response; 0 for one without tokens."""
    counts = response_mask.sum(1, keepdim=True).clamp(min=1)
    return torch.where(response_mask, values, 0.0).sum(1, keepdim=True) / counts
