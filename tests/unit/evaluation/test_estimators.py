"""pass@k and majority@k: numbers by hand, and enumeration of all subsets."""

import itertools
import math
import random
from collections import Counter

import pytest

from rlsys.evaluation.estimators import default_k_values, majority_at_k, pass_at_k


def enumerated_pass(correct: list[bool], k: int) -> float:
    """Return the fraction of the subsets of size k with a right sample."""
    subsets = list(itertools.combinations(correct, k))
    return sum(any(subset) for subset in subsets) / len(subsets)


def enumerated_majority(groups: list[int | None], correct: list[bool], k: int) -> float:
    """Return the mean over all subsets of size k of the mean value of their largest groups."""
    values = {}
    for group in {g for g in groups if g is not None}:
        verdicts = [right for g, right in zip(groups, correct, strict=True) if g == group]
        values[group] = sum(verdicts) / len(verdicts)

    total = 0.0
    subsets = list(itertools.combinations(groups, k))
    for subset in subsets:
        votes = Counter(group for group in subset if group is not None)
        winners = [g for g, count in votes.items() if count == max(votes.values())]
        total += sum(values[g] for g in winners) / len(winners) if winners else 0.0
    return total / len(subsets)


@pytest.mark.parametrize(
    ("samples", "correct", "k", "expected"),
    [
        (4, 2, 2, 5 / 6),  # 1 - C(2, 2) / C(4, 2)
        (5, 1, 2, 2 / 5),  # 1 - C(4, 2) / C(5, 2) = 1 - 6/10
        (5, 1, 3, 6 / 10),  # 6 of 10 triples hold the right one
        (3, 0, 3, 0.0),
        (3, 1, 3, 1.0),
        (8, 3, 1, 3 / 8),
    ],
)
def test_pass_at_k_by_hand(samples: int, correct: int, k: int, expected: float):
    assert pass_at_k(samples, correct, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_the_fraction_of_the_subsets_with_a_right_sample():
    for samples in range(1, 8):
        for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
            verdicts = [True] * right + [False] * (samples - right)
            expected = enumerated_pass(verdicts, k)
            assert pass_at_k(samples, right, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_stable_for_many_samples():
    """C(10000, 100) overflows a float; exact integers give the reference."""
    exact = 1 - math.comb(9993, 100) / math.comb(10000, 100)
    assert pass_at_k(10_000, 7, 100) == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize(("samples", "correct", "k"), [(4, 2, 5), (4, 5, 1), (4, -1, 1), (4, 2, 0)])
def test_pass_at_k_refuses_impossible_numbers(samples: int, correct: int, k: int):
    with pytest.raises(ValueError, match=f"k={k}, samples={samples}, correct={correct}"):
        pass_at_k(samples, correct, k)


@pytest.mark.parametrize(
    ("groups", "correct", "k", "expected"),
    [
        # Subsets aa, ab, ab: 1, 1/2, 1/2.
        ([0, 0, 1], [True, True, False], 2, 2 / 3),
        # One vote of three: the mean of the verdicts.
        ([0, 0, 1], [True, True, False], 1, 2 / 3),
        # The largest of 2, 2, 1 is a tie of a right and a wrong answer.
        ([0, 0, 1, 1, 2], [True, True, False, False, False], 5, 1 / 2),
        # A tie of three, one of them right.
        ([0, 1, 2], [False, True, False], 3, 1 / 3),
        # Of two subsets of size 1, one is without an answer.
        ([0, None], [True, False], 1, 1 / 2),
        # {0, None}: the only vote wins.
        ([0, None], [True, False], 2, 1.0),
        ([None, None], [False, False], 2, 0.0),
        # Equal answers that were judged differently count as their mean.
        ([0, 0], [True, False], 2, 1 / 2),
    ],
)
def test_majority_by_hand(groups: list[int | None], correct: list[bool], k: int, expected: float):
    assert majority_at_k(groups, correct, k) == pytest.approx(expected, abs=1e-12)


def test_majority_equals_the_enumeration_of_all_subsets():
    """300 random prompts of up to 9 samples in up to 4 groups, with silent samples."""
    rng = random.Random(0)
    for _ in range(300):
        samples = rng.randint(1, 9)
        groups = [rng.choice([None, 0, 0, 1, 2, 3]) for _ in range(samples)]
        correct = [group == 1 or rng.random() < 0.1 for group in groups]
        k = rng.randint(1, samples)
        expected = enumerated_majority(groups, correct, k)
        assert majority_at_k(groups, correct, k) == pytest.approx(expected, abs=1e-10)


def test_majority_does_not_depend_on_the_order_of_the_samples():
    groups, correct = [0, 1, 1, None, 2, 1, 0, 0], [False, True, True, False, False] + [True] * 3
    correct = [group == 1 for group in groups]
    pairs = list(zip(groups, correct, strict=True))
    first = majority_at_k(groups, correct, 3)
    random.Random(1).shuffle(pairs)
    shuffled, verdicts = zip(*pairs, strict=True)
    assert majority_at_k(shuffled, verdicts, 3) == pytest.approx(first, abs=1e-12)


def test_majority_of_many_samples_stays_exact():
    """Two answers, 600 right and 400 wrong, k = 3: the chance of at least 2 right of 3 drawn.

    (C(600, 3) + C(600, 2) C(400, 1)) / C(1000, 3); with k odd and two answers there is no tie.
    """
    groups = [0] * 600 + [1] * 400
    correct = [True] * 600 + [False] * 400
    right = 600 * 599 * 598 / 6 + 600 * 599 / 2 * 400
    expected = right / (1000 * 999 * 998 / 6)
    assert majority_at_k(groups, correct, 3) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("k", [0, 3])
def test_majority_refuses_an_impossible_k(k: int):
    with pytest.raises(ValueError, match="majority@k"):
        majority_at_k([0, 1], [True, False], k)


def test_the_default_values_of_k_end_with_all_samples():
    assert default_k_values(1) == (1,)
    assert default_k_values(8) == (1, 2, 4, 8)
    assert default_k_values(6) == (1, 2, 4, 6)
