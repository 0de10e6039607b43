"""The general family of off-policy corrections: the smallest of several functions of the ratio."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlsys.algorithms.bounded_ratio import MAX_LOG_RATIO
from rlsys.algorithms.policy_objectives.weights import Surrogate, TokenTerms, register_weight
from rlsys.registry import Registry, check_parameters

FIELD = "algorithm.objective.parameters.functions"
DEFAULT_FUNCTIONS = ({"kind": "ratio"}, {"kind": "clip", "low": 0.2, "high": 0.2})


class RatioCurve(NamedTuple):
    """The values f(rho), differentiable, and the ratios at which the slope is 0."""

    values: Tensor
    flat: Tensor  # bool


CurveFunction = Callable[..., RatioCurve]
CURVES: Registry[CurveFunction] = Registry("function of the ratio")


def register_ratio_curve(name: str) -> Callable[[CurveFunction], CurveFunction]:
    """Register `function(ratios: Tensor, *, keywords...) -> RatioCurve`, elementwise (decorator).

    `name` is then a `kind` in the `functions` of `minimum`.
    """
    return CURVES.register(name)


@register_ratio_curve("one")
def one_curve(ratios: Tensor) -> RatioCurve:
    """Return 1: no correction, and no gradient of its own."""
    return RatioCurve(torch.ones_like(ratios), torch.ones_like(ratios, dtype=torch.bool))


@register_ratio_curve("ratio")
def ratio_curve(ratios: Tensor) -> RatioCurve:
    """Return rho: importance sampling."""
    return RatioCurve(ratios, torch.zeros_like(ratios, dtype=torch.bool))


@register_ratio_curve("clip")
def clip_curve(ratios: Tensor, *, low: float = 0.2, high: float = 0.2) -> RatioCurve:
    """Return clip(rho, 1 - low, 1 + high)."""
    bottom = 1 - low
    top = 1 + high
    return RatioCurve(ratios.clamp(bottom, top), (ratios < bottom) | (ratios > top))


@register_ratio_curve("power")
def power_curve(ratios: Tensor, *, q: float = 0.5) -> RatioCurve:
    """Return rho^q."""
    return RatioCurve(ratios**q, torch.full_like(ratios, q == 0, dtype=torch.bool))


@register_ratio_curve("table")
def table_curve(ratios: Tensor, *, ratios_at: list, values: list) -> RatioCurve:
    """Interpolate linearly between the points (ratios_at, values); constant outside them."""
    ascending = sorted(set(ratios_at)) == ratios_at
    if len(ratios_at) != len(values) or len(values) < 2 or not ascending:
        raise ValueError(
            f"{FIELD}: a table needs at least two points, `ratios_at` ascending and one of "
            "`values` for each"
        )

    x = torch.tensor(ratios_at, dtype=ratios.dtype, device=ratios.device)
    y = torch.tensor(values, dtype=ratios.dtype, device=ratios.device)
    index = torch.searchsorted(x, ratios.detach().contiguous()).clamp(1, len(x) - 1)
    slope = (y[index] - y[index - 1]) / (x[index] - x[index - 1])

    inside = ratios.clamp(ratios_at[0], ratios_at[-1])
    outside = (ratios < ratios_at[0]) | (ratios > ratios_at[-1])
    interpolated = y[index - 1] + slope * (inside - x[index - 1])
    return RatioCurve(interpolated, outside | (slope == 0))


def _validate(*, functions: list | None) -> None:
    """Refuse functions outside the family, by their values on a grid of ratios."""
    _check_functions(list(DEFAULT_FUNCTIONS) if functions is None else functions)


def _starts_with_slope_one(*, functions: list | None) -> bool:
    """Return whether w(1, A) is 1: the slope at rho = 1 of the first function.

    All functions are equal there, and the first one counts.
    """
    first = (functions or DEFAULT_FUNCTIONS)[0]
    return first["kind"] in ("ratio", "clip")


@register_weight(
    "minimum",
    validate=_validate,
    one_at_ratio_one=_starts_with_slope_one,
    zero_at_zero_advantage=True,
)
def minimum_weight(terms: TokenTerms, *, functions: list | None = None) -> Surrogate:
    """Return min_k f_k(rho) A: the general family of off-policy corrections.

    Each f_k is nondecreasing and lies between min(rho, 1) and max(rho, 1). In this band no f_k
    turns an update around, and none corrects by more than importance sampling. `functions` is a
    list of `{kind: ..., parameter: ...}`:

        one                       1
        ratio                     rho
        clip    low, high         clip(rho, 1 - low, 1 + high)
        power   q                 rho^q
        table   ratios_at, values linear between points, constant outside

    The default, `ratio` and `clip`, is `ppo_clip`.

    Source: Bai and Zhang 2026, Token-Level KL-Regularized Policy Gradient and GRPO, a general
    family of off-policy correction.

    Conventions: the minimum is over the products, so for A < 0 it takes the *largest* f_k; each f_k
    itself must lie in the band, which therefore holds for both signs of A. Of functions that are
    equally small the first one listed counts. A family that has no gradient at rho = 1 is refused:
    its first update would do nothing.

    Raises:
        ValueError: an unknown kind or parameter, a function that leaves the band or falls, or no
            gradient at rho = 1.
    """
    chosen = list(DEFAULT_FUNCTIONS) if functions is None else functions
    _check_functions(chosen)

    advantages = terms.advantages
    curves = [_curve(function, terms.ratios) for function in chosen]
    products = torch.stack([curve.values * advantages for curve in curves])

    # Of equal products the first counts; torch.minimum would divide the gradient among them.
    smallest = (products == products.amin(0)).int().argmax(0, keepdim=True)
    flat = torch.stack([curve.flat for curve in curves]).gather(0, smallest)[0]
    return Surrogate(products.gather(0, smallest)[0], flat & (advantages != 0))


def _curve(function: Mapping[str, Any], ratios: Tensor) -> RatioCurve:
    parameters = {name: value for name, value in function.items() if name != "kind"}
    return CURVES.get(function["kind"], field=FIELD)(ratios, **parameters)


def _check_functions(functions: Sequence[Mapping[str, Any]]) -> None:
    if not isinstance(functions, list) or not functions:
        raise ValueError(
            f"{FIELD}: {functions!r} is not a list of functions. Give one such as {{kind: ratio}}."
        )

    for function in functions:
        if not isinstance(function, Mapping) or "kind" not in function:
            raise ValueError(
                f"{FIELD}: {function!r} has no kind. Choose from {', '.join(CURVES.names())}."
            )
        parameters = {name: value for name, value in function.items() if name != "kind"}
        check_parameters(CURVES.get(function["kind"], field=FIELD), parameters, field=FIELD)
        _check_band(function)

    one = torch.ones(1, dtype=torch.float64)
    flat_at_one = [bool(_curve(function, one).flat) for function in functions]
    if all(flat_at_one):
        raise ValueError(
            f"{FIELD}: none of them has a gradient at rho = 1, so the first update would do "
            "nothing. Add {kind: ratio}."
        )
    if flat_at_one[0]:
        raise ValueError(
            f"{FIELD}: at rho = 1 all are equal and the first one counts, and {dict(functions[0])} "
            "has no gradient there. List another one first."
        )


def _check_band(function: Mapping[str, Any]) -> None:
    ratios = torch.linspace(-MAX_LOG_RATIO, MAX_LOG_RATIO, 4001, dtype=torch.float64).exp()
    values = _curve(function, ratios).values
    one = torch.ones_like(ratios)
    slack = 1e-9 * torch.maximum(ratios, one)

    too_low = values < torch.minimum(ratios, one) - slack
    too_high = values > torch.maximum(ratios, one) + slack
    outside = too_low | too_high
    falling = torch.cat([values.diff() < -slack[1:], outside.new_zeros(1)])

    for wrong, mistake in (
        (outside, "leaves the band between min(rho, 1) and max(rho, 1)"),
        (falling, "falls"),
    ):
        if bool(wrong.any()):
            at = int(wrong.int().argmax())
            raise ValueError(
                f"{FIELD}: {dict(function)} {mistake} at rho = {float(ratios[at]):.3g}, where it "
                f"is {float(values[at]):.3g}. Choose other parameters."
            )
