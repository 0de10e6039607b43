"""Clip-Cov and KL-Cov: restraints on the tokens that lower the entropy most.

The change of a policy's entropy in an update is, to first order, minus the covariance of
log-probability and advantage. A few tokens have most of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlsys.algorithms.policy_objectives.weights import (
    BatchTokens,
    Surrogate,
    TokenTerms,
    check_width,
    ppo_clip_weight,
    register_weight,
)

FIELD = "algorithm.objective.parameters"
DECIMALS = 9  # to which covariances are compared


def covariances(tokens: BatchTokens) -> Tensor:
    """Return [n] (log pi - mean(log pi)) (A - mean(A)), the means over all n tokens."""
    assert tokens.logprobs is not None, "a weight that chooses tokens gets their log-probs"
    assert tokens.advantages is not None, "and their advantages"
    return _centred(tokens.logprobs.double()) * _centred(tokens.advantages.double())


def _centred(values: Tensor) -> Tensor:
    """Return the values less their mean; exactly 0 where all are equal."""
    moved = values - values[:1]
    return moved - moved.mean()


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(
            f"{FIELD}.fraction: {fraction} is outside (0, 1]. Give the fraction of tokens to "
            "choose, such as 0.0002."
        )


def _check_unset(selected: object) -> None:
    if selected is not None and not isinstance(selected, Tensor):
        raise ValueError(
            f"{FIELD}.selected: {selected!r} cannot be set, since the trainer chooses the tokens "
            "of each mini-batch. Leave it out."
        )


def _count(fraction: float, tokens: int) -> int:
    """Return how many tokens to choose: at least one."""
    return max(1, int(fraction * tokens))


def _validate_clip_cov(
    *,
    clip_low: float,
    clip_high: float,
    fraction: float,
    lowest: float,
    highest: float,
    selected: object = None,
) -> None:
    check_width("clip_low", clip_low, 1.0)
    check_width("clip_high", clip_high)
    _check_fraction(fraction)
    if not lowest < highest:
        raise ValueError(
            f"{FIELD}.lowest: {lowest:g} is not below highest {highest:g}. Give the range of the "
            "covariances to choose from."
        )
    _check_unset(selected)


def _clip_cov_choice(
    tokens: BatchTokens,
    *,
    clip_low: float = 1.0,
    clip_high: float = 1.0,
    fraction: float = 0.0002,
    lowest: float = 1.0,
    highest: float = 5.0,
    selected: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return {"selected": positions}: some tokens with a covariance in the range, at random."""
    assert tokens.positions is not None, "a weight that chooses tokens gets their positions"
    assert tokens.advantages is not None, "and their advantages"
    if selected is not None:
        return {"selected": selected}
    if not len(tokens.positions):
        return {"selected": tokens.positions}

    covariance = covariances(tokens)
    ratios = tokens.log_ratios.exp()
    too_high = (tokens.advantages > 0) & (ratios > 1 + clip_high)
    too_low = (tokens.advantages < 0) & (ratios < 1 - clip_low)
    eligible = (covariance > lowest) & (covariance < highest) & ~(too_high | too_low)

    candidates = tokens.positions[eligible]
    generator = torch.Generator().manual_seed(tokens.seed)
    order = torch.randperm(len(candidates), generator=generator)
    return {"selected": candidates[order[: _count(fraction, len(tokens.positions))]]}


# The keywords are the parameters of a config.
@register_weight(
    "clip_cov",
    batch_parameters=_clip_cov_choice,
    chooses_tokens=True,
    validate=_validate_clip_cov,
    zero_at_zero_advantage=True,
)
def clip_cov_weight(
    terms: TokenTerms,
    *,
    clip_low: float = 1.0,
    clip_high: float = 1.0,
    fraction: float = 0.0002,
    lowest: float = 1.0,
    highest: float = 5.0,
    selected: Tensor | None = None,
) -> Surrogate:
    """Return PPO's clipped surrogate, and 0 for a few random tokens of high covariance.

        cov_t = (log pi(y_t) - mean(log pi)) (A_t - mean(A))
        I     = fraction * n of the tokens with lowest < cov_t < highest, at random
        L_t   = 0 where t is in I, else ppo_clip

    The tokens of I raise the probability of what is likely already, which lowers the entropy; they
    get no gradient in this update.

    Source: Cui et al. 2025, The Entropy Mechanism of Reinforcement Learning for Reasoning Language
    Models, section 4.2 (arXiv:2505.22617), and verl's loss mode `clip_cov`.

    Shapes: [B, T].

    Conventions: the means and n are over all tokens of a mini-batch, over its ranks and packs, with
    the live log-probabilities before the update; at least one token is chosen where one is in the
    range. Tokens that PPO clips are not candidates. `clip_low` and `clip_high` are PPO's widths,
    which the authors widen to 1. `fraction`, `lowest` and `highest` are those of the authors'
    scripts. `selected` is set by the trainer, and None takes the choice from these tokens. The
    choice is another one in every update, and the same one when a run is repeated.

    Raises:
        ValueError: a width below 0, a fraction outside (0, 1], or `lowest` not below `highest`.
    """
    parameters: dict[str, Any] = {
        "clip_low": clip_low,
        "clip_high": clip_high,
        "fraction": fraction,
        "lowest": lowest,
        "highest": highest,
    }
    _validate_clip_cov(**parameters, selected=selected)
    if selected is None:
        selected = _clip_cov_choice(_tokens_of(terms), **parameters)["selected"]
    chosen = _is_selected(terms, selected)
    values, cut = ppo_clip_weight(terms, clip_low=clip_low, clip_high=clip_high)
    return Surrogate(torch.where(chosen, 0.0, values), cut | chosen)


def _validate_kl_cov(*, fraction: float, coefficient: float, selected: object = None) -> None:
    _check_fraction(fraction)
    check_width("coefficient", coefficient)
    _check_unset(selected)


def _kl_cov_choice(
    tokens: BatchTokens,
    *,
    fraction: float = 0.002,
    coefficient: float = 1.0,
    selected: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return {"selected": positions}: the tokens with the largest covariances."""
    assert tokens.positions is not None, "a weight that chooses tokens gets their positions"
    if selected is not None:
        return {"selected": selected}
    if not len(tokens.positions):
        return {"selected": tokens.positions}

    rounded = covariances(tokens).round(decimals=DECIMALS)
    order = torch.argsort(rounded, descending=True, stable=True)
    return {"selected": tokens.positions[order[: _count(fraction, len(order))]]}


@register_weight(
    "kl_cov",
    batch_parameters=_kl_cov_choice,
    chooses_tokens=True,
    validate=_validate_kl_cov,
    one_at_ratio_one=True,
)
def kl_cov_weight(
    terms: TokenTerms,
    *,
    fraction: float = 0.002,
    coefficient: float = 1.0,
    selected: Tensor | None = None,
) -> Surrogate:
    """Return rho A, less a penalty on the drift of the tokens of highest covariance.

        cov_t = (log pi(y_t) - mean(log pi)) (A_t - mean(A))
        I     = the fraction * n tokens with the largest cov_t
        L_t   = rho_t A_t - coefficient |log rho_t| where t is in I, else rho_t A_t

    Source: Cui et al. 2025, The Entropy Mechanism of Reinforcement Learning for Reasoning Language
    Models, section 4.3 (arXiv:2505.22617), and verl's loss mode `kl_cov`.

    Shapes: [B, T].

    Conventions: the paper writes the penalty as KL(old || pi); the authors' code and verl have the
    absolute value of the log-ratio, which is taken here. Nothing is clipped. The means and n are
    over all tokens of a mini-batch, with the live log-probabilities before the update; at least one
    token is chosen, and the first one of those that agree to 9 decimals. `fraction` is 0.002 in the
    authors' script for 7B, and 0.0002 for 32B. `selected` is set by the trainer, and None takes the
    choice from these tokens. The penalty has no gradient at rho = 1, so it acts from the second
    update of a batch on. A chosen token with A = 0 is pulled back too.

    Raises:
        ValueError: a fraction outside (0, 1], or a negative coefficient.
    """
    _validate_kl_cov(fraction=fraction, coefficient=coefficient, selected=selected)
    if selected is None:
        selected = _kl_cov_choice(_tokens_of(terms), fraction=fraction)["selected"]
    penalty = coefficient * terms.log_ratios.abs()
    values = terms.ratios * terms.advantages
    values = torch.where(_is_selected(terms, selected), values - penalty, values)
    return Surrogate(values, torch.zeros_like(values, dtype=torch.bool))


def _positions(terms: TokenTerms) -> Tensor:
    if terms.positions is not None:
        return terms.positions
    return torch.arange(terms.mask.numel(), device=terms.mask.device).reshape(terms.mask.shape)


def _tokens_of(terms: TokenTerms) -> BatchTokens:
    """Return the tokens of a batch that is the whole mini-batch."""
    positions = _positions(terms)[terms.mask].cpu()
    order = positions.argsort()

    def taken(values: Tensor) -> Tensor:
        return values.detach()[terms.mask].cpu()[order]

    return BatchTokens(
        log_ratios=taken(terms.log_ratios),
        logprobs=taken(terms.logprobs),
        advantages=taken(terms.advantages),
        positions=positions[order],
    )


def _is_selected(terms: TokenTerms, selected: Tensor) -> Tensor:
    """Return [B, T] bool at the chosen tokens."""
    positions = _positions(terms)
    return terms.mask & torch.isin(positions, selected.to(positions.device))
