"""Hierarchical token-level baselines: one baseline a layer of the future importance ratio."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.algorithms.advantages.baseline_variance import baseline_diagnostics
from rlsys.algorithms.advantages.grouping import Groups, outcome_rewards
from rlsys.algorithms.advantages.hierarchical_fits import (
    TINY,
    GroupedBatch,
    Solve,
    by_cholesky,
    gauss_seidel,
    group_corrections,
    others_mean,
)
from rlsys.algorithms.advantages.hierarchical_layers import FIELD, Layers, prefix_ratios, self_normalised
from rlsys.algorithms.advantages.hierarchical_pooling import fold_of_group, pooled_corrections
from rlsys.algorithms.advantages.hierarchical_strength import fold_strengths, lone_group_strengths
from rlsys.algorithms.advantages.inputs import AdvantageInputs, AdvantageOutput, register_advantage_estimator

AUTOMATIC_RIDGE = 1.0  # responses; the rest of the shrinkage is the strength
CHOICES = {
    "output": ("score_weight", "residual"),
    "solver": ("wls", "gauss_seidel"),
    "weights": ("ratio_squared", "uniform", "score", "tempered"),
    "cross_fit": ("leave_one_out", "none"),
    "scope": ("auto", "group", "batch"),
}


@dataclass
class WarmStart:
    """Where Gauss-Seidel starts the pooled fit of the next batch: the coefficients of the last. Keep one and pass it with every batch."""

    coefficients: dict[tuple[int, ...], Tensor] | None = None


@register_advantage_estimator("hierarchical")
def hierarchical_advantages(
    inputs: AdvantageInputs,
    *,
    layers: str = "current_and_final",
    block_size: int = 256,
    output: str = "score_weight",
    solver: str = "wls",
    weights: str = "ratio_squared",
    cross_fit: str = "leave_one_out",
    scope: str = "auto",
    ridge: float | None = None,
    centre: bool = True,
    log_ratio_clip: float | None = None,
    ratio_truncation: float | None = None,
    self_normalise: bool = False,
    diagnostics: bool = True,
    warm_start: WarmStart | None = None,
) -> AdvantageOutput:
    """The policy-gradient weight of each token, importance-corrected, less one baseline for each layer of the future ratio.

        W_t = rho_{<=t} Delta_t = rho_{<=L} (R - c) - gamma sum_{s in layers(t)} rho_{<=s} beta_t^(s)
        Delta_t = alpha_t^(L) R - sum_s alpha_t^(s) (beta_t^(s) of which c is part where s = L),   alpha_t^(s) = rho_{<=s} / rho_{<=t}

    c is the mean reward of the others of the group and beta minimises the second moment of W_t score_t, as a weighted regression that has not
    seen the response. gamma is the strength: 0 gives back leave-one-out (RLOO) with the ratio of the whole response, 1 the regression.

    Source: references/hierarchical_token_baselines.md, (HB), (WLS) and section 8.5; strengths and pooling: docs/hierarchical_baselines.md.

    Shapes: rewards [B], rollout_logprobs, old_logprobs, response_mask [B, T] -> advantages [B, T] float32.

    Conventions:
        layers: `final` (s = L, Seq-IS), `current` (s = t), `current_and_final`, `blocks` (every `block_size` tokens, current and final),
            `all` (every s >= t; at most 512 tokens). The mean of the others stays in the final layer whatever is chosen.
        output: `score_weight` W_t, for an objective without ratio or clip (weight `none`: stop-gradient W_t times log pi), is unbiased;
            `residual` Delta_t, the advantage of a clipped objective, is not once the objective clips or weights by another ratio.
        weights: of the regression of Delta_t: `ratio_squared` rho_{<=t}^2 (the variance formula without score norms), `score` that times
            `score_norms`, `uniform` 1, `tempered` rho_{<=t}^2 2 / (1 + rho_{<=L}), steadier where few responses have most of the weight.
        scope: `group` fits each group by itself, `batch` all other folds of groups together, `auto` adds both, each with its strength.
        ridge: None is automatic: ridge 1, strengths from held-out responses. A number is that ridge at strength 1 (`auto` is then `group`).
        cross_fit: `none` fits and centres on the response itself too. For comparison: it is **biased**.
        centre: False drops c, so that the ridge shrinks towards no baseline at all; needs a `ridge`.
        solver: `gauss_seidel` sweeps over the layers, from `warm_start` where the batch before left one; same solution as `wls`.
        Stabilisers, off by default, each biased: `log_ratio_clip` and `ratio_truncation` (towards the sampler's policy),
            `self_normalise` (O(1/G)).
        Groups of one, and groups of equal rewards, get exactly 0. With all ratios 1 the result is RLOO's, except with weights `score`, where it
        is a shrunk optimal token baseline. Process rewards are summed into the outcome. Computed in float64.

    Example: one group, rewards (1, 0), all ratios 1: c = (0, 1), W = (1, -1) at every token, as in RLOO.

    Raises:
        ValueError: rollout or old log-probabilities missing or not finite, ratios that overflow, an unknown choice or a number out of range.
    """
    _check(
        output=output, solver=solver, weights=weights, cross_fit=cross_fit, scope=scope, ridge=ridge, centre=centre, inputs=inputs
    )
    mask, groups = inputs.response_mask, Groups.of(inputs.group_ids)
    bounds = {"log_ratio_clip": log_ratio_clip, "ratio_truncation": ratio_truncation}
    ratios = prefix_ratios(inputs.rollout_logprobs, inputs.old_logprobs, mask, **bounds)
    clipped = float((ratios != prefix_ratios(inputs.rollout_logprobs, inputs.old_logprobs, mask))[mask].double().mean()) if any(
        bounds.values()
    ) else 0.0
    ratios = self_normalised(ratios, groups) if self_normalise else ratios
    if mask.numel() == 0:
        return AdvantageOutput(advantages=ratios.float())
    places, present = padded_places(groups)
    alive = mask[places] & present[..., None]
    batch = _grouped(inputs, ratios, places, present, alive, Layers.of(layers, mask.shape[1], block_size), weights, centre, cross_fit)
    norms = alive.double() if inputs.score_norms is None else torch.where(alive, inputs.score_norms[places].double(), 0.0)
    solve = _sweeper(warm_start) if solver == "gauss_seidel" else None
    if ridge is None:
        correction, strengths = _automatic(batch, norms, scope, solve)
    else:
        correction, strengths = _as_told(batch, scope, ridge, cross_fit == "leave_one_out", solve), {}
    padded = torch.where(alive, batch.base[..., None] - correction, 0.0)
    padded = padded / batch.ratios.clamp(min=TINY) if output == "residual" else padded
    advantages = torch.zeros_like(ratios)
    advantages[places[present]] = padded[present]
    measured = {"clipped_share": clipped, **strengths}
    if diagnostics:
        weight = torch.where(alive, batch.base[..., None] - correction, 0.0)
        measured |= baseline_diagnostics(batch, weight, norms, outcome_rewards(inputs.rewards, inputs.token_rewards, mask)[places].double())
    return AdvantageOutput(advantages=advantages.float(), diagnostics=measured)


hierarchical_advantages.needs_old_logprobs = True  # type: ignore[attr-defined]


def _check(*, ridge: float | None, centre: bool, inputs: AdvantageInputs, **chosen: str) -> None:
    for name, value in chosen.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{FIELD}.{name}: {value!r} is none of {', '.join(CHOICES[name])}")
    if ridge is not None and not (ridge >= 0 and math.isfinite(ridge)):
        raise ValueError(f"{FIELD}.ridge: {ridge} must be finite and at least 0, or null for automatic")
    if ridge is None and not (centre and chosen["cross_fit"] == "leave_one_out"):
        raise ValueError(
            f"{FIELD}.ridge: automatic shrinkage is towards the leave-one-out mean. With centre false or cross_fit none, set a ridge, e.g. 1.0"
        )
    if not torch.isfinite(inputs.rewards).all():
        raise ValueError("rewards: not all are finite")
    norms = inputs.score_norms
    if norms is None:
        if chosen["weights"] == "score":
            raise ValueError(f"{FIELD}.weights: 'score' needs score_norms, which this batch does not have. Use 'ratio_squared'.")
    elif not (torch.isfinite(norms) & (norms >= 0))[inputs.response_mask].all():
        raise ValueError("score_norms: values inside the response mask must be finite and at least 0")


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
    rewards = outcome_rewards(inputs.rewards, inputs.token_rewards, inputs.response_mask).double()[places]
    if centred:
        rewards = rewards - rewards[:, :1]  # changes nothing but rounding: equal rewards are now exactly 0
    rewards = torch.where(present, rewards, 0.0)
    centre = torch.zeros_like(rewards)
    if centred and cross_fit == "leave_one_out":
        centre = others_mean(rewards, present)
    elif centred:
        centre = (rewards.sum(dim=1, keepdim=True) / present.sum(dim=1, keepdim=True)).expand_as(rewards)
    # the regression is of rho_{<=t} Delta_t: its weights are those of Delta_t over rho_{<=t}^2
    if weights == "score":
        assert inputs.score_norms is not None
        of_weight = inputs.score_norms[places].double()
    elif weights == "tempered":
        of_weight = 2 / (1 + padded[:, :, -1:])
    else:
        of_weight = padded.clamp(min=TINY) ** -2 if weights == "uniform" else torch.ones_like(padded)
    return GroupedBatch(padded, rewards, centre, present, torch.where(alive, of_weight, 0.0), layers)


def _as_told(batch: GroupedBatch, scope: str, ridge: float, left_out: bool, solve: Solve | None) -> Tensor:
    """[K, G, T] corrections at strength 1 with one ridge for all."""
    positions = torch.arange(batch.ratios.shape[2], device=batch.ratios.device)
    if scope == "batch":
        return pooled_corrections(batch, positions, ridge, solve or by_cholesky, left_out=left_out)
    return group_corrections(batch, positions, ridge, left_out=left_out, solve=solve)


def _automatic(batch: GroupedBatch, norms: Tensor, scope: str, solve: Solve | None) -> tuple[Tensor, dict[str, float]]:
    """[K, G, T] corrections of both scopes, each at the strength that responses it is not used on allow, and those strengths."""
    groups, _, length = batch.ratios.shape
    positions = torch.arange(length, device=batch.ratios.device)
    correction = torch.zeros_like(batch.ratios)
    if groups == 1:
        own = lone_group_strengths(batch, norms, AUTOMATIC_RIDGE) * (scope != "batch")
        pooled = own.new_zeros(1)
    else:
        both = fold_strengths(batch, norms, AUTOMATIC_RIDGE, pooled=scope != "group", own=scope != "batch")
        own, pooled = both[fold_of_group(groups, positions.device), 1][:, None], both[:, 0]
    if (own > 0).any():
        correction = own[..., None] * group_corrections(batch, positions, AUTOMATIC_RIDGE, solve=solve)
    if (pooled > 0).any():
        correction += pooled_corrections(batch, positions, AUTOMATIC_RIDGE, solve or by_cholesky, strengths=pooled)
    return correction, {"strength_group": float(own.mean()), "strength_batch": float(pooled.mean())}


def _sweeper(memory: WarmStart | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Gauss-Seidel as a solver of pooled fits ([t, p], started where `memory` has one of that shape and kept there) and of group fits."""

    def solve(gram: Tensor, moment: Tensor) -> Tensor:
        known = None if memory is None or memory.coefficients is None else memory.coefficients.get(tuple(moment.shape))
        beta, _ = gauss_seidel(gram, moment, start=known)
        if memory is not None and moment.ndim == 2:
            memory.coefficients = {**(memory.coefficients or {}), tuple(moment.shape): beta}
        return beta

    return solve
