"""Divergence proximal policy optimization (DPPO): a trust region in probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.algorithms.policy_objectives.weights import (
    Surrogate,
    TokenTerms,
    check_width,
    register_weight,
    score,
)


def _validate(*, delta_low: float, delta_high: float, cap: float) -> None:
    check_width("delta_low", delta_low)
    check_width("delta_high", delta_high)
    if cap < 1:
        raise ValueError(
            f"algorithm.objective.parameters.cap: {cap} must be at least 1, so that the ratio 1 is "
            "not reduced"
        )


@register_weight(
    "dppo_tv",
    levels=("token",),
    validate=_validate,
    one_at_ratio_one=True,
    zero_at_zero_advantage=True,
)
def dppo_tv_weight(
    terms: TokenTerms, *, delta_low: float = 0.15, delta_high: float = 0.15, cap: float = 20.0
) -> Surrogate:
    """Return stop(min(rho, cap)) log pi A, without the tokens outside a region of total variation.

        D_t = |pi(y_t) - old(y_t)|

    A token has no gradient once A > 0, pi(y_t) > old(y_t) and D_t > delta_high, or A < 0,
    pi(y_t) < old(y_t) and D_t > delta_low. D_t is the total variation between the two policies
    reduced to two outcomes, the sampled token and all others, and a lower bound of theirs. PPO's
    ratio stops rare tokens early, whose probability hardly moves, and likely ones late.

    Source: Qi et al. 2026, Rethinking the Trust Region in LLM Reinforcement Learning, the binary
    approximation (arXiv:2602.04879); TRL's DPPOTrainer, `divergence_type: binary_tv`.

    Shapes: [B, T].

    Conventions: the region is around `old`, as every ratio here, where the paper has the policy
    that sampled; with one engine version per batch they differ by the mismatch of engine and
    trainer, for which there is `algorithm.rollout_correction`. `delta_low` and `delta_high` are
    probabilities, 0.15 in the paper. `cap` bounds the ratio, as TRL does. The top-K approximation
    needs the engine's probabilities of K tokens and is not here. For the ratio level `token`.

    Raises:
        ValueError: a threshold below 0, or a cap below 1.
    """
    _validate(delta_low=delta_low, delta_high=delta_high, cap=cap)
    live, old = _log_probabilities(terms)
    divergence = (live.exp() - old.exp()).abs()
    return _masked(terms, divergence, delta_low, delta_high, cap)


@register_weight(
    "dppo_kl",
    levels=("token",),
    validate=_validate,
    one_at_ratio_one=True,
    zero_at_zero_advantage=True,
)
def dppo_kl_weight(
    terms: TokenTerms, *, delta_low: float = 0.05, delta_high: float = 0.05, cap: float = 20.0
) -> Surrogate:
    """Return stop(min(rho, cap)) log pi A, without the tokens outside a region of KL divergence.

        D_t = q log(q / p) + (1 - q) log((1 - q) / (1 - p)),    q = old(y_t), p = pi(y_t)

    The rest is that of `dppo_tv`: D_t is KL(old || pi) of the sampled token against all others.

    Source: Qi et al. 2026, Rethinking the Trust Region in LLM Reinforcement Learning, the binary
    approximation (arXiv:2602.04879); TRL's DPPOTrainer, `divergence_type: binary_kl`.

    Shapes: [B, T].

    Conventions: as in `dppo_tv`. `delta_low` and `delta_high` are in nats, 0.05 in the paper. The
    probability of the other tokens is computed as -expm1(log p), without the loss of digits of
    1 - p, and is at least the smallest positive number.

    Raises:
        ValueError: a threshold below 0, or a cap below 1.
    """
    _validate(delta_low=delta_low, delta_high=delta_high, cap=cap)
    live, old = _log_probabilities(terms)
    same = old.exp() * (old - live)
    other = -torch.expm1(old) * (_log_complement(old) - _log_complement(live))
    return _masked(terms, same + other, delta_low, delta_high, cap)


def _log_probabilities(terms: TokenTerms) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of the live and of the old policy, without gradient."""
    live = terms.logprobs.detach()
    # Rounding of the log-ratio may take the old one above 0.
    return live.clamp(max=0.0), (live - terms.log_ratios.detach()).clamp(max=0.0)


def _log_complement(logprobs: Tensor) -> Tensor:
    """Return log(1 - p)."""
    return (-torch.expm1(logprobs)).clamp(min=torch.finfo(logprobs.dtype).tiny).log()


def _masked(
    terms: TokenTerms, divergence: Tensor, delta_low: float, delta_high: float, cap: float
) -> Surrogate:
    """Return the capped importance weight, 0 where an update would leave the region further."""
    logs, advantages = terms.log_ratios.detach(), terms.advantages
    outside_above = (advantages > 0) & (logs > 0) & (divergence > delta_high)
    outside_below = (advantages < 0) & (logs < 0) & (divergence > delta_low)
    outside = outside_above | outside_below

    weight = torch.where(outside, 0.0, terms.ratios.clamp(max=cap))
    return Surrogate(score(weight, terms).values, outside)
