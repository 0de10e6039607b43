"""The second moment of the policy gradient under different baselines, and the quality of ratios.

All functions take a batch as K groups of G responses (`GroupedBatch`), at chosen positions t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.algorithms.advantages.grouping import others_mean
from rlsys.algorithms.advantages.hierarchical.grouped_batch import TINY, GroupedBatch

PLAIN_BASELINES = ("none", "group_mean", "leave_one_out", "opo", "optimal_token")


def second_moment(weight: Tensor, norms: Tensor) -> float:
    """Estimate the second moment of the gradient: the mean over responses of sum_t n_t W_t^2.

        E || sum_t W_t score_t ||^2 ~ sum_t E[ W_t^2 ||score_t||^2 ]

    It leaves out the covariance between positions.

    Source: docs/hierarchical_derivation.md, section 5, equation (14).

    Shapes: weight and norms [K, G, t]; norms is a proxy of ||score_t||^2, or 1 at each token, and 0
    where there is none.

    Conventions: the variance is this less the square of the mean gradient, the same for every
    unbiased baseline. Ratios of second moments are therefore nearer to 1 than ratios of variances.
    """
    responses = (norms > 0).any(dim=2).sum().clamp(min=1)
    return float((norms * weight.square()).sum() / responses)


def plain_baseline(
    name: str, rewards: Tensor, final: Tensor, norms: Tensor, present: Tensor
) -> Tensor:
    """Return [K, G, t] the policy-gradient weight rho_{<=L} (R - b) under a plain baseline.

        none           b = 0
        group_mean     b = mean of the group, the response included (biased by 1/G)
        leave_one_out  b = mean of the other responses
        opo            b = sum_j len_j R_j / sum_j len_j over the other responses
        optimal_token  b_t = sum_j w_jt R_j / sum_j w_jt over the other responses,
                       w_jt = rho_j^2 sum_{u <= t} n_ju

    Source: Hao et al. 2025, On-Policy RL with Optimal Reward Baseline (arXiv:2505.23585) for `opo`;
    `optimal_token` weights by the squared norm of the score of the response so far, times the
    square of its ratio since it was sampled by another policy.

    Shapes: rewards, final (ratios of whole responses) and present [K, G], norms [K, G, t] at the
    selected positions.

    Conventions: all but `group_mean` leave the response out. With fewer than all positions, the
    sums over u and the lengths are over those.
    """
    if name == "none":
        baseline = torch.zeros_like(rewards)[..., None]
    elif name == "group_mean":
        mean = (rewards * present).sum(1, keepdim=True) / present.sum(1, keepdim=True)
        baseline = mean.expand_as(rewards)[..., None]
    elif name == "leave_one_out":
        baseline = others_mean(rewards * present, present)[..., None]
    elif name == "opo":
        lengths = (norms > 0).sum(dim=2, keepdim=True).double()
        baseline = _others_weighted_mean(lengths, rewards)
    elif name == "optimal_token":
        weight = final.square()[..., None] * norms.cumsum(dim=2)
        baseline = _others_weighted_mean(weight, rewards)
    else:
        raise ValueError(f"baseline {name!r} is not one of {', '.join(PLAIN_BASELINES)}")

    return (final[..., None] * (rewards[..., None] - baseline)).expand_as(norms)


def _others_weighted_mean(weight: Tensor, rewards: Tensor) -> Tensor:
    """Return [K, G, t] the weighted mean reward of the other responses; 0 without weight."""
    moment = weight * rewards[..., None]
    others_moment = moment.sum(dim=1, keepdim=True) - moment
    others_weight = weight.sum(dim=1, keepdim=True) - weight
    mean = others_moment / others_weight.clamp(min=TINY)
    return torch.where(others_weight > TINY, mean, 0.0)


def effective_fraction(ratios: Tensor, alive: Tensor) -> Tensor:
    """Return [t] the effective sample size of the prefix ratios, as a fraction of the responses.

        (sum rho)^2 / (number sum rho^2)

    It counts responses with a token at the position: 1 on-policy, 0 where there is none.

    Source: Kong 1992, A note on importance sampling using standardized weights.

    Shapes: ratios and alive [K, G, t].
    """
    kept = torch.where(alive, ratios, 0.0).flatten(0, 1)
    number = alive.flatten(0, 1).sum(0)
    return kept.sum(0).square() / (number * kept.square().sum(0)).clamp(min=TINY)


def effective_fractions(ratios: Tensor, alive: Tensor) -> dict[str, float]:
    """Return `effective_fraction` at nine evenly spaced positions.

    They are named by percent of the longest response: effective_fraction/at_000, at_012, ...,
    at_100.

    Shapes: ratios and alive [K, G, T], T the longest response.

    Conventions: positions where no response has a token of its own (all a tool's) are left out.
    """
    eighths = range(9)
    at = [eighth * (ratios.shape[2] - 1) // 8 for eighth in eighths]
    fractions = effective_fraction(ratios[:, :, at], alive[:, :, at]).tolist()
    known = alive[:, :, at].flatten(0, 1).any(0).tolist()
    return {f"effective_fraction/at_{100 * k // 8:03d}": fractions[k] for k in eighths if known[k]}


def condition_numbers(batch: GroupedBatch, positions: Tensor) -> Tensor:
    """Return [t] the condition number of the normal equations over the whole batch.

    It is that of the weighted products of the horizons' features before any ridge, and very large
    if two horizons are alike.
    """
    features = batch.horizons.features(batch.ratios, positions)
    x = features.transpose(0, 1).flatten(1, 2)  # [t, K * G, p]
    n = batch.weights[:, :, positions].movedim(2, 0).flatten(1)
    gram = (x * n[..., None]).transpose(1, 2) @ x

    eigenvalues = torch.linalg.eigvalsh(gram)  # ascending
    largest = eigenvalues[:, -1:]
    # Horizons before t are 0: the first eigenvalues are theirs.
    first = eigenvalues.shape[1] - batch.horizons.count(positions)
    smallest = eigenvalues.gather(1, first[:, None])
    numbers = largest / smallest.clamp(min=1e-16 * largest)
    return torch.where(largest > 0, numbers, 1.0)[:, 0]


def variance_ratios(
    weights: dict[str, Tensor], norms: Tensor, reference: str = "leave_one_out"
) -> dict[str, float]:
    """Return the second moment under each named weight [K, G, t] over that under `reference`.

    The ratios are 1 where that of the reference is 0, because there is nothing to reduce.
    """
    base = second_moment(weights[reference], norms)
    if not base > 0:
        return dict.fromkeys(weights, 1.0)
    return {name: second_moment(weight, norms) / base for name, weight in weights.items()}
