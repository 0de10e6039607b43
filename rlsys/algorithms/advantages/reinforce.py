"""REINFORCE: the return itself."""

from __future__ import annotations

from rlsys.algorithms.advantages.contract import (
    AdvantageInputs,
    AdvantageOutput,
    register_advantage_estimator,
)
from rlsys.algorithms.advantages.returns import reward_to_go


@register_advantage_estimator("reinforce", unbiased=True)
def reinforce_advantages(inputs: AdvantageInputs) -> AdvantageOutput:
    """Return the reward-to-go, without a baseline.

        A_t = r + sum_{s >= t} r_s        r the outcome, r_s process rewards

    A token gets credit only for rewards from t on. With rewards in {0, 1} only right responses are
    learned from: RAFT.

    Source: Williams 1992; causality as in Sutton and Barto, section 13.3. RAFT: Dong et al. 2023
    (arXiv:2304.06767).

    Shapes: rewards [B], token_rewards [B, T] or None, response_mask [B, T] -> advantages [B, T].

    Conventions: undiscounted; a process reward at t counts for t itself; those outside the mask are
    ignored.
    """
    returns = reward_to_go(inputs.rewards, inputs.token_rewards, inputs.response_mask)
    return AdvantageOutput(advantages=returns)
