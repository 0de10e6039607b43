"""Generalized advantage estimation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlsys.algorithms.advantages.contract import (
    AdvantageInputs,
    AdvantageOutput,
    register_advantage_estimator,
)
from rlsys.algorithms.advantages.grouping import at_least_float32
from rlsys.algorithms.advantages.returns import (
    check_eps,
    last_tokens,
    step_rewards,
    whitened,
)

if TYPE_CHECKING:
    from rlsys.config import RunConfig


def _validate(*, gamma: float, lam: float, eps: float, **_: object) -> None:
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"algorithm.advantage.parameters.{name}: {value} is outside [0, 1]")
    check_eps(eps)


def _undiscounted(parameters: Mapping[str, Any]) -> bool:
    discounts = (parameters.get("gamma", 1.0), parameters.get("lam", 1.0))
    return discounts == (1.0, 1.0) and not parameters.get("whiten", False)


def _check(config: RunConfig) -> Iterator[str]:
    bootstraps = config.algorithm.advantage.parameters.get("bootstrap_truncated", False)
    if bootstraps and not config.critic.enabled:
        yield (
            "algorithm.advantage.parameters.bootstrap_truncated: true takes the value after a "
            "truncated response from a critic, and there is none. Set critic.enabled true, or "
            "leave it out."
        )


@register_advantage_estimator(
    "gae", reads=("values",), unbiased=_undiscounted, check=_check, validate=_validate
)
def gae_advantages(
    inputs: AdvantageInputs,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    bootstrap_truncated: bool = False,
    whiten: bool = False,
    eps: float = 1e-8,
) -> AdvantageOutput:
    """Return an exponentially weighted mixture of n-step advantages.

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t = delta_t + gamma lam A_{t+1},    returns_t = A_t + V_t

    Source: Schulman et al. 2016, equation 16 (arXiv:1506.02438).

    Shapes: rewards [B], token_rewards and values [B, T], truncated [B] -> advantages and returns
    [B, T].

    Conventions: `gamma` is the discount per token. `lam` is the weight of longer returns, lambda.
    V_t is the value before token t; the outcome is the reward of the last token. After the last
    token the value is 0, for truncated responses as well: they get a reward as they are, so the
    token limit is an end like any other. `bootstrap_truncated` instead takes V of the last token
    for the unknown value after it. That is for rewards that do not count a truncated response as
    finished: the target of the last value then contains the value itself, and a critic that is
    trained on it drifts by the outcome in every step. t runs over the mask: tool tokens in between
    are skipped and not discounted. Without a critic (`values` None) V is 0, and gamma = lam = 1
    gives the reward-to-go. `whiten` normalises the advantages over the batch's tokens (ddof 0, eps
    added to std); returns are not whitened.

    Example: rewards at two tokens (0, 1), values (0.5, 0.5), gamma = 1, lam = 0.5: delta =
    (0, 0.5), A = (0.25, 0.5), returns (0.75, 1).

    Raises:
        ValueError: gamma or lam outside [0, 1], or a negative eps.
    """
    _validate(gamma=gamma, lam=lam, eps=eps)
    mask = inputs.response_mask
    rewards = step_rewards(inputs.rewards, inputs.token_rewards, mask)
    values = torch.zeros_like(rewards)
    if inputs.values is not None:
        values = torch.where(mask, at_least_float32(inputs.values), 0.0)

    after = values.new_zeros(len(values))
    if bootstrap_truncated and inputs.truncated is not None:
        after = torch.where(inputs.truncated, (values * last_tokens(mask)).sum(1), 0.0)
    advantages = _scan(rewards, values, after, mask, gamma, gamma * lam)
    returns = torch.where(mask, advantages + values, 0.0)
    if whiten:
        advantages = whitened(advantages, mask, eps)
    return AdvantageOutput(advantages=advantages, returns=returns)


def _scan(
    rewards: Tensor, values: Tensor, after: Tensor, mask: Tensor, gamma: float, decay: float
) -> Tensor:
    """Compute [B, T] advantages from the last token to the first.

    `after` [B] is the value after the last token. A token outside the mask leaves the recursion
    unchanged.
    """
    advantages = torch.zeros_like(rewards)
    running, next_value = torch.zeros_like(after), after
    for t in range(mask.shape[1] - 1, -1, -1):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(here, delta + decay * running, running)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = torch.where(here, running, 0.0)
    return advantages
