"""The true variance of the policy gradient under different baselines, from the gradients of single responses.

`baseline_variance` estimates it from a proxy of each score's norm and without the products of different positions. Here scores are vectors:
those of one linear map y = A x of the model after which nothing mixes positions, such as the last layer's down projection. There

    score_t = d log pi_t / d A = o_t x_t^T,     o_t = d log pi_t / d y at the position that predicts t,  x_t its input

so all scores of a batch come from one backward pass, without a gradient for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.algorithms.advantages.grouping import others_mean

BASELINES = ("none", "group_mean", "leave_one_out", "used")
REFERENCE = "leave_one_out"


@dataclass(frozen=True)
class GroupMoments:
    """Sums over responses of one group, under each of K baselines."""

    gradient: Tensor  # [K, d, f] of g_i
    squares: Tensor  # [K] of ||g_i||^2
    same_position: Tensor  # [K] of sum_t W_it^2 ||score_it||^2
    proxy: Tensor  # [K] of sum_t W_it^2 n_it

    def __add__(self, other: GroupMoments) -> GroupMoments:
        return GroupMoments(
            self.gradient + other.gradient,
            self.squares + other.squares,
            self.same_position + other.same_position,
            self.proxy + other.proxy,
        )

    def spread(self, size: int) -> Tensor:
        """[4, K] variance of the group's `size` > 1 responses, times size^2 for that of their mean, and the three sums."""
        variance = size / (size - 1) * (self.squares - self.gradient.square().sum((1, 2)) / size)
        return torch.stack([variance, self.squares, self.same_position, self.proxy])


def response_moments(
    weights: Tensor, outward: Tensor, inward: Tensor, norms: Tensor
) -> GroupMoments:
    """Of one response: g = sum_t W_t score_t = O^T diag(W) X.

    Shapes: weights [K, t], outward [t, d], inward [t, f], norms [t] the proxy of ||score_t||^2.
    """
    gradient = (weights[:, :, None] * outward).transpose(1, 2) @ inward
    true_norms = outward.square().sum(1) * inward.square().sum(1)
    return GroupMoments(
        gradient,
        gradient.square().sum((1, 2)),
        (weights.square() * true_norms).sum(1),
        (weights.square() * norms).sum(1),
    )


def plain_weights(rewards: Tensor, ratios: Tensor) -> Tensor:
    """[3, G] policy-gradient weight of each response of a group without baseline, with the group's mean, and with that of the others.

        rho_{<=L} (R - b)

    Shapes: rewards and ratios of whole responses [G].
    """
    others = others_mean(rewards[None], torch.ones_like(rewards, dtype=torch.bool)[None])[0]
    return ratios * (
        rewards
        - torch.stack([torch.zeros_like(rewards), rewards.mean().expand_as(rewards), others])
    )


def gradient_diagnostics(groups: Sequence[Tensor]) -> dict[str, float]:
    """What the `GroupMoments.spread` of all groups say; baselines in the order of BASELINES.

        variance    V = sum_g G/(G-1) sum_{i in g} ||g_i - mean_g||^2:  that of the mean gradient for the prompts of this batch, times N^2

        variance_ratio/<b>          V of b over V of the leave-one-out mean
        proxy_ratio/<b>             the same of the proxy sum_i sum_t n_it W_it^2, over the same responses
        cross_position_fraction/<b>    1 - sum_i sum_t ||W_it score_it||^2 / sum_i ||g_i||^2: what assumption A neglects

    Source: docs/hierarchical_derivation.md, section 5.

    Conventions: groups of one say nothing of a variance and are left out; with none left, or a reference of 0, nothing is reported. What responses of
    a group share through their baselines, a covariance of order 1/G^2, is not in V. The share is of second moments: negative where positions
    cancel, 0 where their scores are orthogonal.
    """
    if not groups:
        return {}
    variance, squares, same, proxy = torch.stack(list(groups)).double().sum(0)
    reference = BASELINES.index(REFERENCE)
    if not (variance[reference] > 0 and proxy[reference] > 0):
        return {}
    measured: dict[str, float] = {}
    for k, name in enumerate(BASELINES):
        measured[f"variance_ratio/{name}"] = float(variance[k] / variance[reference])
        measured[f"proxy_ratio/{name}"] = float(proxy[k] / proxy[reference])
        if squares[k] > 0:
            measured[f"cross_position_fraction/{name}"] = float(1 - same[k] / squares[k])
    return measured
