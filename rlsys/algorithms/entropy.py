"""Maximum-entropy reinforcement learning: entropy as a reward, with a temperature that finds its own value."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def entropy_rewards(old_logprobs: Tensor, response_mask: Tensor, temperature: float) -> Tensor:
    """[B, T] -alpha log pi(y_t | y_<t): each token earns its surprise, so the reward-to-go of an estimator contains the entropy that is still to come.

    E[-log pi] is the entropy, hence maximising the sum maximises E[R] + alpha H. Unlike an entropy bonus in the loss, credit also
    flows to the tokens that lead to uncertain continuations.

    Source: Haarnoja et al. 2018, Soft Actor-Critic, equation 1 (arXiv:1812.05905).

    Shapes: [B, T] -> [B, T] float32 or better, 0 outside the mask.
    """
    logs = old_logprobs if old_logprobs.dtype == torch.float64 else old_logprobs.float()
    return torch.where(response_mask, -temperature * logs, 0.0)


def tuned_temperature(
    temperature: float, entropy: float, *, target: float, learning_rate: float
) -> float:
    """The temperature for the next batch: one step on J(alpha) = alpha (H - H_target), taken in log alpha so that it stays positive.

        log alpha <- log alpha - learning_rate (H - H_target)

    It rises while the entropy (nats a token) is below its target, and falls while it is above.

    Source: Haarnoja et al. 2018, Soft Actor-Critic Algorithms and Applications, section 5, equation 18 (arXiv:1812.05905).
    """
    return temperature * math.exp(-learning_rate * (entropy - target))
