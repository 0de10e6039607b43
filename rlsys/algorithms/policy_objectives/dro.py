"""Direct reward optimization (DRO): a quadratic penalty on the log-ratio."""

from __future__ import annotations

from rlsys.algorithms.policy_objectives.weights import (
    Surrogate,
    TokenTerms,
    check_width,
    register_weight,
    uncut,
)


def _validate(*, beta: float) -> None:
    check_width("beta", beta)


@register_weight(
    "dro",
    validate=_validate,
    ignores_ratio=lambda beta: beta == 0,
    one_at_ratio_one=True,
)
def dro_weight(terms: TokenTerms, *, beta: float = 0.05) -> Surrogate:
    """Return log pi A - beta/2 log(rho)^2: the score function with a pull back to the old policy.

    Its gradient is (A - beta log rho) grad log pi, that of the squared error
    1/(2 beta) (A - beta log rho)^2: the log-ratio is fitted to A / beta. So it needs no importance
    weight: where old exp(A / beta) is a policy, it is the optimum whoever sampled.

    Source: Richemond et al. 2024, Offline Regularised Reinforcement Learning for Large Language
    Models Alignment, equation 4 (arXiv:2405.19107); Kimi Team 2025, section 2.3.2
    (arXiv:2501.12599); Tinker's loss `dro`.

    Shapes: [B, T].

    Conventions: rho is live / old; the paper regresses on the log-ratio to the reference, and has
    the value function V in A = r - V beside it, for which the estimator stands here. With the ratio
    `product` and `sequence_sum` it is the loss of the paper, of whole responses; Tinker penalises
    each token, as the ratio `token`. `beta` is the strength of the pull, the paper's tau. A token
    with A = 0 is pulled back too.

    Raises:
        ValueError: `beta` below 0.
    """
    _validate(beta=beta)
    return uncut(terms.logprobs * terms.advantages - beta / 2 * terms.log_ratios**2)
