"""Hierarchical token-level baselines: one for each horizon of the importance ratio."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlsys.algorithms.advantages.contract import (
    AdvantageInputs,
    AdvantageOutput,
    register_advantage_estimator,
)
from rlsys.algorithms.advantages.grouping import (
    Groups,
    at_least_float32,
    others_mean,
    outcome_rewards,
)
from rlsys.algorithms.advantages.hierarchical.baseline_network import (
    BaselineRegression,
    LearnedBaselines,
)
from rlsys.algorithms.advantages.hierarchical.diagnostics import (
    PLAIN_BASELINES,
    condition_numbers,
    effective_fractions,
    plain_baseline,
    variance_ratios,
)
from rlsys.algorithms.advantages.hierarchical.grouped_batch import (
    GroupedBatch,
    Places,
    group_batch,
)
from rlsys.algorithms.advantages.hierarchical.horizons import (
    FIELD,
    Horizons,
    check_horizons,
    check_log_ratio_clip,
    prefix_ratios,
)
from rlsys.algorithms.advantages.hierarchical.shrinkage import (
    Fitted,
    fit_automatically,
    fit_with_ridge,
    sampled,
    weighted_baseline,
)

if TYPE_CHECKING:
    from rlsys.config import RunConfig

SOLVERS = ("least_squares", "network")
SCOPES = ("auto", "group", "batch")


def _by_network(parameters: Mapping[str, Any]) -> bool:
    return parameters.get("solver") == "network"


def _check(config: RunConfig) -> Iterator[str]:
    """Yield the settings that `solver: network` contradicts."""
    if not _by_network(config.algorithm.advantage.parameters):
        return
    if not config.algorithm.advantage.recompute:
        yield (
            f"{FIELD}.solver: 'network' is evaluated and trained by the policy's ranks, before "
            "each mini-batch. Set algorithm.advantage.recompute true."
        )
    if config.policy.epochs > 1:
        yield (
            f"policy.epochs: in the second of {config.policy.epochs} epochs the baseline network "
            "would have seen the responses it is used on, which is biased. Set it to 1, or another "
            f"{FIELD}.solver."
        )


def _validate(
    *,
    horizons: str,
    block_size: int,
    solver: str,
    scope: str,
    ridge: float | None,
    max_tokens: int | None,
    log_ratio_clip: float | None,
    **_: object,
) -> None:
    check_horizons(horizons, max_tokens or 1, block_size)
    check_log_ratio_clip(log_ratio_clip)
    for name, value, known in (("solver", solver, SOLVERS), ("scope", scope, SCOPES)):
        if value not in known:
            raise ValueError(f"{FIELD}.{name}: {value!r} is not one of {', '.join(known)}")
    if ridge is not None and not (ridge >= 0 and math.isfinite(ridge)):
        raise ValueError(
            f"{FIELD}.ridge: {ridge} must be finite and at least 0, or null for automatic"
        )
    if solver != "network":
        return
    if max_tokens is None and horizons in ("blocks", "all"):
        raise ValueError(
            f"{FIELD}.max_tokens: a network has one output per horizon, so the number of horizons "
            "must not depend on the batch. Set max_tokens."
        )
    if ridge is not None:
        raise ValueError(f"{FIELD}.ridge: solver 'network' does not use a ridge. Leave ridge null.")


# The keywords are the settings of the configuration, each with its own name there.
@register_advantage_estimator(
    "hierarchical",
    needs=("rollout_logprobs", "old_logprobs", "squared_score_norms"),
    compares_group=True,
    importance_corrected=True,
    unbiased=True,
    check=_check,
    validate=_validate,
    auxiliary=LearnedBaselines.build,
    uses_auxiliary=_by_network,
)
def hierarchical_advantages(  # noqa: PLR0913
    inputs: AdvantageInputs,
    *,
    horizons: str = "current_and_final",
    block_size: int = 256,
    solver: str = "least_squares",
    scope: str = "auto",
    ridge: float | None = None,
    max_tokens: int | None = None,
    log_ratio_clip: float | None = None,
    diagnostics: bool = True,
) -> AdvantageOutput:
    """Return importance-corrected policy-gradient weights, with a baseline for each ratio horizon.

        W_t = rho_{<=t} Delta_t
            = rho_{<=L} (R - c) - gamma sum_{s in horizons(t)} rho_{<=s} beta_t^(s)

        Delta_t = alpha_t^(L) (R - c) - gamma sum_{s in horizons(t)} alpha_t^(s) beta_t^(s)
        alpha_t^(s) = rho_{<=s} / rho_{<=t}

    c is the leave-one-out baseline, the mean reward of the other responses. beta minimises the
    second moment of W_t score_t, as a weighted regression that has not seen the response. gamma is
    the shrinkage coefficient: 0 is leave-one-out (RLOO) with the ratio of the whole response, 1 the
    regression. With an automatic ridge c is a weighted leave-one-out baseline, with weights
    rho_{<=L}^2 times squared score norm, as far as the rewards of the other responses clearly
    depend on those weights.

    Source: docs/hierarchical_derivation.md; measurements: docs/hierarchical_baselines.md.

    Shapes: rewards [B], rollout_logprobs, old_logprobs, squared_score_norms, response_mask [B, T]
    -> advantages [B, T].

    Conventions:
        The result is the whole weight of the score, for an objective without ratio or clip (weight
            `none`: stop-gradient W_t times log pi), and unbiased.
        horizons: `final` (s = L, Seq-IS), `current` (s = t), `current_and_final`, `blocks` (every
            `block_size` tokens, current and final), `all` (every s >= t; at most 512 tokens). The
            leave-one-out baseline is always multiplied by the final ratio, whatever is chosen.
        block_size: tokens between two horizons of `blocks`.
        scope: `group` fits each group by itself, `batch` all other folds of groups together, `auto`
            adds both, each with its shrinkage coefficient.
        ridge: None is automatic: ridge 2, shrinkage from held-out groups. A number is that ridge at
            shrinkage 1 (`auto` is then `group`). Its unit is one response with all ratios 1 and the
            mean squared score norm of the other responses (rounded to a power of two).
        max_tokens: the length over which the horizons and the positions at which shrinkage is
            measured are spread. A run sets it to `generation.max_tokens` where it is null. None in
            a call: the length of the longest response, which then influences its own horizons and
            shrinkage. Exactly unbiased only with a number.
        solver: `least_squares` fits the batch. `network` takes beta from the estimator's auxiliary
            network, times the variance of the rewards of the other responses. The network reads the
            policy's hidden states, has not seen the batch and includes its shrinkage
            (`baseline_network`). `scope` then has no effect; needs `algorithm.advantage.recompute`,
            since the policy's ranks evaluate and train it.
        log_ratio_clip: bounds log-ratios, for stability; biased towards the sampler's policy. Off
            by default.
        diagnostics: report variance ratios and effective sample sizes with the metrics.
        Responses without a token at t (ended, or a tool's) are left out of the regression of t, as
            their score there is 0. Groups of one, and groups of equal rewards, get exactly 0. A
            response gets RLOO's result where all other responses of the batch have only ratios of
            exactly 1, so on-policy all do. As soon as there is any drift, the baselines also depend
            on lengths and squared score norms. Process rewards are summed into the outcome.
            Computed in float64.

    Example: one group, rewards (1, 0), all ratios 1: c = (0, 1), W = (1, -1) at every token, as in
    RLOO.

    Raises:
        ValueError: rewards, log-probabilities or squared score norms that are not finite, ratios
            that overflow, an unknown choice or a number out of range.
    """
    _validate(
        horizons=horizons,
        block_size=block_size,
        solver=solver,
        scope=scope,
        ridge=ridge,
        max_tokens=max_tokens,
        log_ratio_clip=log_ratio_clip,
    )
    prepared = _Prepared.of(inputs, horizons, block_size, max_tokens, log_ratio_clip)
    if prepared is None:
        return AdvantageOutput(advantages=_full(None, inputs))

    targets = None
    if solver == "network":
        regression = BaselineRegression.of(prepared.batch, prepared.places)
        targets = _full(regression.columns(), inputs)
        fitted = Fitted(prepared.learned(regression, inputs.auxiliary))
    elif ridge is None:
        fitted = prepared.fitted_automatically(scope)
    else:
        fitted = fit_with_ridge(prepared.batch, scope, ridge)

    weight = prepared.weight(fitted.correction)
    measured = {"clip_fraction": prepared.clip_fraction, **fitted.shrinkage}
    if diagnostics:
        measured |= _diagnostics(prepared, weight, block_size)

    dtype = at_least_float32(inputs.rewards).dtype
    return AdvantageOutput(
        advantages=_full(prepared.places.gather(weight, dtype), inputs),
        auxiliary_targets=targets,
        diagnostics=measured,
    )


def _full(values: Tensor | None, inputs: AdvantageInputs) -> Tensor:
    """Append the columns after the last token: [B, t, ...] -> [B, T, ...]; None: zeros."""
    mask = inputs.response_mask
    if values is None:
        return torch.zeros_like(mask, dtype=at_least_float32(inputs.rewards).dtype)

    whole = values.new_zeros(*mask.shape, *values.shape[2:])
    whole[:, : values.shape[1]] = values
    return whole


@dataclass(frozen=True)
class _Prepared:
    """A batch in groups, with the arrays that its fits and diagnostics read."""

    batch: GroupedBatch
    places: Places
    rewards: Tensor  # [K, G] as they are in the inputs
    norms: Tensor  # [K, G, T] squared score norms, 0 where there is no token
    alive: Tensor  # [K, G, T] bool: there is a token
    clip_fraction: float  # of the tokens, by `log_ratio_clip`

    @staticmethod
    def of(
        inputs: AdvantageInputs,
        horizons: str,
        block_size: int,
        max_tokens: int | None,
        log_ratio_clip: float | None,
    ) -> _Prepared | None:
        """Return the batch up to its last token; None where there is none.

        Columns after the last token of all would add horizons and sampled positions without data.
        """
        columns = inputs.response_mask.any(dim=0).nonzero()
        width = int(columns.max()) + 1 if len(columns) else 0
        mask = inputs.response_mask[:, :width]
        rollout, old, norms = (array[:, :width] for array in _checked_arrays(inputs))

        # Also for an empty batch, so that its log-probabilities are checked.
        ratios, clip_fraction = prefix_ratios(rollout, old, mask, log_ratio_clip=log_ratio_clip)
        if width == 0:
            return None

        process = inputs.token_rewards
        if process is not None:
            process = process[:, :width]
        rewards = outcome_rewards(inputs.rewards, process, mask).double()

        places = Places.of(Groups.of(inputs.group_ids))
        alive = places.spread(mask)
        norms = torch.where(alive, norms[places.index].double(), 0.0)
        chosen = Horizons.of(horizons, _span(width, max_tokens), block_size, mask.device)
        batch = group_batch(ratios, rewards, norms, alive, places, chosen)
        return _Prepared(
            batch=batch,
            places=places,
            rewards=places.spread(rewards),
            norms=norms,
            alive=alive,
            clip_fraction=clip_fraction,
        )

    def fitted_automatically(self, scope: str) -> Fitted:
        """Return the corrections to a weighted baseline, with shrinkage from held-out groups."""
        weighted = replace(self.batch, baseline=weighted_baseline(self.batch))
        positions = torch.arange(weighted.ratios.shape[2], device=weighted.ratios.device)
        fitted = fit_automatically(weighted, self.norms, scope, positions)

        # `weight` subtracts corrections from the plain baseline, so the step between the two
        # baselines is part of the correction.
        step = (self.batch.base - weighted.base)[..., None]
        return replace(fitted, correction=fitted.correction + step)

    def learned(self, regression: BaselineRegression, baselines: Tensor | None) -> Tensor:
        """Return [K, G, T] the corrections by a network's baselines [B, T, p].

        They are 0 where there is no network yet.
        """
        if baselines is None:
            return torch.zeros_like(self.batch.ratios)

        width = self.batch.ratios.shape[2]
        return self.places.spread(regression.corrections(baselines[:, :width]).double())

    def weight(self, correction: Tensor) -> Tensor:
        """Return [K, G, T] the weight of the score."""
        # On-policy, where all ratios are 1, the result is exactly that of RLOO.
        correction = correction * self._others_drifted()[..., None]
        return torch.where(self.alive, self.batch.base[..., None] - correction, 0.0)

    def _others_drifted(self) -> Tensor:
        """Return [K, G] 1.0 where any other response of the batch has a ratio other than 1.

        The response itself does not count: the decision must not depend on it either.
        """
        drifted = ((self.batch.ratios != 1) & self.alive).any(dim=2)
        return (drifted.sum() - drifted.int() > 0).double()


def _checked_arrays(inputs: AdvantageInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-probabilities of rollout and old policy and the squared score norms.

    Raises:
        ValueError: rewards that are not finite, or squared norms that are negative or not finite.
    """
    rollout, old, norms = inputs.rollout_logprobs, inputs.old_logprobs, inputs.squared_score_norms
    assert rollout is not None, "rollout_logprobs are declared in `needs`"
    assert old is not None, "old_logprobs are declared in `needs`"
    assert norms is not None, "squared_score_norms are declared in `needs`"
    if not torch.isfinite(inputs.rewards).all():
        raise ValueError("rewards: not all are finite")
    if not (torch.isfinite(norms) & (norms >= 0))[inputs.response_mask].all():
        raise ValueError(
            "squared_score_norms: values inside the response mask must be finite and at least 0"
        )
    return rollout, old, norms


def _span(longest: int, max_tokens: int | None) -> int:
    if max_tokens is not None and max_tokens < longest:
        raise ValueError(
            f"{FIELD}.max_tokens: {max_tokens} is less than the {longest} tokens of the longest "
            "response"
        )
    return longest if max_tokens is None else max_tokens


def _diagnostics(prepared: _Prepared, weight: Tensor, block_size: int) -> dict[str, float]:
    """Return variance ratios of baselines, effective sample sizes and the condition number.

    The ratios compare every plain baseline and every horizon set with the leave-one-out baseline,
    at a few positions.
    """
    batch = prepared.batch
    at = sampled(batch)
    n = prepared.norms[:, :, at]
    weights = {
        name: plain_baseline(name, prepared.rewards, batch.final, n, batch.present)
        for name in PLAIN_BASELINES
    }
    weights["used"] = weight[:, :, at]

    # The horizon sets are fitted as by default, whatever ridge, scope or solver the run uses.
    shifted = prepared.rewards - prepared.rewards[:, :1] * batch.present
    plain = replace(batch, rewards=shifted, baseline=others_mean(shifted, batch.present))
    default = replace(plain, baseline=weighted_baseline(plain))
    for name in ("final", "current", "current_and_final", "blocks"):
        horizons = Horizons.of(name, batch.horizons.span, block_size, weight.device)
        candidate = replace(default, horizons=horizons)
        fitted = fit_automatically(candidate, prepared.norms, "auto", at)
        weights[name] = candidate.base[..., None] - fitted.correction

    ratios = variance_ratios(weights, n)
    return {f"variance_ratio/{name}": ratio for name, ratio in ratios.items()} | {
        "won": float(ratios["used"] < 1),
        **effective_fractions(batch.ratios, prepared.alive),
        "condition_number": float(condition_numbers(batch, at).median()),
    }
