"""Intervals: numbers by hand, equalities between methods, and coverage by simulation."""

import math

import numpy as np
import pytest

from rlsys.evaluation.estimators import pass_at_k
from rlsys.evaluation.intervals import (
    effective_sample_size,
    fraction_difference,
    fraction_estimate,
    mean_estimate,
    sign_test,
    student_quantile,
    wilson_interval,
)

TRIALS = 1000  # data sets per simulation


def test_wilson_by_hand():
    """8 of 10, z = 1.95996: see the docstring; 0 of 20: z^2 / (n + z^2) = 3.8415 / 23.8415."""
    low, high = wilson_interval(0.8, 10, 0.95)
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)
    assert wilson_interval(0.0, 20, 0.95) == pytest.approx((0.0, 3.8415 / 23.8415), abs=1e-4)
    low, high = wilson_interval(1.0, 20, 0.95)
    assert low == pytest.approx(20 / 23.8415, abs=1e-4)
    assert high == 1.0


def test_wilson_inverts_the_score_test():
    """At each end p0, the fraction is z standard errors of p0 away."""
    for end in wilson_interval(0.3, 40, 0.9):
        distance = abs(0.3 - end) / math.sqrt(end * (1 - end) / 40)
        assert distance == pytest.approx(1.6449, abs=1e-4)


def test_one_sample_per_prompt_is_the_plain_wilson_interval():
    values = np.array([1.0] * 13 + [0.0] * 7)
    assert effective_sample_size(values, 1) == pytest.approx(20)
    estimate = fraction_estimate(values, 1, 0.95)
    assert (estimate.low, estimate.high) == pytest.approx(wilson_interval(13 / 20, 20, 0.95))


def test_the_effective_size_lies_between_prompts_and_responses():
    """Prompts at 1/4, 1/2 and 3/4: p (1 - p) = 1/4 and s^2 = (1/16 + 0 + 1/16) / 3 = 1/24.

    n_eff = 3 * (1/4) / (1/24) = 18, with 8 samples below 24. Prompts that agree give the bound.
    """
    values = np.array([0.25, 0.5, 0.75])
    assert effective_sample_size(values, 8) == pytest.approx(18)
    assert effective_sample_size(values, 4) == 12
    assert effective_sample_size(np.array([0.5, 0.5]), 4) == 8
    # Samples that all agree are worth one each.
    assert effective_sample_size(np.array([1.0, 0.0, 1.0]), 8) == pytest.approx(3)
    assert effective_sample_size(np.array([0.0, 0.0, 0.0]), 8) == 3


def test_prompts_that_agree_do_not_make_certain():
    estimate = fraction_estimate(np.zeros(64), 8, 0.95)
    assert (estimate.value, estimate.low) == (0.0, 0.0)
    assert estimate.high == pytest.approx(3.8415 / 67.8415, abs=1e-4)


def test_the_mean_of_lengths_by_hand():
    """2, 4, 9: mean 5, s^2 = (9 + 1 + 16) / 2 = 13, t of 2 degrees 4.3027."""
    estimate = mean_estimate([2.0, 4.0, 9.0], 0.95)
    half = 4.3027 * math.sqrt(13 / 3)
    assert estimate.value == 5.0
    assert estimate.low == pytest.approx(5 - half, abs=1e-3)
    assert estimate.high == pytest.approx(5 + half, abs=1e-3)
    alone = mean_estimate([3.0], 0.95)
    assert (alone.value, alone.low, alone.high) == (3.0, None, None)


@pytest.mark.parametrize(
    ("confidence", "degrees", "expected"),
    [  # from the usual table of Student's t
        (0.95, 1, 12.706),
        (0.95, 9, 2.262),
        (0.95, 30, 2.042),
        (0.99, 5, 4.032),
        (0.95, 100_000, 1.960),
    ],
)
def test_student_quantiles(confidence: float, degrees: int, expected: float):
    assert student_quantile(confidence, degrees) == pytest.approx(expected, abs=1e-3)


def test_the_difference_by_hand():
    """10 prompts, 3 better, 1 worse: see the docstring."""
    first = np.array([0.0] * 3 + [1.0] + [1.0] * 3 + [0.0] * 3)
    second = np.array([1.0] * 3 + [0.0] + [1.0] * 3 + [0.0] * 3)
    estimate = fraction_difference(first, second, 0.95)
    middle, half = 1 / 6, 1.95996 * math.sqrt((5 / 12 - 1 / 36) / 12)
    assert estimate.value == pytest.approx(0.2)
    assert estimate.low == pytest.approx(middle - half, abs=1e-4)
    assert estimate.high == pytest.approx(middle + half, abs=1e-4)

    mirrored = fraction_difference(second, first, 0.95)
    assert mirrored.value == -estimate.value
    assert mirrored.low == pytest.approx(-estimate.high)  # pyright: ignore[reportOptionalOperand]


def test_extreme_differences_stay_in_range_and_contain_the_value():
    estimate = fraction_difference(np.zeros(4), np.ones(4), 0.95)
    assert estimate.value == estimate.high == 1.0
    same = fraction_difference(np.ones(50), np.ones(50), 0.95)
    assert same.value == 0.0
    assert same.low == pytest.approx(-1.95996 / 52, abs=1e-4)  # sqrt((0 + 1) / 52 / 52)
    assert same.high == pytest.approx(1.95996 / 52, abs=1e-4)


@pytest.mark.parametrize(
    ("higher", "lower", "p_value"),
    [
        (5, 1, 14 / 64),  # 2 (C(6, 0) + C(6, 1)) / 2^6
        (0, 4, 2 / 16),
        (3, 3, 1.0),  # twice the tail is above 1
        (0, 0, 1.0),
    ],
)
def test_the_sign_test_by_hand(higher: int, lower: int, p_value: float):
    differences = np.array([0.5] * higher + [-0.25] * lower + [0.0] * 3)
    test = sign_test(differences)
    assert (test.higher, test.lower) == (higher, lower)
    assert test.p_value == pytest.approx(p_value)


def test_the_sign_test_of_thousands_of_prompts_does_not_overflow():
    """z = 200 / sqrt(20000) = 1.414, so p is near 0.157; the exact one is slightly above."""
    differences = np.array([1.0] * 10_100 + [-1.0] * 9_900)
    assert sign_test(differences).p_value == pytest.approx(0.159, abs=0.003)


def difficulties(rng: np.random.Generator, prompts: int, shape: tuple[float, float]) -> np.ndarray:
    """Return the chance of a right sample of each prompt."""
    return rng.beta(*shape, size=(TRIALS, prompts))


@pytest.mark.parametrize("samples", [1, 4, 16])
@pytest.mark.parametrize("prompts", [30, 100])
@pytest.mark.parametrize("shape", [(0.5, 0.5), (1.0, 3.0), (0.3, 6.0)])
def test_the_interval_of_a_fraction_covers_the_truth(
    samples: int, prompts: int, shape: tuple[float, float]
):
    """Prompts are drawn from a population whose mean is the truth: a / (a + b).

    95 % should cover it. The variance between prompts is itself estimated, so with several samples
    and few prompts of a skewed population coverage falls to 92 %; the bound is 91 %. If coverage
    were 93 % in truth, 1000 data sets (standard error 0.8 %) would fail one case of a fixed seed
    with a chance below 1 %. Above, 99.5 % would be a waste of width: the same margin.
    """
    rng = np.random.default_rng([samples, prompts, *(int(10 * s) for s in shape)])
    truth = shape[0] / sum(shape)
    rates = rng.binomial(samples, difficulties(rng, prompts, shape)) / samples
    covered = 0
    for values in rates:
        estimate = fraction_estimate(values, samples, 0.95)
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= truth <= estimate.high
    assert 0.91 <= covered / TRIALS <= 0.995


@pytest.mark.parametrize("prompts", [30, 100])
@pytest.mark.parametrize("k", [2, 4, 8])
def test_the_interval_of_pass_at_k_covers_the_truth(k: int, prompts: int):
    """With Beta(a, b) difficulties the truth is 1 - E (1 - p)^k = 1 - B(a, b + k) / B(a, b).

    For a = 1/2, b = 2, k = 2: E (1 - p)^2 = 2 * 3 / (2.5 * 3.5) = 24/35, so 11/35. Bounds and
    false-alarm rate as above.
    """
    a, b, samples = 0.5, 2.0, 8
    truth = 1 - math.prod((b + i) / (a + b + i) for i in range(k))
    if k == 2:
        assert truth == pytest.approx(11 / 35)
    rng = np.random.default_rng([11, k, prompts])
    chances = [pass_at_k(samples, correct, k) for correct in range(samples + 1)]
    values = np.array(chances)[rng.binomial(samples, difficulties(rng, prompts, (a, b)))]
    covered = 0
    for row in values:
        estimate = fraction_estimate(row, samples // k, 0.95)
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= truth <= estimate.high
    assert 0.91 <= covered / TRIALS <= 0.995


def test_treating_all_samples_as_independent_would_not_cover():
    """The interval that the library must not return: Wilson's with P x n trials."""
    rng = np.random.default_rng(7)
    rates = rng.binomial(16, difficulties(rng, 100, (0.5, 0.5))) / 16
    covered = 0
    for values in rates:
        low, high = wilson_interval(float(values.mean()), 1600, 0.95)
        covered += low <= 0.5 <= high
    assert covered / TRIALS < 0.6


@pytest.mark.parametrize("samples", [1, 8])
@pytest.mark.parametrize("prompts", [30, 100])
def test_the_interval_of_a_paired_difference_covers_the_truth(samples: int, prompts: int):
    """Both models share the difficulty of a prompt; the second is better by 0.1 on average.

    Bounds and false-alarm rate as above.
    """
    rng = np.random.default_rng([3, samples, prompts])
    chances = 0.8 * difficulties(rng, prompts, (0.5, 0.5))
    first = rng.binomial(samples, chances) / samples
    second = rng.binomial(samples, chances + 0.1) / samples
    covered = 0
    for a, b in zip(first, second, strict=True):
        estimate = fraction_difference(a, b, 0.95)
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= 0.1 <= estimate.high
    assert 0.91 <= covered / TRIALS <= 0.995


def test_the_sign_test_rejects_equal_models_at_its_level():
    """At 5 %, equal models must be rejected in at most 5 % of the data sets.

    The exact test is conservative; 1000 data sets have a standard error of 0.7 %, so 7.5 % would be
    a false alarm for fewer than one seed in a thousand.
    """
    rng = np.random.default_rng(5)
    chances = difficulties(rng, 60, (0.5, 0.5))
    first, second = rng.binomial(4, chances), rng.binomial(4, chances)
    rejected = sum(
        sign_test((b - a) / 4).p_value < 0.05 for a, b in zip(first, second, strict=True)
    )
    assert rejected / TRIALS <= 0.075
