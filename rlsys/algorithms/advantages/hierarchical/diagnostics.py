"""Estimated second moment of the policy gradient under different baselines, and what tells whether ratios can be trusted.

All take a batch as K groups of G responses (`GroupedBatch`), at chosen positions t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.algorithms.advantages.grouping import others_mean
from rlsys.algorithms.advantages.hierarchical.grouped_batch import TINY, GroupedBatch

ONE_A_RESPONSE = ("none", "group_mean", "leave_one_out", "opo", "optimal_token")


def second_moment(weight: Tensor, norms: Tensor) -> float:
    """Mean over responses of sum_t n_t W_t^2: the second moment of the gradient, as far as positions do not correlate.

        E || sum_t W_t score_t ||^2 ~ sum_t E[ W_t^2 ||score_t||^2 ]

    Source: docs/hierarchical_derivation.md, section 5, equation (14).

    Shapes: weight and norms [K, G, t]; norms is a proxy of ||score_t||^2, or 1 at each token, and 0 where there is none.

    Conventions: the variance is this less the square of the mean gradient, the same for every unbiased baseline. Ratios of second moments are
    therefore nearer to 1 than ratios of variances.
    """
    return float((norms * weight.square()).sum() / (norms > 0).any(dim=2).sum().clamp(min=1))


def plain_baseline(
    name: str, rewards: Tensor, final: Tensor, norms: Tensor, present: Tensor
) -> Tensor:
    """Return [K, G, t] the policy-gradient weight rho_{<=L} (R - b) under a baseline that the ratio of the whole response multiplies.

        none           b = 0
        group_mean     b = mean of the group, the response included (biased by 1/G)
        leave_one_out  b = mean of the others
        opo            b = sum_j len_j R_j / sum_j len_j over the others
        optimal_token  b_t = sum_j w_jt R_j / sum_j w_jt over the others, w_jt = rho_j^2 sum_{u <= t} n_ju

    Source: Hao et al. 2025, On-Policy RL with Optimal Reward Baseline (arXiv:2505.23585) for `opo`; `optimal_token` weights by the squared norm
    of the score of the response so far, with the square of its ratio since it was sampled by another policy.

    Shapes: rewards, final (ratios of whole responses) and present [K, G], norms [K, G, t] at the
    positions that are looked at.

    Conventions: all but `group_mean` leave the response out. With fewer than all positions, the sums over u and the lengths are over those.
    """
    if name == "none":
        baseline = torch.zeros_like(rewards)[..., None]
    elif name == "group_mean":
        mean = (rewards * present).sum(1, keepdim=True) / present.sum(1, keepdim=True)
        baseline = mean.expand_as(rewards)[..., None]
    elif name == "leave_one_out":
        baseline = others_mean(rewards * present, present)[..., None]
    elif name == "opo":
        baseline = _others_weighted_mean((norms > 0).sum(dim=2, keepdim=True).double(), rewards)
    elif name == "optimal_token":
        baseline = _others_weighted_mean(final.square()[..., None] * norms.cumsum(dim=2), rewards)
    else:
        raise ValueError(f"baseline {name!r} is none of {', '.join(ONE_A_RESPONSE)}")
    return (final[..., None] * (rewards[..., None] - baseline)).expand_as(norms)


def _others_weighted_mean(weight: Tensor, rewards: Tensor) -> Tensor:
    """[K, G, t] weighted mean of the rewards of the others; 0 where they have no weight."""
    moment = weight * rewards[..., None]
    total = weight.sum(dim=1, keepdim=True) - weight
    return torch.where(
        total > TINY, (moment.sum(dim=1, keepdim=True) - moment) / total.clamp(min=TINY), 0.0
    )


def effective_fraction(ratios: Tensor, alive: Tensor) -> Tensor:
    """[t] effective sample size of the prefix ratios over the number of responses with a token there; 1 on-policy, 0 where there is none.

        (sum rho)^2 / (number sum rho^2)

    Source: Kong 1992, A note on importance sampling using standardized weights.

    Shapes: ratios and alive [K, G, t].
    """
    kept = torch.where(alive, ratios, 0.0).flatten(0, 1)
    return kept.sum(0).square() / (alive.flatten(0, 1).sum(0) * kept.square().sum(0)).clamp(
        min=TINY
    )


def effective_fractions(ratios: Tensor, alive: Tensor) -> dict[str, float]:
    """`effective_fraction` at nine evenly spaced positions, named by percent of the longest response: effective_fraction/at_000, at_012, ... at_100.

    Shapes: ratios and alive [K, G, T], T the longest response.

    Conventions: positions where no response has a token of its own (all a tool's) are left out.
    """
    eighths = range(9)
    at = [eighth * (ratios.shape[2] - 1) // 8 for eighth in eighths]
    shares, known = (
        effective_fraction(ratios[:, :, at], alive[:, :, at]).tolist(),
        alive[:, :, at].flatten(0, 1).any(0).tolist(),
    )
    return {f"effective_fraction/at_{100 * k // 8:03d}": shares[k] for k in eighths if known[k]}


def condition_numbers(batch: GroupedBatch, positions: Tensor) -> Tensor:
    """[t] condition number of the weighted products of the horizons' features over the whole batch, before any ridge: inf if two are alike."""
    x = (
        batch.horizons.features(batch.ratios, positions).transpose(0, 1).flatten(1, 2)
    )  # [t, K * G, p]
    n = batch.weights[:, :, positions].movedim(2, 0).flatten(1)
    gram = (x * n[..., None]).transpose(1, 2) @ x
    values = torch.linalg.eigvalsh(gram)
    held = values[:, -1:] > 0
    number = batch.horizons.count(positions)
    smallest = values.gather(
        1, (values.shape[1] - number)[:, None]
    )  # horizons before t are 0: theirs are the first eigenvalues
    return torch.where(held, values[:, -1:] / smallest.clamp(min=1e-16 * values[:, -1:]), 1.0)[:, 0]


def variance_ratios(
    weights: dict[str, Tensor], norms: Tensor, reference: str = "leave_one_out"
) -> dict[str, float]:
    """Second moment under each named weight [K, G, t] over that under `reference`; 1 where that is 0 (nothing to reduce)."""
    base = second_moment(weights[reference], norms)
    return {
        name: second_moment(weight, norms) / base if base > 0 else 1.0
        for name, weight in weights.items()
    }
