"""Hierarchical token-level baselines: one baseline a layer of the future importance ratio."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rlsys.algorithms.advantages.contract import (
    AdvantageInputs,
    AdvantageOutput,
    register_advantage_estimator,
)
from rlsys.algorithms.advantages.grouping import Groups, at_least_float32, outcome_rewards
from rlsys.algorithms.advantages.hierarchical.baseline_network import BaselineRegression
from rlsys.algorithms.advantages.hierarchical.diagnostics import (
    ONE_A_RESPONSE,
    condition_numbers,
    effective_shares,
    plain_baseline,
    variance_ratios,
)
from rlsys.algorithms.advantages.hierarchical.group_regression import (
    TINY,
    GroupedBatch,
    Solve,
    by_cholesky,
    gauss_seidel,
    group_corrections,
    others_mean,
)
from rlsys.algorithms.advantages.hierarchical.horizons import (
    FIELD,
    Layers,
    check_bounds,
    check_layers,
    log_prefix_ratios,
    prefix_ratios,
    self_normalised,
)
from rlsys.algorithms.advantages.hierarchical.pooled_regression import (
    fold_of_group,
    pooled_corrections,
    start_from,
)
from rlsys.algorithms.advantages.hierarchical.shrinkage import (
    fold_strengths,
    sampled,
    starting_strength,
    tilted_centre,
)

AUTOMATIC_RIDGE = 2.0  # responses; the rest of the shrinkage is the strength. Set with those of `hierarchical_strength`
CHOICES = {
    "output": ("score_weight", "residual"),
    "solver": ("wls", "gauss_seidel", "network"),
    "weights": ("smoothed_score", "score", "ratio_squared", "uniform"),
    "cross_fit": ("leave_one_out", "none"),
    "scope": ("auto", "group", "batch"),
}


def _is_whole_weight(parameters: Mapping[str, Any]) -> bool:
    return parameters.get("output", "score_weight") == "score_weight"


def _validate(
    *,
    layers: str,
    block_size: int,
    ridge: float | None,
    centre: bool,
    max_tokens: int | None,
    log_ratio_clip: float | None,
    ratio_truncation: float | None,
    **more: Any,
) -> None:
    check_layers(layers, max_tokens or 1, block_size)
    check_bounds(log_ratio_clip, ratio_truncation)
    chosen = {name: more[name] for name in CHOICES}
    moving = max_tokens is None and layers in ("blocks", "all")
    for name, value in chosen.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{FIELD}.{name}: {value!r} is none of {', '.join(CHOICES[name])}")
    if ridge is not None and not (ridge >= 0 and math.isfinite(ridge)):
        raise ValueError(
            f"{FIELD}.ridge: {ridge} must be finite and at least 0, or null for automatic"
        )
    if ridge is None and not (centre and chosen["cross_fit"] == "leave_one_out"):
        raise ValueError(
            f"{FIELD}.ridge: automatic shrinkage is towards the leave-one-out mean. With centre false or cross_fit none, set a ridge, e.g. 1.0"
        )
    if moving and chosen["solver"] == "network":
        raise ValueError(
            f"{FIELD}.max_tokens: a network has one output a layer, so their number must not follow the batch. Set max_tokens."
        )
    if chosen["solver"] == "network" and not (ridge is None and centre):
        raise ValueError(
            f"{FIELD}.solver: 'network' fits no ridge and compares with the others' mean. Leave ridge null and centre true."
        )


@register_advantage_estimator(
    "hierarchical",
    needs=("rollout_logprobs", "old_logprobs", "score_norms"),
    compares_group=True,
    importance_corrected=_is_whole_weight,
    validate=_validate,
)
def hierarchical_advantages(
    inputs: AdvantageInputs,
    *,
    layers: str = "current_and_final",
    block_size: int = 256,
    output: str = "score_weight",
    solver: str = "wls",
    weights: str = "smoothed_score",
    cross_fit: str = "leave_one_out",
    scope: str = "auto",
    ridge: float | None = None,
    centre: bool = True,
    fit_ended: bool = False,
    max_tokens: int | None = None,
    log_ratio_clip: float | None = None,
    ratio_truncation: float | None = None,
    self_normalise: bool = False,
    diagnostics: bool = True,
) -> AdvantageOutput:
    """The policy-gradient weight of each token, importance-corrected, less one baseline for each layer of the future ratio.

        W_t = rho_{<=t} Delta_t = rho_{<=L} (R - c) - gamma sum_{s in layers(t)} rho_{<=s} beta_t^(s)
        Delta_t = alpha_t^(L) (R - c) - gamma sum_{s in layers(t)} alpha_t^(s) beta_t^(s),   alpha_t^(s) = rho_{<=s} / rho_{<=t}

    c is the mean reward of the others of the group and beta minimises the second moment of W_t score_t, as a weighted regression that has not
    seen the response. gamma is the strength: 0 gives back leave-one-out (RLOO) with the ratio of the whole response, 1 the regression. With an
    automatic ridge c is moved towards the others' mean weighted by rho_{<=L}^2 and score norm where their rewards clearly follow those weights.

    Source: references/hierarchical_token_baselines.md, (HB), (WLS) and section 8.5; strengths and pooling: docs/hierarchical_baselines.md.

    Shapes: rewards [B], rollout_logprobs, old_logprobs, response_mask [B, T] -> advantages [B, T].

    Conventions:
        layers: `final` (s = L, Seq-IS), `current` (s = t), `current_and_final`, `blocks` (every `block_size` tokens, current and final),
            `all` (every s >= t; at most 512 tokens). The mean of the others stays in the final layer whatever is chosen.
        output: `score_weight` W_t, for an objective without ratio or clip (weight `none`: stop-gradient W_t times log pi), is unbiased;
            `residual` Delta_t, the advantage of a clipped objective, lacks rho_{<=t} of old / rollout and is not, once they differ.
        weights: of the regression of Delta_t: `score` rho_{<=t}^2 times `score_norms` (the variance formula), `smoothed_score` rho_{<=t}^2 times the
            mean of the norm at t and the average norm of the response, `ratio_squared` rho_{<=t}^2, `uniform` 1. Norms count as 1 in a batch
            that has none, except with `score`.
        fit_ended: False leaves responses without a token at t (ended, or a tool's) out of the regression of t, as their score there is 0.
            True lets them take part with their ratio there (not with weights `score`), which raises the variance where length tells something of
            the reward. With weights `ratio_squared` it takes one factorisation a block.
        scope: `group` fits each group by itself, `batch` all other folds of groups together, `auto` adds both, each with its strength.
        ridge: None is automatic: ridge 2, strengths from held-out groups. A number is that ridge at strength 1 (`auto` is then `group`). It counts
            responses with all ratios 1, of a score norm as the others have it on average (to a power of two).
        cross_fit: `none` fits and centres on the response itself too. For comparison: it is **biased**.
        max_tokens: the length over which layers and the positions that strengths are read at are laid. A run sets it to
            `generation.max_tokens` where it is null. None in a call: the length of the longest response, which then has a say in its
            own layers and strengths. Exactly unbiased only with a number.
        centre: False drops c, so that the ridge shrinks towards no baseline at all; needs a `ridge`.
        solver: `gauss_seidel` sweeps over the increments between layers until none moves; same solution as `wls`. The pooled fit starts from
            the coefficients of the last batch, which come with its state.
            `network` takes b from `layer_baselines` times v, the variance of the others' rewards: a network on the policy's hidden
            states that has not seen the batch, with its strength in it (`hierarchical_network`). `scope` and `cross_fit` then mean nothing, as no
            coefficient is fitted; needs `algorithm.advantage.recompute`, since the policy's ranks evaluate and train it.
        Stabilisers, off by default, each biased: `log_ratio_clip` and `ratio_truncation` (towards the sampler's policy),
            `self_normalise` (O(1/G)).
        Groups of one, and groups of equal rewards, get exactly 0. A response gets RLOO's result where all
        others of the batch have only ratios of exactly 1, so on-policy all do. With the least drift the baselines use what length and score norms say.
        Process rewards are summed into the outcome. Computed in float64.

    Example: one group, rewards (1, 0), all ratios 1: c = (0, 1), W = (1, -1) at every token, as in RLOO.

    Raises:
        ValueError: rollout or old log-probabilities missing or not finite, ratios that overflow, an unknown choice or a number out of range.
    """
    _validate(
        layers=layers,
        block_size=block_size,
        output=output,
        solver=solver,
        weights=weights,
        cross_fit=cross_fit,
        scope=scope,
        ridge=ridge,
        centre=centre,
        max_tokens=max_tokens,
        log_ratio_clip=log_ratio_clip,
        ratio_truncation=ratio_truncation,
    )
    _check_inputs(inputs, weights)
    bounds = Bounds(log_ratio_clip, ratio_truncation)
    dtype = at_least_float32(inputs.rewards).dtype
    full, inputs = inputs.response_mask, _trimmed(inputs)
    mask, groups = inputs.response_mask, Groups.of(inputs.group_ids)
    ratios, clipped = _ratios(inputs, bounds, groups, self_normalise)
    if not mask.any():
        return AdvantageOutput(
            advantages=torch.zeros(full.shape, dtype=dtype, device=full.device), state=inputs.state
        )
    places, present = padded_places(groups)
    alive = mask[places] & present[..., None]
    span = _span(mask.shape[1], max_tokens)
    batch = _grouped(
        inputs,
        ratios,
        places,
        present,
        alive,
        Layers.of(layers, span, block_size, mask.device),
        weights,
        centre,
        cross_fit,
    )
    if not fit_ended:
        batch = replace(batch, weights=torch.where(alive, batch.weights, 0.0), steady=False)
    norms = (
        alive.double()
        if inputs.score_norms is None
        else torch.where(alive, inputs.score_norms[places].double(), 0.0)
    )
    solve = _swept if solver == "gauss_seidel" else None
    start = (
        start_from(inputs.state.get("pooled", ()), mask.shape[1], batch.layers) if solve else None
    )
    everywhere = torch.arange(mask.shape[1], device=mask.device)
    regression = BaselineRegression.of(batch, places) if solver == "network" else None
    moved = (
        replace(batch, centre=tilted_centre(batch))
        if ridge is None and regression is None
        else batch
    )
    if regression is not None:
        fitted = Fitted(_learnt(regression, inputs.layer_baselines, places, present))
    elif ridge is None:
        fitted = _automatic(moved, norms, scope, solve, everywhere, start)
    else:
        fitted = _as_told(batch, scope, ridge, cross_fit == "leave_one_out", solve, start)
    correction = fitted.correction + (batch.base - moved.base)[..., None]
    if centre:
        correction = correction * _others_drifted(batch.ratios, alive)[..., None]
    weight = torch.where(alive, batch.base[..., None] - correction, 0.0)
    measured = {"clipped_share": clipped, **fitted.strengths}
    if diagnostics:
        measured |= _diagnostics(batch, norms, weight, inputs, places, block_size, span)
    advantages = torch.zeros(full.shape, dtype=dtype, device=full.device)
    asked = weight / batch.ratios.clamp(min=TINY) if output == "residual" else weight
    advantages[places[present], : mask.shape[1]] = asked[present].to(dtype)
    # a batch that had no use for the pooled fit leaves the coefficients before it to the next
    state = (
        inputs.state
        if solve is None or fitted.pooled is None
        else {"pooled": fitted.pooled.tolist()}
    )
    return AdvantageOutput(
        advantages=advantages, regression=regression, state=state, diagnostics=measured
    )


def _learnt(
    regression: BaselineRegression, baselines: Tensor | None, places: Tensor, present: Tensor
) -> Tensor:
    """[K, G, T] corrections by a network's baselines; 0 where there is no network yet."""
    if baselines is None:
        return regression.base.new_zeros(
            *places.shape, regression.base.shape[1], dtype=torch.float64
        )
    return torch.where(present[..., None], regression.corrections(baselines).double()[places], 0.0)


def _check_inputs(inputs: AdvantageInputs, weights: str) -> None:
    if not torch.isfinite(inputs.rewards).all():
        raise ValueError("rewards: not all are finite")
    norms = inputs.score_norms
    if norms is None:
        if weights == "score":
            raise ValueError(
                f"{FIELD}.weights: 'score' needs score_norms, which this batch does not have. Use 'ratio_squared'."
            )
    elif not (torch.isfinite(norms) & (norms >= 0))[inputs.response_mask].all():
        raise ValueError(
            "score_norms: values inside the response mask must be finite and at least 0"
        )


def _span(longest: int, max_tokens: int | None) -> int:
    if max_tokens is not None and max_tokens < longest:
        raise ValueError(
            f"{FIELD}.max_tokens: {max_tokens} is less than the {longest} tokens of the longest response"
        )
    return longest if max_tokens is None else max_tokens


@dataclass(frozen=True)
class Bounds:
    """What the ratios are held within."""

    log_ratio_clip: float | None
    ratio_truncation: float | None


def _ratios(
    inputs: AdvantageInputs, bounds: Bounds, groups: Groups, self_normalise: bool
) -> tuple[Tensor, float]:
    """[B, T] ratios as the options say, and the share of tokens whose ratio a bound changed."""
    arrays = inputs.rollout_logprobs, inputs.old_logprobs, inputs.response_mask
    held = {"log_ratio_clip": bounds.log_ratio_clip, "ratio_truncation": bounds.ratio_truncation}
    ratios = prefix_ratios(*arrays, **held)
    share = 0.0
    if any(bound is not None for bound in held.values()):
        changed = log_prefix_ratios(*arrays).exp() != ratios
        share = float(changed[inputs.response_mask].double().mean())
    return (self_normalised(ratios, groups) if self_normalise else ratios), share


def _trimmed(inputs: AdvantageInputs) -> AdvantageInputs:
    """Without the columns after the last token of all, which would add layers and sampled positions that mean nothing."""
    mask = inputs.response_mask
    width = int(mask.any(dim=0).nonzero().max()) + 1 if mask.any() else 0
    names = (
        "response_mask",
        "token_rewards",
        "rollout_logprobs",
        "old_logprobs",
        "score_norms",
        "layer_baselines",
    )
    cut = {name: array[:, :width] for name in names if (array := getattr(inputs, name)) is not None}
    return replace(inputs, **cut, ref_logprobs=None, values=None)


def padded_places(groups: Groups) -> tuple[Tensor, Tensor]:
    """[K, G] which response stands at each place of groups padded to the largest, and whether one does (if not, some response is named)."""
    order = torch.argsort(groups.index, stable=True)
    starts = groups.counts.cumsum(0) - groups.counts
    slots = torch.arange(int(groups.counts.max()), device=order.device)
    present = slots < groups.counts[:, None]
    return order[(starts[:, None] + slots).clamp(max=len(order) - 1)], present


def _grouped(
    inputs: AdvantageInputs,
    ratios: Tensor,
    places: Tensor,
    present: Tensor,
    alive: Tensor,
    layers: Layers,
    weights: str,
    centred: bool,
    cross_fit: str,
) -> GroupedBatch:
    """The batch in groups, with the weights and the centre of its regressions."""
    padded = torch.where(present[..., None], ratios[places], 0.0)
    rewards = outcome_rewards(inputs.rewards, inputs.token_rewards, inputs.response_mask).double()[
        places
    ]
    if centred:
        rewards = (
            rewards - rewards[:, :1]
        )  # changes nothing but rounding: equal rewards are now exactly 0
    rewards = torch.where(present, rewards, 0.0)
    centre = torch.zeros_like(rewards)
    if centred and cross_fit == "leave_one_out":
        centre = others_mean(rewards, present)
    elif centred:
        centre = (rewards.sum(dim=1, keepdim=True) / present.sum(dim=1, keepdim=True)).expand_as(
            rewards
        )
    # the regression is of rho_{<=t} Delta_t: its weights are those of Delta_t over rho_{<=t}^2
    mass = None
    if weights in ("score", "smoothed_score") and inputs.score_norms is not None:
        of_weight = torch.where(alive, inputs.score_norms[places].double(), 0.0)
        mass = torch.stack([of_weight.sum(dim=2), alive.sum(dim=2).double()], dim=-1)
        if weights == "smoothed_score":
            of_weight = (of_weight + mass[..., :1] / mass[..., 1:].clamp(min=1)) / 2
    else:
        of_weight = (
            padded.clamp(min=TINY) ** -2 if weights == "uniform" else torch.ones_like(padded)
        )
    return GroupedBatch(
        padded,
        rewards,
        centre,
        present,
        torch.where(present[..., None], of_weight, 0.0),
        layers,
        steady=mass is None and weights != "uniform",
        mass=mass,
    )


def _others_drifted(ratios: Tensor, alive: Tensor) -> Tensor:
    """[K, G] 1.0 where any other response of the batch has a ratio other than 1: what decides has not seen the response either."""
    drifted = ((ratios != 1) & alive).any(dim=2)
    return (drifted.sum() - drifted.int() > 0).double()


@dataclass(frozen=True)
class Fitted:
    """What the layers add to the centre."""

    correction: Tensor  # [K, G, t]
    strengths: Mapping[str, float] = field(default_factory=dict)
    pooled: Tensor | None = None  # [t, p] mean coefficients of the pooled fits, if there were any


def _as_told(
    batch: GroupedBatch,
    scope: str,
    ridge: float,
    left_out: bool,
    solve: Solve | None,
    start: Tensor | None,
) -> Fitted:
    """At strength 1 with one ridge for all."""
    positions = torch.arange(batch.ratios.shape[2], device=batch.ratios.device)
    if scope == "batch":
        correction, pooled = pooled_corrections(
            batch, positions, ridge, solve or by_cholesky, left_out=left_out, start=start
        )
        return Fitted(correction, pooled=pooled)
    return Fitted(group_corrections(batch, positions, ridge, left_out=left_out, solve=solve))


def _automatic(
    batch: GroupedBatch,
    norms: Tensor,
    scope: str,
    solve: Solve | None,
    positions: Tensor,
    start: Tensor | None = None,
) -> Fitted:
    """Of both scopes, each at the strength that responses it is not used on allow."""
    groups = len(batch.rewards)
    correction, coefficients = torch.zeros_like(batch.ratios[:, :, positions]), None
    if groups == 1:
        own = starting_strength(batch.present.sum(dim=1, keepdim=True).double()) * (
            scope != "batch"
        )
        pooled = own.new_zeros(1)
    else:
        both = fold_strengths(
            batch, norms, AUTOMATIC_RIDGE, pooled=scope != "group", own=scope != "batch"
        )
        own, pooled = both[fold_of_group(groups, positions.device), 1][:, None], both[:, 0]
    if (own > 0).any():
        correction = own[..., None] * group_corrections(
            batch, positions, AUTOMATIC_RIDGE, solve=solve
        )
    if (pooled > 0).any():
        shared, coefficients = pooled_corrections(
            batch, positions, AUTOMATIC_RIDGE, solve or by_cholesky, strengths=pooled, start=start
        )
        correction += shared
    return Fitted(
        correction,
        {"strength_group": float(own.mean()), "strength_batch": float(pooled.mean())},
        coefficients,
    )


def _diagnostics(
    batch: GroupedBatch,
    norms: Tensor,
    weight: Tensor,
    inputs: AdvantageInputs,
    places: Tensor,
    block_size: int,
    span: int,
) -> dict[str, float]:
    """Variance ratios to the leave-one-out mean of every baseline and layer set, effective sample size and condition, at a few positions."""
    at = sampled(batch)
    n, alive = norms[:, :, at], inputs.response_mask[places] & batch.present[..., None]
    rewards = (
        outcome_rewards(inputs.rewards, inputs.token_rewards, inputs.response_mask).double()[places]
        * batch.present
    )
    weights = {name: plain_baseline(name, batch, n, rewards) for name in ONE_A_RESPONSE} | {
        "used": weight[:, :, at]
    }
    shifted = rewards - rewards[:, :1] * batch.present
    centred = replace(batch, rewards=shifted, centre=others_mean(shifted, batch.present))
    centred = replace(centred, centre=tilted_centre(centred))
    for name in ("final", "current", "current_and_final", "blocks"):
        other = replace(centred, layers=Layers.of(name, span, block_size, weight.device))
        weights[name] = (
            other.base[..., None] - _automatic(other, norms, "auto", None, at).correction
        )
    ratios = variance_ratios(weights, n)
    return {f"variance_ratio/{name}": ratio for name, ratio in ratios.items()} | {
        "won": float(ratios["used"] < 1),
        **effective_shares(batch.ratios, alive),
        "condition_number": float(condition_numbers(batch, at).median()),
    }


def _swept(gram: Tensor, moment: Tensor, start: Tensor | None) -> Tensor:
    return gauss_seidel(gram, moment, start=start)[0]
