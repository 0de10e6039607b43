"""Confidence intervals over prompts, and a paired comparison of two models.

The independent units are the prompts: all samples of a prompt share its difficulty. So each
function takes one number per prompt, the mean over its samples.

    fractions (accuracy, pass@k, ...)    Wilson with an effective sample size
    other means (length, entropy)        Student's t of the prompts' means
    differences of fractions             Agresti and Min's adjusted Wald interval over prompts
    differences of other means           Student's t of the prompts' differences

Wilson's interval is chosen over a bootstrap and over a normal interval of the prompts' means since
those have no width where all prompts agree (a model that solves none of 64 problems is not known
to solve none of all), and leave [0, 1] where few differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import mpmath
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """An estimate with its confidence interval.

    The interval is None where one prompt alone says nothing about the spread over prompts.
    """

    value: float
    low: float | None
    high: float | None


def wilson_interval(fraction: float, count: float, confidence: float) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion.

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    **Source**: Wilson 1927, Probable inference, the law of succession, and statistical inference;
    Brown, Cai and DasGupta 2001, Interval Estimation for a Binomial Proportion, recommend it.

    **Conventions**: z is the normal quantile of (1 + confidence) / 2. `count` need not be whole.

    Example: 8 of 10 at 95 % (z = 1.96): (0.8 + 0.192 -+ 1.96 sqrt(0.016 + 0.0096)) / 1.384, which
    is 0.490 to 0.943.
    """
    z = _normal_quantile(confidence)
    shrink = 1 + z * z / count
    middle = (fraction + z * z / (2 * count)) / shrink
    half = z * math.sqrt(fraction * (1 - fraction) / count + (z / (2 * count)) ** 2) / shrink
    return max(0.0, middle - half), min(1.0, middle + half)


def effective_sample_size(values: NDArray[np.float64], samples: int) -> float:
    """Return how many independent yes-or-no trials are as informative as these prompts.

        n_eff = P p (1 - p) / s^2,    p and s^2 the mean and the variance (ddof 0) of `values`

    It is P, the number of prompts, with one sample each: then s^2 = p (1 - p). More samples of a
    prompt make the prompt's mean less noisy, so s^2 falls; it stays above the variance between
    prompts, so n_eff says what further samples of the same prompts are worth.

    **Source**: the ratio of P and the design effect, as in Franco, Little, Louis and Slud 2019,
    Comparative Study of Confidence Intervals for Proportions in Complex Sample Surveys, who
    recommend Wilson's interval at this size.

    **Conventions**: at least P and at most P times `samples`, the bounds of the true ratio (all
    samples of a prompt equal; all independent). P where p is 0 or 1.

    Args:
        values: one value in [0, 1] per prompt.
        samples: per prompt.
    """
    prompts = len(values)
    fraction, variance = float(values.mean()), float(values.var())
    spread = prompts * fraction * (1 - fraction)
    if spread <= 0:
        return float(prompts)
    if variance <= 0:
        return float(prompts * samples)
    return min(max(spread / variance, prompts), prompts * samples)


def fraction_estimate(
    values: Sequence[float] | NDArray[np.float64], samples: int, confidence: float
) -> Estimate:
    """Return the mean of one value in [0, 1] per prompt, with Wilson's interval.

    With one sample per prompt the interval is the plain Wilson interval of P trials.
    """
    array = np.asarray(values, dtype=np.float64)
    fraction = min(max(float(array.mean()), 0.0), 1.0)
    size = effective_sample_size(array, samples)
    low, high = wilson_interval(fraction, size, confidence)
    return Estimate(value=fraction, low=min(low, fraction), high=max(high, fraction))


def mean_estimate(values: Sequence[float] | NDArray[np.float64], confidence: float) -> Estimate:
    """Return the mean of one number per prompt, with the interval of Student's t.

    mean -+ t sqrt(s^2 / P),    s^2 with ddof 1, t of P - 1 degrees of freedom
    """
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Estimate(value=mean, low=None, high=None)
    half = student_quantile(confidence, len(array) - 1) * float(array.std(ddof=1))
    half /= math.sqrt(len(array))
    return Estimate(value=mean, low=mean - half, high=mean + half)


def fraction_difference(
    first: NDArray[np.float64], second: NDArray[np.float64], confidence: float
) -> Estimate:
    """Return the mean of second - first over the same prompts, each in [0, 1], with its interval.

        d~ -+ z sqrt((sum d^2 + 1) / (P + 2) - d~^2) / sqrt(P + 2),    d~ = sum d / (P + 2)

    **Source**: Agresti and Min 2005, Simple improved confidence intervals for comparing matched
    proportions (Wald + 2), who add half a pair to each cell of the 2 x 2 table. With one sample per
    prompt it is their interval; with several, d is the difference of the prompt's means, and the
    half pairs are added in the same way.

    **Conventions**: the value is the plain mean, without the added pairs; the interval is clipped
    to [-1, 1], and widened to contain the value where it does not.

    Example: 10 prompts, 3 won and 1 lost, 95 %: d~ = 2 / 12, (4 + 1) / 12 - d~^2 = 0.389, half
    width 1.96 sqrt(0.389 / 12) = 0.353: -0.186 to 0.520 around 0.2.
    """
    differences = second - first
    count = len(differences) + 2
    middle = float(differences.sum()) / count
    spread = (float(np.square(differences).sum()) + 1) / count - middle * middle
    half = _normal_quantile(confidence) * math.sqrt(spread / count)
    value = float(differences.mean())
    return Estimate(
        value=value,
        low=max(-1.0, min(middle - half, value)),
        high=min(1.0, max(middle + half, value)),
    )


@dataclass(frozen=True, kw_only=True)
class SignTest:
    """How many prompts have a higher and a lower value with the second model, and the p-value."""

    higher: int
    lower: int
    p_value: float


def sign_test(differences: NDArray[np.float64]) -> SignTest:
    """Return the exact two-sided sign test of the prompts that differ.

        p = min(1, 2 P(X <= min(higher, lower))),    X ~ Binomial(higher + lower, 1/2)

    **Source**: with one sample per prompt this is McNemar's test in its exact form (McNemar 1947).

    **Conventions**: prompts without a difference are left out; without any, p is 1. Of prompts with
    several samples only the sign counts, so that the test is valid whatever the distribution of the
    differences is. It does not use their size: the interval does.

    Example: 5 higher, 1 lower: 2 (C(6, 0) + C(6, 1)) / 2^6 = 14 / 64 = 0.219.
    """
    higher, lower = int((differences > 0).sum()), int((differences < 0).sum())
    trials = higher + lower
    tail = _sum_of_binomials(trials, min(higher, lower))  # whole numbers: no rounding
    p_value = min(1.0, 2 * tail / 2**trials) if trials else 1.0
    return SignTest(higher=higher, lower=lower, p_value=p_value)


def _sum_of_binomials(n: int, last: int) -> int:
    """Return C(n, 0) + ... + C(n, last), each from the one before it."""
    term = total = 1
    for x in range(last):
        term = term * (n - x) // (x + 1)
        total += term
    return total


def _normal_quantile(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


@lru_cache(maxsize=1024)
def student_quantile(confidence: float, degrees: int) -> float:
    """Return t such that Student's t of these degrees of freedom is in [-t, t] with `confidence`.

    The probability outside is I_x(degrees / 2, 1/2) with x = degrees / (degrees + t^2), the
    regularized incomplete beta function; t is found by bisection.

    Example: 2.262 for 95 % and 9 degrees.
    """

    def outside(t: float) -> float:
        x = degrees / (degrees + t * t)
        return float(mpmath.betainc(degrees / 2, 0.5, 0, x, regularized=True))

    low = high = _normal_quantile(confidence)  # t is never below the normal quantile
    while outside(high) > 1 - confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        if outside(middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high
