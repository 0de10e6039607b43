"""Estimators from n samples of a prompt: pass@k, and the accuracy of a majority vote of k."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Estimate without bias the probability that at least one of k samples is right.

        pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{i=n-c+1..n} (1 - k / i)

    Source: Chen et al. 2021, Evaluating Large Language Models Trained on Code, section 2.1
    (arXiv:2107.03374).

    Example: n = 4, c = 2, k = 2: 1 - C(2, 2) / C(4, 2) = 5/6.

    Raises:
        ValueError: k > samples, or correct > samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(
            "pass@k needs 1 <= k <= samples and 0 <= correct <= samples, "
            f"not k={k}, samples={samples}, correct={correct}"
        )
    if samples - correct < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(samples - correct + 1, samples + 1)))


def majority_at_k(groups: Sequence[int | None], correct: Sequence[bool], k: int) -> float:
    """Return the expected accuracy of a majority vote among k of the n samples of a prompt.

        maj@k = mean over the C(n, k) subsets of the mean, over the groups with the most votes,
                of the group's value

    The value of a group of equal answers is the fraction of its samples that are right: 0 or 1,
    unless equal answers were judged differently.

    **Source**: Wang et al. 2022, Self-Consistency Improves Chain of Thought Reasoning
    (arXiv:2203.11171), with a plain vote; there k is n.

    **Conventions**: a tie counts as its expected value under a uniform choice among the tied
    groups. A sample without an answer (None) does not vote; where none of the k votes, the value
    is 0. Over subsets the estimate is exact and, like pass@k, unbiased: it is the average of an
    unbiased estimate with exactly k samples over all choices of k. For k = 1 it is the mean of
    `correct` over the samples that have an answer, divided by n.

    Example: answers a a b with a right, k = 2: the subsets aa, ab, ab give 1, 1/2, 1/2, so 2/3.

    Args:
        groups: the number of each sample's group of equal answers; None: it has no answer.
        correct: whether each sample is right.

    Raises:
        ValueError: k is not in 1..n, or the lengths differ.
    """
    samples = len(groups)
    if not 1 <= k <= samples or len(correct) != samples:
        raise ValueError(
            f"majority@k needs 1 <= k <= samples, not k={k}, samples={samples}, and as many "
            f"verdicts, not {len(correct)}"
        )
    votes: dict[int, list[bool]] = {}
    for group, right in zip(groups, correct, strict=True):
        if group is not None:
            votes.setdefault(group, []).append(right)

    # Equal counts and values are common among the prompts of a data set.
    sizes = sorted((len(verdicts), sum(verdicts) / len(verdicts)) for verdicts in votes.values())
    silent = sum(group is None for group in groups)
    return _expected_majority(tuple(sizes), silent, k)


@lru_cache(maxsize=65536)
def _expected_majority(sizes: tuple[tuple[int, float], ...], silent: int, k: int) -> float:
    """Return maj@k of groups of (size, value), and of samples that do not vote.

    The counts x_j of a random subset of size k are independent binomials, given that they sum to
    k, whatever their common probability is; k / n keeps the numbers far from 0. For each number t
    of the winner's votes a recursion over the groups adds up

        weights[s, r]: the probability of r samples so far, of which s groups have exactly t
        values[s, r]:  the same, times the sum of the values of those s groups

    so that maj@k = sum_{t, s} values[s, k] / s, divided by the probability of a sum of k.
    """
    samples = sum(size for size, _ in sizes) + silent
    if k == samples:
        return _plurality(sizes)

    chance = k / samples
    expected = 0.0
    for most in range(1, k + 1):
        most_ties = min(k // most, sum(size >= most for size, _ in sizes))
        if most_ties == 0:
            break
        weights = np.zeros((most_ties + 1, k + 1))
        values = np.zeros((most_ties + 1, k + 1))
        weights[0] = _binomial(silent, chance, k)
        for size, value in sizes:
            weights, values = _with_group(weights, values, size, value, most, chance)
        expected += sum(values[s, k] / s for s in range(1, most_ties + 1))
    return float(expected / _binomial(samples, chance, k)[k])


def _plurality(sizes: Sequence[tuple[int, float]]) -> float:
    """Return the mean value of the largest groups; 0 without any."""
    if not sizes:
        return 0.0
    largest = max(size for size, _ in sizes)
    tied = [value for size, value in sizes if size == largest]
    return sum(tied) / len(tied)


def _with_group(
    weights: NDArray[np.float64],
    values: NDArray[np.float64],
    size: int,
    value: float,
    most: int,
    chance: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the sums with one more group, which has 0..most of the samples."""
    drawn = weights.shape[1] - 1
    probabilities = _binomial(size, chance, drawn)
    next_weights = np.zeros_like(weights)
    next_values = np.zeros_like(values)

    # Fewer votes than the winner: the number of ties stays.
    for votes in range(min(size, most - 1, drawn) + 1):
        kept = drawn + 1 - votes
        next_weights[:, votes:] += probabilities[votes] * weights[:, :kept]
        next_values[:, votes:] += probabilities[votes] * values[:, :kept]

    if most <= size:  # as many: one more tie
        kept = drawn + 1 - most
        moved = probabilities[most] * weights[:-1, :kept]
        next_weights[1:, most:] += moved
        next_values[1:, most:] += probabilities[most] * values[:-1, :kept] + value * moved
    return next_weights, next_values


@lru_cache(maxsize=4096)
def _binomial(trials: int, chance: float, last: int) -> NDArray[np.float64]:
    """Return [last + 1] the binomial probabilities of 0..last successes."""
    log_chance, log_rest = math.log(chance), math.log1p(-chance)
    logs = [
        math.lgamma(trials + 1) - math.lgamma(x + 1) - math.lgamma(trials - x + 1)
        + x * log_chance + (trials - x) * log_rest
        for x in range(min(trials, last) + 1)
    ]  # fmt: skip
    padded = np.zeros(last + 1)
    padded[: len(logs)] = np.exp(logs)
    padded.flags.writeable = False  # the cache returns the same array again
    return padded


def default_k_values(samples: int) -> tuple[int, ...]:
    """Return the powers of 2 below `samples`, and `samples` itself."""
    powers = itertools.takewhile(lambda k: k < samples, (2**i for i in itertools.count()))
    return (*powers, samples)
