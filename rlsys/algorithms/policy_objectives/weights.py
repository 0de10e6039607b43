"""Weight functions: the surrogate L(rho, A) that an update maximises at each token.

The gradient of the surrogate is w(rho, A) A grad log pi. The table shows L and the coefficient w.

name             surrogate                                    w(rho, A)
none             log pi A                                     1
importance       rho A                                        rho
ppo_clip         min(rho A, clip(rho, 1-low, 1+high) A)       rho; 0 beyond the band on A's side
dual_clip        ppo_clip, and at least c A where A < 0       the same; 0 where A < 0 and rho > c
upper_clip       stop(min(rho, 1+high)) log pi A              min(rho, 1+high), for both signs of A
power            stop(rho^q) log pi A                         rho^q
adaptive_power   the same, q chosen for the batch             rho^q
sapo             4/tau sigmoid(tau (rho - 1)) A               rho sech^2(tau (rho - 1) / 2)
sapo_sequence    stop(rho sech^2(tau log(rho) / 2)) log pi A  rho sech^2(tau log(rho) / 2)
reward_time      stop(C_t) log pi                             C_t / A_t
minimum          min_k f_k(rho) A                             rho f_k'(rho), k the smallest
cispo            stop(clip(rho, 1-low, 1+high)) log pi A      clip(rho, 1-low, 1+high)
gmpo             (prod_t clip(rho_t))^(1/|y|) A               the geometric mean; 0 where clipped
dppo_tv, dppo_kl stop(min(rho, cap)) log pi A                 min(rho, cap); 0 where the divergence
                                                              is above its threshold, on A's side
vespo            stop(rho^k e^(l (1 - rho))) log pi A         rho^k e^(l (1 - rho))
dro              log pi A - beta/2 log(rho)^2                 1 - beta log(rho) / A
clip_cov         ppo_clip; 0 for some tokens                  of ppo_clip; 0 for those
kl_cov           rho A; less coef |log rho| for some tokens   rho; less coef sign(log rho) / A
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlsys.algorithms.bounded_ratio import bounded_ratio
from rlsys.registry import Registry, Validate, check_values, default_parameters


class TokenTerms(NamedTuple):
    """The inputs of a weight function, all [B, T] and 0 outside the mask."""

    log_ratios: Tensor  # of the chosen level, with gradient
    advantages: Tensor
    logprobs: Tensor  # of the live policy, with gradient
    mask: Tensor  # bool
    positions: Tensor | None = None  # int64, a different one for each token of the mini-batch

    @property
    def ratios(self) -> Tensor:
        """Return rho, its value bounded to [e^-20, e^20], with a gradient beyond the bounds too.

        Only a weight may cut the gradient; it then says so in `clipped`.
        """
        return bounded_ratio(self.log_ratios)


class Surrogate(NamedTuple):
    """The values that are maximised, and the tokens whose gradient the weight cut."""

    values: Tensor  # [B, T]
    clipped: Tensor  # [B, T] bool


class BatchTokens(NamedTuple):
    """The n tokens of a mini-batch, for weights with a statistic over it. Nothing has a gradient.

    The fields after `log_ratios` are there for weights that choose tokens; see `register_weight`.
    """

    log_ratios: Tensor  # [n] of the chosen level
    logprobs: Tensor | None = None  # [n] of the live policy
    advantages: Tensor | None = None  # [n]
    positions: Tensor | None = None  # [n] int64, ascending
    seed: int = 0  # for a random choice; another one in every update


WeightFunction = Callable[..., Surrogate]
# Computes parameters from the tokens of a whole mini-batch (and the weight's own parameters); they
# stay fixed while the packs of the mini-batch are trained on.
BatchParameters = Callable[..., Mapping[str, Any]]
Declared = bool | Callable[..., bool]  # perhaps a function of the keyword parameters


@dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """The declarations that a weight is registered with; see `register_weight`."""

    batch_parameters: BatchParameters | None
    chooses_tokens: bool
    levels: tuple[str, ...] | None
    validate: Validate | None
    ignores_ratio: Declared
    one_at_ratio_one: Declared
    zero_at_zero_advantage: bool


WEIGHTS: Registry[WeightFunction] = Registry("weight")
_SPECS: dict[str, WeightSpec] = {}


def register_weight(
    name: str,
    *,
    batch_parameters: BatchParameters | None = None,
    chooses_tokens: bool = False,
    levels: tuple[str, ...] | None = None,
    validate: Validate | None = None,
    ignores_ratio: Declared = False,
    one_at_ratio_one: Declared = False,
    zero_at_zero_advantage: bool = False,
) -> Callable[[WeightFunction], WeightFunction]:
    """Register `function(terms: TokenTerms, *, keywords...) -> Surrogate` as a weight (decorator).

    `name` is then a value of `algorithm.objective.weight`.

    batch_parameters: `batch_parameters(tokens: BatchTokens, **parameters)`, for weights with a
        statistic over the batch. The trainer calls it with the tokens of a whole mini-batch before
        its update, so that the loss does not depend on how the mini-batch is cut into packs.
    chooses_tokens: the statistic is a keyword `selected`, the `positions` of some tokens. It gets
        the log-probabilities, advantages and positions of the tokens too, and a seed.
    levels: the ratio levels that the weight is defined for; None: all.
    validate: called before a run starts with all keyword parameters, defaults included. It raises a
        ValueError, with the remedy, for values that the signature cannot refuse. The weight itself
        is not called before its first batch.
    ignores_ratio: w(rho, A) is the same at every ratio. A run with several updates per batch gets a
        warning, because the weight does not correct for them.
    one_at_ratio_one: w(1, A) = 1. In one update per batch the weight does what `none` does, and a
        run that chose it gets a note.
    zero_at_zero_advantage: a response whose advantages are all 0 has no gradient. Its backward pass
        is then left out; without this declaration it is computed.

    `ignores_ratio` and `one_at_ratio_one` may be functions of the keyword parameters, called as
    `validate` is.
    """
    register = WEIGHTS.register(name)

    def decorator(function: WeightFunction) -> WeightFunction:
        register(function)
        _SPECS[name] = WeightSpec(
            batch_parameters=batch_parameters,
            chooses_tokens=chooses_tokens,
            levels=levels,
            validate=validate,
            ignores_ratio=ignores_ratio,
            one_at_ratio_one=one_at_ratio_one,
            zero_at_zero_advantage=zero_at_zero_advantage,
        )
        return function

    return decorator


def batch_parameters_of(name: str) -> BatchParameters | None:
    """Return the batch statistic of a weight; None for most."""
    return _spec(name).batch_parameters


def chooses_tokens(name: str) -> bool:
    """Return whether the batch statistic of a weight is a choice of tokens."""
    return _spec(name).chooses_tokens


def levels_of(name: str) -> tuple[str, ...] | None:
    """Return the ratio levels that a weight is defined for; None: all."""
    return _spec(name).levels


def ignores_ratio(weight: str, parameters: Mapping[str, Any]) -> bool:
    """Return whether w(rho, A) is declared to be the same at every ratio.

    Such a weight does not correct for a policy that has moved.

    Raises:
        ValueError: unknown weight.
    """
    return _holds(_spec(weight).ignores_ratio, weight, parameters)


def is_one_at_ratio_one(weight: str, parameters: Mapping[str, Any]) -> bool:
    """Return whether w(1, A) is declared to be 1.

    On the old policy's own samples such a weight changes nothing.

    Raises:
        ValueError: unknown weight.
    """
    return _holds(_spec(weight).one_at_ratio_one, weight, parameters)


def is_zero_at_zero_advantage(weight: str) -> bool:
    """Return whether responses whose advantages are all 0 are declared to have no gradient.

    Raises:
        ValueError: unknown weight.
    """
    return _spec(weight).zero_at_zero_advantage


def check_weight(name: str, parameters: Mapping[str, Any]) -> None:
    """Refuse keyword parameters that the weight `name` does not take, without calling it.

    Raises:
        ValueError: names field, value and remedy.
    """
    validate = _spec(name).validate
    check_values(
        name, WEIGHTS.get(name), validate, parameters, field="algorithm.objective.parameters"
    )


def _spec(name: str) -> WeightSpec:
    WEIGHTS.get(name, field="algorithm.objective.weight")
    return _SPECS[name]


def _holds(declared: Declared, weight: str, parameters: Mapping[str, Any]) -> bool:
    if not callable(declared):
        return declared
    defaults = default_parameters(WEIGHTS.get(weight))
    return declared(**(defaults | dict(parameters)))


def uncut(values: Tensor) -> Surrogate:
    """Return a surrogate that cuts no gradient."""
    return Surrogate(values, torch.zeros_like(values, dtype=torch.bool))


def score(weight: Tensor, terms: TokenTerms) -> Surrogate:
    """Return stop(weight) log pi A: a score function with exactly this coefficient."""
    return uncut(weight.detach() * terms.logprobs * terms.advantages)


def _validate_clip(*, clip_low: float = 0.0, clip_high: float = 0.0, **_: object) -> None:
    check_width("clip_low", clip_low, 1.0)
    check_width("clip_high", clip_high)


def check_width(name: str, value: float, highest: float = float("inf")) -> None:
    """Refuse a parameter outside [0, highest].

    Raises:
        ValueError: names field, value and remedy.
    """
    if not 0 <= value <= highest:
        bound = f"[0, {highest:g}]" if highest < float("inf") else "[0, inf)"
        raise ValueError(
            f"algorithm.objective.parameters.{name}: {value} is outside {bound}; give a width such "
            "as 0.2"
        )


@register_weight("none", ignores_ratio=True, one_at_ratio_one=True, zero_at_zero_advantage=True)
def no_weight(terms: TokenTerms) -> Surrogate:
    """Return log pi A: the score-function estimator, whatever the ratio."""
    return score(torch.ones_like(terms.advantages), terms)


@register_weight("importance", one_at_ratio_one=True, zero_at_zero_advantage=True)
def importance_weight(terms: TokenTerms) -> Surrogate:
    """Return rho A: importance sampling without a trust region."""
    return uncut(terms.ratios * terms.advantages)


@register_weight(
    "ppo_clip",
    validate=_validate_clip,
    one_at_ratio_one=True,
    zero_at_zero_advantage=True,
)
def ppo_clip_weight(
    terms: TokenTerms, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> Surrogate:
    """Return min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), as in PPO.

    A token has no gradient once its ratio has left the band in A's direction.

    Conventions: `clip_low` is the width of the band below 1. `clip_high` is the width of the band
    above 1.

    Source: Schulman et al. 2017, equation 7 (arXiv:1707.06347); different bounds: Yu et al. 2025,
    Clip-Higher (arXiv:2503.14476).
    """
    _validate_clip(clip_low=clip_low, clip_high=clip_high)
    ratio, advantages = terms.ratios, terms.advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    values = torch.minimum(ratio * advantages, clipped * advantages)

    too_high = (advantages > 0) & (ratio > 1 + clip_high)
    too_low = (advantages < 0) & (ratio < 1 - clip_low)
    return Surrogate(values, too_high | too_low)


def _validate_dual_clip(*, clip_c: float, **widths: float) -> None:
    if clip_c <= 1:
        raise ValueError(f"algorithm.objective.parameters.clip_c: {clip_c} must be above 1")
    _validate_clip(**widths)


@register_weight(
    "dual_clip",
    validate=_validate_dual_clip,
    one_at_ratio_one=True,
    zero_at_zero_advantage=True,
)
def dual_clip_weight(
    terms: TokenTerms, *, clip_low: float = 0.2, clip_high: float = 0.2, clip_c: float = 3.0
) -> Surrogate:
    """Return ppo_clip, bounded below by c A for negative advantages.

    So a ratio far above 1 cannot make the loss explode.

    Conventions: `clip_low` is the width of the band below 1. `clip_high` is the width of the band
    above 1. `clip_c` is the largest ratio with a gradient where A is negative.

    Source: Ye et al. 2020, equation 5 (arXiv:1912.09729).

    Raises:
        ValueError: clip_c is at most 1.
    """
    _validate_dual_clip(clip_c=clip_c)
    surrogate, cut = ppo_clip_weight(terms, clip_low=clip_low, clip_high=clip_high)

    floor = clip_c * terms.advantages
    negative = terms.advantages < 0
    values = torch.where(negative, torch.maximum(surrogate, floor), surrogate)
    return Surrogate(values, cut | (negative & (surrogate < floor)))


@register_weight(
    "upper_clip",
    validate=_validate_clip,
    one_at_ratio_one=True,
    zero_at_zero_advantage=True,
)
def upper_clip_weight(terms: TokenTerms, *, clip_high: float = 0.2) -> Surrogate:
    """Return stop(min(rho, 1 + clip_high)) log pi A: the importance weight, capped from above.

    The cap is the same for both signs of A, and every token keeps a gradient. The weight is biased
    where the cap binds, and unlike ppo_clip also on the pessimistic side, where ratios are largest.

    Conventions: `clip_high` is how far the weight may rise above 1.

    Source: Bai and Zhang 2026, Token-Level KL-Regularized Policy Gradient and GRPO, upper clipping;
    Ionides 2008 (truncated importance sampling).
    """
    _validate_clip(clip_high=clip_high)
    return score(terms.ratios.clamp(max=1 + clip_high), terms)


def _validate_power(*, q: float) -> None:
    check_width("q", q, 1.0)


@register_weight(
    "power",
    validate=_validate_power,
    ignores_ratio=lambda q: q == 0,
    one_at_ratio_one=True,
    zero_at_zero_advantage=True,
)
def power_weight(terms: TokenTerms, *, q: float = 0.5) -> Surrogate:
    """Return stop(rho^q) log pi A: a partial importance correction.

    q = 0 is no correction (biased, least variance), q = 1 the full one (unbiased, most variance).

    Conventions: `q` is the exponent, from 0 to 1.

    Source: Bai and Zhang 2026, the power family.
    """
    _validate_power(q=q)
    return score(bounded_ratio(q * terms.log_ratios), terms)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Compute the effective sample size of weights w_i = exp(log_weights_i), as a fraction of n.

        (sum w)^2 / (n sum w^2)

    It is in (0, 1], and 1 for equal weights and for none.

    Source: Kish 1965. Computed in log space, so no weight overflows.
    """
    if not log_weights.numel():
        return log_weights.new_ones(())

    flat = log_weights.reshape(-1).double()
    log_square_of_sum = 2 * flat.logsumexp(0)
    log_sum_of_squares = (2 * flat).logsumexp(0)
    return (log_square_of_sum - log_sum_of_squares).exp() / flat.numel()


def adaptive_power_of(
    log_ratios: Tensor, *, target_ess: float = 0.9, q: float | None = None
) -> dict[str, float]:
    """Return {"q": ...}: the largest q in [0, 1] with an effective sample size of `target_ess`.

    The effective sample size of rho^q falls from 1 at q = 0 as q grows: its logarithm is
    2 K(q) - K(2q) with K the cumulant generating function of log rho, and the derivative
    2 (K'(q) - K'(2q)) is at most 0 because K is convex. So bisection finds the boundary, to 1e-6.
    """
    check_width("target_ess", target_ess, 1.0)
    if q is not None:
        return {"q": q}
    if float(effective_sample_size(log_ratios)) >= target_ess:
        return {"q": 1.0}

    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        enough = float(effective_sample_size(middle * log_ratios)) >= target_ess
        if enough:
            low = middle
        else:
            high = middle
    return {"q": low}


def _adaptive_power_of_batch(tokens: BatchTokens, **parameters: Any) -> dict[str, float]:
    return adaptive_power_of(tokens.log_ratios, **parameters)


def _validate_adaptive_power(*, target_ess: float, q: float | None) -> None:
    check_width("target_ess", target_ess, 1.0)
    if q is not None:
        _validate_power(q=q)


@register_weight(
    "adaptive_power",
    batch_parameters=_adaptive_power_of_batch,
    validate=_validate_adaptive_power,
    # Only equal weights keep the whole sample size.
    ignores_ratio=lambda target_ess, q: q == 0 or (q is None and target_ess == 1),
    one_at_ratio_one=True,
    zero_at_zero_advantage=True,
)
def adaptive_power_weight(
    terms: TokenTerms, *, target_ess: float = 0.9, q: float | None = None
) -> Surrogate:
    """Return stop(rho^q) log pi A with q as large as the spread of the ratios allows.

    q is the largest power whose weights keep an effective sample size of `target_ess`: 1 while the
    policy is close to the one that sampled (full correction, no bias), falling as it moves away.
    This answers the open question of the source, which asks for a correction that moves between the
    two by itself.

    Conventions: `target_ess` is the effective sample size to keep, as a fraction from 0 to 1. `q`
    None takes it from these tokens; the trainer passes that of the whole mini-batch.

    Source: the power family of Bai and Zhang 2026; the criterion is Kish's effective sample size.
    """
    inside = terms.log_ratios.detach()[terms.mask]
    return power_weight(terms, **adaptive_power_of(inside, target_ess=target_ess, q=q))


def _validate_temperatures(*, tau_pos: float, tau_neg: float) -> None:
    for name, value in (("tau_pos", tau_pos), ("tau_neg", tau_neg)):
        if not value > 0:
            raise ValueError(
                f"algorithm.objective.parameters.{name}: {value} must be above 0; the larger, the "
                "narrower the gate"
            )


@register_weight(
    "sapo",
    validate=_validate_temperatures,
    one_at_ratio_one=True,
    zero_at_zero_advantage=True,
)
def sapo_weight(terms: TokenTerms, *, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Surrogate:
    """Return 4/tau sigmoid(tau (rho - 1)) A: a trust region without an edge.

    tau is tau_pos where A > 0 and tau_neg elsewhere.

    Conventions: `tau_pos` narrows the gate where A > 0. `tau_neg` narrows the gate elsewhere.

    Source: Gao et al. 2025, Soft Adaptive Policy Optimization, equations 5 to 8 (arXiv:2511.20347).

    Raises:
        ValueError: a temperature is not positive.
    """
    tau = _temperatures(terms.advantages, tau_pos, tau_neg)
    gate = torch.sigmoid(tau * (terms.ratios - 1))
    return uncut(4 / tau * gate * terms.advantages)


def _temperatures(advantages: Tensor, tau_pos: float, tau_neg: float) -> Tensor:
    _validate_temperatures(tau_pos=tau_pos, tau_neg=tau_neg)
    return torch.where(
        advantages > 0, advantages.new_tensor(tau_pos), advantages.new_tensor(tau_neg)
    )


@register_weight(
    "sapo_sequence",
    validate=_validate_temperatures,
    one_at_ratio_one=True,
    zero_at_zero_advantage=True,
)
def sapo_sequence_weight(
    terms: TokenTerms, *, tau_pos: float = 1.0, tau_neg: float = 1.05
) -> Surrogate:
    """Return stop(rho sech^2(tau log(rho) / 2)) log pi A: the gate of a whole response.

    For the ratio level `sequence`; tau as in `sapo`. It is what the average of `sapo`'s token gates
    becomes while steps are small and the tokens of a response drift alike: the gate
    sech^2(tau/2 log s) before grad s, with s the geometric mean of the token ratios.

    Conventions: `tau_pos` narrows the gate where A > 0. `tau_neg` narrows the gate elsewhere.

    Source: Gao et al. 2025, Soft Adaptive Policy Optimization, the sequence-level reduction
    (arXiv:2511.20347).

    Raises:
        ValueError: a temperature is not positive.
    """
    tau = _temperatures(terms.advantages, tau_pos, tau_neg)
    gate = 1 / torch.cosh(tau * terms.log_ratios.detach() / 2) ** 2
    return score(terms.ratios * gate, terms)


@register_weight(
    "reward_time",
    levels=("prefix",),
    one_at_ratio_one=True,
    zero_at_zero_advantage=True,
)
def reward_time_weight(terms: TokenTerms) -> Surrogate:
    """Return stop(C_t) log pi: each reward weighted by the product of ratios up to its own time.

        C_t = sum_{s>=t} rho_{<=s} (A_s - A_{s+1})

    A_s - A_{s+1} is the reward at s where A is a reward-to-go, up to a baseline whose terms cancel
    in expectation. The ratio of the tokens after a reward is left out, because it has mean 1 and
    only adds variance. The result is unbiased off-policy, for any estimator that returns
    rewards-to-go with gamma = 1 and a baseline of the prefix. With an outcome reward alone it is
    the `product` ratio.

    Source: Levine 2023, CS285 lecture 5, in Dong 2025, Survey on LLM Policy Gradient, equation
    2.10, with the product over t4 from t1 + 1 on as in its matrix A.3: the equation itself counts
    the ratio of token t1 twice.

    Conventions: for the ratio level `prefix` alone; A is 0 after the last token. The coefficient
    depends on the advantages of later tokens; for a response of one token it is rho.
    """
    following = torch.where(terms.mask, terms.advantages, 0.0)
    later = _next_inside(following, terms.mask)
    parts = torch.where(terms.mask, terms.ratios.detach() * (following - later), 0.0)
    coefficients = parts.flip(1).cumsum(1).flip(1)
    return uncut(coefficients * terms.logprobs)


def _next_inside(values: Tensor, mask: Tensor) -> Tensor:
    """Return [B, T] the value at the next position of the mask, 0 after the last one."""
    width = values.shape[1]
    positions = torch.arange(width, device=values.device).expand_as(values)

    # The nearest masked position at or after each column, then one column further.
    nearest = torch.where(mask, positions, width).flip(1).cummin(1).values.flip(1)
    after = torch.cat([nearest[:, 1:], nearest.new_full((len(values), 1), width)], dim=1)

    # Column `width` of the padded values stands for "no next position".
    padded = torch.cat([values, values.new_zeros(len(values), 1)], dim=1)
    return padded.gather(1, after)


@register_weight(
    "cispo",
    validate=_validate_clip,
    ignores_ratio=lambda clip_low, clip_high: clip_low == clip_high == 0,
    one_at_ratio_one=True,
    zero_at_zero_advantage=True,
)
def cispo_weight(terms: TokenTerms, *, clip_low: float = 1.0, clip_high: float = 0.2) -> Surrogate:
    """Return stop(clip(rho)) log pi A: every token keeps a gradient, its weight is bounded.

    Conventions: `clip_low` is how far the weight may fall below 1. `clip_high` is how far it may
    rise above 1.

    Source: MiniMax 2025, MiniMax-M1, section 3.1 (arXiv:2506.13585).
    """
    _validate_clip(clip_low=clip_low, clip_high=clip_high)
    return score(terms.ratios.clamp(1 - clip_low, 1 + clip_high), terms)


def gradient_coefficient(
    weight: str,
    log_ratios: Tensor,
    advantages: Tensor,
    *,
    logprobs: Tensor | None = None,
    response_mask: Tensor | None = None,
    **parameters: Any,
) -> Tensor:
    """Compute the coefficient w(rho, A) of a weight by differentiating its surrogate.

        d surrogate / d log pi = w(rho, A) A

    Shapes: any equal ones, where each element is a response of one token; or all [B, T], with
    `response_mask`, where each row is a response. 0 outside the mask.

    Conventions: where A is 0, w is taken at A = 1. `adaptive_power` takes its q from all tokens
    unless it is given. Weights that read the probability of a token get that of the live policy
    from `logprobs`; None: 0.22. A weight that chooses tokens has the coefficient of a token that it
    did not choose, unless `selected` or `response_mask` is given.

    Raises:
        ValueError: unknown weight or parameter value.
    """
    function = WEIGHTS.get(weight, field="algorithm.objective.weight")
    shape = log_ratios.shape
    mask = response_mask
    if mask is None:
        mask = torch.ones(log_ratios.numel(), 1, dtype=torch.bool, device=log_ratios.device)
        if chooses_tokens(weight):
            parameters = {"selected": torch.zeros(0, dtype=torch.int64)} | parameters

    logs = torch.where(mask, log_ratios.detach().reshape(mask.shape), 0.0)
    sizes = advantages.detach().to(logs.dtype).reshape(mask.shape)
    sizes = torch.where(sizes == 0, 1.0, sizes)
    base = torch.full_like(logs, math.log(0.22))
    if logprobs is not None:
        base = logprobs.detach().to(logs.dtype).reshape(mask.shape)

    with torch.enable_grad():
        moved = torch.zeros_like(logs).requires_grad_()
        given = torch.where(mask, sizes, 0.0)
        terms = TokenTerms(logs + moved, given, torch.where(mask, base, 0.0) + moved, mask)
        surrogate = function(terms, **parameters)
        (gradient,) = torch.autograd.grad(surrogate.values.sum(), moved)
    return torch.where(mask, gradient / sizes, 0.0).reshape(shape)
