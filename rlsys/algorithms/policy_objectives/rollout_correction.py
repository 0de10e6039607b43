"""Importance weights that correct the mismatch between engine and trainer."""

from __future__ import annotations

import torch
from torch import Tensor

CORRECTION_LEVELS = ("none", "token", "sequence")


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
        rho = exp(d_t) (token)  or  exp(sum_s d_s) (sequence)
        w = min(rho, cap), and 0 where rho < mask_below or rho > mask_above

    Engine and trainer compute the same policy with different kernels and precisions (and, in
    asynchronous training, with older weights), so tokens come from a slightly different
    distribution than the one that is differentiated. Truncation bounds the variance and biases
    towards the sampler where it binds; masking drops the tokens (or responses) with the largest
    mismatch.

    Source: Yao et al. 2025, Your Efficient RL Framework Secretly Brings You Off-Policy RL Training
    (truncated importance sampling); masking: Liu et al. 2025, When Speed Kills Stability
    (sequence-level masked importance sampling).

    Shapes: [B, T] -> [B, T] float32 or better, no gradient, 0 outside the mask.

    Conventions: truncation is done in log space, before the exponential, so that d of +-80 does not
    overflow; the bounds compare rho before the cap. `none`: 1 on the mask.

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

    old = old_logprobs if old_logprobs.dtype == torch.float64 else old_logprobs.float()
    differences = torch.where(response_mask, (old - rollout_logprobs.to(old.dtype)).detach(), 0.0)
    if level == "none":
        return response_mask.to(differences.dtype)

    logs = differences
    if level == "sequence":
        logs = differences.sum(1, keepdim=True).expand_as(differences)
    weights = logs.clamp(max=float(torch.tensor(cap).log())).exp()

    kept = response_mask
    if mask_below is not None:
        kept = kept & (logs >= torch.tensor(mask_below).log())
    if mask_above is not None:
        kept = kept & (logs <= torch.tensor(mask_above).log())
    return torch.where(kept, weights, 0.0)
