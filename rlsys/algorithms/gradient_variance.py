"""The true variance of the policy gradient under different baselines.

It is computed from the gradients of single responses. The hierarchical diagnostics estimate it from
a proxy of each squared score norm and without the products of different positions. Here scores are
vectors: those of one linear map y = A x of the model after which nothing mixes positions, such as
the last layer's down projection. There

    score_t = d log pi_t / d A = o_t x_t^T,     o_t = d log pi_t / d y

with o_t and the input x_t taken at the position that predicts t. So all scores of a batch come from
one backward pass, without a gradient for each.
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
    """Sums over the responses of one group, under each of K baselines."""

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
        """Return [4, K] the variance over the group's `size` > 1 responses, and the three sums.

        The variance is that of the group's mean gradient times size^2.
        """
        square_of_sum = self.gradient.square().sum((1, 2))
        variance = size / (size - 1) * (self.squares - square_of_sum / size)
        return torch.stack([variance, self.squares, self.same_position, self.proxy])


def response_moments(
    weights: Tensor, outward: Tensor, inward: Tensor, norms: Tensor
) -> GroupMoments:
    """Compute the moments of one response: g = sum_t W_t score_t = O^T diag(W) X.

    Shapes: weights [K, t], outward [t, d], inward [t, f], norms [t] the proxy of ||score_t||^2.
    """
    gradient = (weights[:, :, None] * outward).transpose(1, 2) @ inward
    true_norms = outward.square().sum(1) * inward.square().sum(1)
    return GroupMoments(
        gradient=gradient,
        squares=gradient.square().sum((1, 2)),
        same_position=(weights.square() * true_norms).sum(1),
        proxy=(weights.square() * norms).sum(1),
    )


def plain_weights(rewards: Tensor, ratios: Tensor) -> Tensor:
    """Compute the policy-gradient weight of each response of a group under three baselines.

        rho_{<=L} (R - b),   b = 0 | mean of the group | mean of the other responses

    Shapes: rewards and ratios of whole responses [G] -> [3, G].
    """
    present = torch.ones_like(rewards, dtype=torch.bool)
    none = torch.zeros_like(rewards)
    group_mean = rewards.mean().expand_as(rewards)
    leave_one_out = others_mean(rewards[None], present[None])[0]
    return ratios * (rewards - torch.stack([none, group_mean, leave_one_out]))


def gradient_diagnostics(groups: Sequence[Tensor]) -> dict[str, float]:
    """Return variance ratios from the `GroupMoments.spread` of all groups.

        V = sum_g G/(G-1) sum_{i in g} ||g_i - mean_g||^2

        variance_ratio/<b>           V of b over V of the leave-one-out baseline
        proxy_ratio/<b>              the same of the proxy sum_i sum_t n_it W_it^2
        cross_position_fraction/<b>  1 - sum_i sum_t ||W_it score_it||^2 / sum_i ||g_i||^2

    V is the variance of the mean gradient given the prompts of this batch, times N^2. The last
    number is the part that assumption A neglects.

    Source: docs/hierarchical_derivation.md, section 5.

    Conventions: baselines come in the order of BASELINES. Groups of one have no variance and are
    left out; with none left, or a reference of 0, nothing is reported. V leaves out the covariance,
    of order 1/G^2, of responses whose baselines contain each other's rewards. The fraction is of
    second moments: negative where positions cancel, 0 where their scores are orthogonal.
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
