"""The theory of hierarchical baselines, exactly, by enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.support.enumerable_policy import Context, Enumerated

SPACES: list[tuple[Context, bool]] = [
    ("prefix", False),
    ("prefix", True),
    ("previous_token", False),
    ("previous_token", True),
]


@pytest.mark.parametrize(("context", "end_token"), SPACES)
def test_any_baseline_of_any_layer_has_expectation_zero(context: Context, end_token: bool):
    """Each horizon's term vanishes (Lemma 1), so any beta leaves the gradient exact."""
    made = Enumerated(0, context, end_token)
    for t in range(made.space.length):
        for s in range(t, made.space.length):
            assert made.mean(made.ratios[:, s, None] * made.scores[:, t]).abs().max() < 1e-12
    beta = 5 * torch.randn(
        made.space.length, made.space.length, generator=made.generator, dtype=torch.float64
    )
    assert (made.mean(made.token_gradients(beta)).sum(0) - made.gradient).abs().max() < 1e-12


def test_a_baseline_that_knows_the_token_is_not_allowed():
    made = Enumerated(0)
    cheating = made.ratios[:, -1, None] * made.scores[:, 0] * made.rewards[:, None]
    assert made.mean(cheating).abs().max() > 1e-3


@pytest.mark.parametrize("end_token", [False, True])
def test_ratios_of_the_future_average_to_one_given_the_past(end_token: bool):
    made = Enumerated(1, end_token=end_token)
    for t, s in itertools.combinations(range(made.space.length), 2):
        alpha = made.ratios[:, s] / made.ratios[:, t]
        prefixes, index = made.space.tokens[:, : t + 1].unique(dim=0, return_inverse=True)
        totals = torch.zeros(2, len(prefixes), dtype=torch.float64)
        totals[0].index_add_(0, index, made.probability * alpha)
        totals[1].index_add_(0, index, made.probability)
        assert torch.allclose(
            totals[0] / totals[1], torch.ones(len(prefixes), dtype=torch.float64), atol=1e-12
        )


@pytest.mark.parametrize(("context", "end_token"), SPACES)
def test_the_variance_formula_and_what_it_leaves_out(context: Context, end_token: bool):
    """The variance of each position is that of the formula.

    The total is their sum plus covariances, which vanish only where scores are orthogonal.
    """
    made = Enumerated(2, context, end_token)
    beta = torch.randn(
        made.space.length, made.space.length, generator=made.generator, dtype=torch.float64
    )
    terms = made.token_gradients(beta)  # [S, L, P]
    means = made.mean(terms)
    direct = made.mean((terms - means).square().sum(2))
    later = torch.ones_like(beta).triu()
    alpha = made.ratios[:, None, :] / made.ratios[:, :, None]
    residual = alpha[:, :, -1] * made.rewards[:, None] - (alpha * beta * later).sum(2)
    formula = made.mean(
        made.ratios**2 * made.scores.square().sum(2) * residual**2
    ) - means.square().sum(1)
    assert torch.allclose(direct, formula, atol=1e-12, rtol=1e-12)

    total = made.mean((terms.sum(1) - made.gradient).square().sum(1))
    second = made.mean(torch.einsum("slp,smp->slm", terms, terms)) - means @ means.T
    covariance = second.sum() - second.diagonal().sum()
    assert float(total) == pytest.approx(float(direct.sum() + covariance), rel=1e-12)
    if context == "prefix":
        assert abs(float(covariance)) < 1e-12 * float(
            total
        )  # scores of different prefixes share no parameter
    else:
        assert abs(float(covariance)) > 1e-3 * float(total)


@pytest.mark.parametrize(("context", "end_token"), SPACES)
def test_the_weighted_regression_minimises_the_variance(context: Context, end_token: bool):
    made = Enumerated(3, context, end_token)

    def variance(beta: Tensor) -> Tensor:
        return made.mean(made.token_gradients(beta).square().sum(2))

    best = made.best_beta()
    for _ in range(20):
        step = torch.randn(best.shape, generator=made.generator, dtype=torch.float64)
        assert (variance(best + 0.1 * step) >= variance(best) - 1e-12).all()
        assert variance(best + 0.1 * step).sum() > variance(best).sum() + 1e-6
    mean = torch.zeros_like(best)
    mean[:, -1] = made.mean(made.rewards)
    assert variance(best).sum() < variance(mean).sum()
