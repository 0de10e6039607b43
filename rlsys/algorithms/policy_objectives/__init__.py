"""Policy objectives: a ratio level composed with a weight function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlsys.algorithms.bounded_ratio import bounded_ratio
from rlsys.algorithms.policy_objectives import (  # noqa: F401  (each registers its weights)
    covariance,
    dppo,
    dro,
    gmpo,
    vespo,
)
from rlsys.algorithms.policy_objectives.minimum_family import register_ratio_curve
from rlsys.algorithms.policy_objectives.ratios import RATIOS, log_ratios, register_ratio
from rlsys.algorithms.policy_objectives.rollout_correction import (
    off_policy_sequence_mask,
    responses_within_kl,
    rollout_correction,
)
from rlsys.algorithms.policy_objectives.weights import (
    WEIGHTS,
    BatchTokens,
    Surrogate,
    TokenTerms,
    batch_parameters_of,
    check_weight,
    chooses_tokens,
    effective_sample_size,
    gradient_coefficient,
    ignores_ratio,
    is_one_at_ratio_one,
    is_zero_at_zero_advantage,
    levels_of,
    register_weight,
)

__all__ = [
    "BatchTokens",
    "PolicyObjectiveInputs",
    "PolicyObjectiveOutput",
    "Surrogate",
    "TokenTerms",
    "available_ratios",
    "available_weights",
    "batch_parameters_of",
    "check_objective",
    "chooses_tokens",
    "effective_sample_size",
    "gradient_coefficient",
    "ignores_ratio",
    "is_one_at_ratio_one",
    "is_zero_at_zero_advantage",
    "levels_of",
    "log_ratios",
    "off_policy_sequence_mask",
    "policy_objective",
    "register_ratio",
    "register_ratio_curve",
    "register_weight",
    "responses_within_kl",
    "rollout_correction",
]


@dataclass(frozen=True, kw_only=True)
class PolicyObjectiveInputs:
    """The inputs of an objective, all [B, T]."""

    logprobs: Tensor  # with gradient
    old_logprobs: Tensor
    advantages: Tensor
    response_mask: Tensor  # bool
    # int64, a different one for each token of the mini-batch, by which a weight knows the tokens
    # that it chose; None: this batch is the whole one
    positions: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class PolicyObjectiveOutput:
    """Unreduced losses (to be minimised) and detached token-level metrics.

    All are [B, T] and 0 outside the mask.
    """

    token_losses: Tensor
    # "ratio": rho_t; "clipped": 1.0 where the weight cut the gradient
    metrics: Mapping[str, Tensor]


def available_ratios() -> tuple[str, ...]:
    """Return the names for `algorithm.objective.ratio`."""
    return RATIOS.names()


def available_weights() -> tuple[str, ...]:
    """Return the names for `algorithm.objective.weight`."""
    return WEIGHTS.names()


def check_objective(ratio: str, weight: str, parameters: Mapping[str, Any]) -> None:
    """Refuse unknown names, parameters and values. Neither function is called.

    Raises:
        ValueError: naming the config field.
    """
    RATIOS.get(ratio, field="algorithm.objective.ratio")
    check_weight(weight, parameters)
    _check_level(ratio, weight)


def _check_level(ratio: str, weight: str) -> None:
    levels = levels_of(weight)
    if levels and ratio not in levels:
        raise ValueError(
            f"algorithm.objective.ratio: {ratio!r} with weight {weight!r}, which is defined for "
            f"{' and '.join(levels)} alone. Set --algorithm.objective.ratio {levels[0]}, or choose "
            "another weight."
        )


def policy_objective(
    inputs: PolicyObjectiveInputs, *, ratio: str, weight: str, **parameters: Any
) -> PolicyObjectiveOutput:
    """Compute the token losses of one objective.

        loss_t = - surrogate(rho_t, A_t)        rho of level `ratio`, surrogate of `weight`

    Shapes: [B, T] -> [B, T]. Gradient flows through `logprobs` alone. At least float32.

    Raises:
        ValueError: unknown ratio, weight or parameter, or a weight that is not defined for this
            ratio level.
    """
    _check_level(ratio, weight)
    mask = inputs.response_mask
    work = torch.float64 if inputs.logprobs.dtype == torch.float64 else torch.float32
    logprobs = torch.where(mask, inputs.logprobs.to(work), 0.0)
    old_logprobs = inputs.old_logprobs.detach().to(work)
    advantages = torch.where(mask, inputs.advantages.detach().to(work), 0.0)

    log_ratio = log_ratios(ratio, logprobs, old_logprobs, mask)
    function = WEIGHTS.get(weight, field="algorithm.objective.weight")
    terms = TokenTerms(log_ratio, advantages, logprobs, mask, inputs.positions)
    surrogate = function(terms, **parameters)

    return PolicyObjectiveOutput(
        token_losses=torch.where(mask, -surrogate.values, 0.0),
        metrics={
            "ratio": torch.where(mask, bounded_ratio(log_ratio.detach()), 0.0),
            "clipped": torch.where(mask, surrogate.clipped.to(work), 0.0),
        },
    )
