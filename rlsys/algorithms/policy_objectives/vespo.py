"""Variational sequence-level soft policy optimization (VESPO)."""

from __future__ import annotations

import torch

from rlsys.algorithms.bounded_ratio import MAX_LOG_RATIO
from rlsys.algorithms.policy_objectives.weights import (
    Surrogate,
    TokenTerms,
    check_width,
    register_weight,
    score,
)


def _validate(**parameters: float) -> None:
    for name, value in parameters.items():
        check_width(name, value)


def _is_constant(**parameters: float) -> bool:
    return not any(parameters.values())


@register_weight(
    "vespo",
    levels=("product",),
    validate=_validate,
    ignores_ratio=_is_constant,
    one_at_ratio_one=True,
    zero_at_zero_advantage=True,
)
def vespo_weight(
    terms: TokenTerms,
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
) -> Surrogate:
    """Return stop(W^k exp(lambda (1 - W))) log pi A: a soft gate on the ratio of a whole response.

    W is the product of the token ratios, without a normalisation by length. The gate has the shape
    of a gamma density: 1 at W = 1, largest at W = k / lambda, and 0 for very small and very large
    W. It follows from the proposal that balances its distance to the old and to the live policy
    under a bound on the variance of W. k and lambda are k_pos and lambda_pos where A >= 0, k_neg
    and lambda_neg elsewhere: with the defaults the gate of negative advantages is narrower below 1
    and wider above.

    Source: Shen et al. 2026, VESPO: Variational Sequence-Level Soft Policy Optimization
    (arXiv:2602.10693); TRL's `loss_type: vespo`, whose defaults these are.

    Shapes: [B, T].

    Conventions: for the ratio level `product` alone. The logarithm of W is capped to [-20, 20], as
    every ratio here; TRL caps it to [log 1e-8, 20], where the gate is 1e-14 and less. The weight of
    a response is also that of each of its tokens, with `token_mean` in TRL.

    Raises:
        ValueError: a parameter below 0.
    """
    _validate(k_pos=k_pos, lambda_pos=lambda_pos, k_neg=k_neg, lambda_neg=lambda_neg)
    logs = terms.log_ratios.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    positive = terms.advantages >= 0
    k = torch.where(positive, logs.new_tensor(k_pos), logs.new_tensor(k_neg))
    rate = torch.where(positive, logs.new_tensor(lambda_pos), logs.new_tensor(lambda_neg))
    # In log space: W itself may be too large for its power.
    gate = (k * logs + rate * -torch.expm1(logs)).exp()
    return score(gate, terms)
