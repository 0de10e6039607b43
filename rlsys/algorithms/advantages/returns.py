"""Rewards along a response: rewards per token, rewards-to-go, and their normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.algorithms.advantages.grouping import at_least_float32


def suffix_sum(values: Tensor) -> Tensor:
    """Sum from t to the end: [B, T] -> [B, T]."""
    return values.flip(1).cumsum(1).flip(1)


def last_tokens(response_mask: Tensor) -> Tensor:
    """Return [B, T] bool, true at the last sampled token of each response.

    It is false everywhere in a response without tokens.
    """
    return response_mask & (suffix_sum(response_mask.long()) == 1)


def step_rewards(rewards: Tensor, token_rewards: Tensor | None, response_mask: Tensor) -> Tensor:
    """Return [B, T] the process reward of each token, plus the outcome at the last one.

    It is 0 outside the mask.

    Example: outcome 1, process rewards (0.5, 0.25): (0.5, 1.25).
    """
    at_last = torch.where(last_tokens(response_mask), at_least_float32(rewards)[:, None], 0.0)
    if token_rewards is None:
        return at_last
    return at_last + torch.where(response_mask, at_least_float32(token_rewards), 0.0)


def reward_to_go(rewards: Tensor, token_rewards: Tensor | None, response_mask: Tensor) -> Tensor:
    """Return [B, T] G_t = r + sum_{s >= t} r_s, the outcome plus the process rewards from t on.

    It is 0 outside the mask.
    """
    returns = at_least_float32(rewards)[:, None].expand(response_mask.shape)
    if token_rewards is not None:
        process = torch.where(response_mask, at_least_float32(token_rewards), 0.0)
        returns = returns + suffix_sum(process)
    return torch.where(response_mask, returns, 0.0)


def masked_moments(values: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (ddof 0) over the tokens of a batch.

    Both are 0 for a batch without tokens.
    """
    count = response_mask.sum().clamp(min=1)
    mean = torch.where(response_mask, values, 0.0).sum() / count
    variance = torch.where(response_mask, (values - mean) ** 2, 0.0).sum() / count
    return mean, variance.sqrt()


def check_eps(eps: float) -> None:
    """Refuse a negative epsilon, which could change the sign of the sum with it.

    Raises:
        ValueError: it is negative.
    """
    if eps < 0:
        raise ValueError(
            f"algorithm.advantage.parameters.eps: {eps} is negative; it is added to a standard "
            "deviation. Give a small number such as 1e-6."
        )


def check_std_ddof(std_ddof: int) -> None:
    """Refuse degrees of freedom other than those of the two conventions, 0 and 1.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    if std_ddof not in (0, 1):
        raise ValueError(
            f"algorithm.advantage.parameters.std_ddof: {std_ddof} is neither 0 (divide by G) nor 1 "
            "(divide by G - 1)"
        )


def whitened(values: Tensor, response_mask: Tensor, eps: float) -> Tensor:
    """Return [B, T] (x - mean) / (std + eps) over the tokens of the batch.

    It is exactly 0 where all values are equal, and outside the mask.

    Raises:
        ValueError: eps is negative.
    """
    check_eps(eps)
    mean, std = masked_moments(values, response_mask)
    inside = values[response_mask]
    if not len(inside) or bool(inside.max() == inside.min()):
        return torch.zeros_like(values)

    return torch.where(response_mask, (values - mean) / (std + eps), 0.0)
