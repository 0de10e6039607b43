"""Maximum-entropy reinforcement learning: entropy as a reward, with a tuned temperature."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def entropy_rewards(old_logprobs: Tensor, response_mask: Tensor, temperature: float) -> Tensor:
    """Compute the entropy bonus of each token in the reward: -alpha log pi(y_t | y_<t).

    E[-log pi] is the entropy, hence maximising the sum maximises E[R] + alpha H. The reward-to-go
    of an estimator contains the entropy of later tokens. So, unlike an entropy bonus in the loss,
    it also gives credit to the tokens that lead to uncertain continuations.

    Source: Haarnoja et al. 2018, Soft Actor-Critic, equation 1 (arXiv:1812.05905).

    Shapes: [B, T] -> [B, T] float32 or better, 0 outside the mask.
    """
    logs = old_logprobs if old_logprobs.dtype == torch.float64 else old_logprobs.float()
    return torch.where(response_mask, -temperature * logs, 0.0)


def tuned_temperature(
    temperature: float, entropy: float, *, target: float, learning_rate: float
) -> float:
    """Compute the temperature for the next batch: one step on J(alpha) = alpha (H - H_target).

        log alpha <- log alpha - learning_rate (H - H_target)

    The step is taken in log alpha, so that alpha stays positive. It rises while the entropy (nats
    per token) is below its target, and falls while it is above.

    Source: Haarnoja et al. 2018, Soft Actor-Critic Algorithms and Applications, section 5,
    equation 18 (arXiv:1812.05905).
    """
    return temperature * math.exp(-learning_rate * (entropy - target))
