"""REINFORCE with a moving average of the rewards of each problem as its baseline."""

from __future__ import annotations

from typing import Any

import torch

from rlsys.algorithms.advantages.contract import (
    AdvantageInputs,
    AdvantageOutput,
    register_advantage_estimator,
)
from rlsys.algorithms.advantages.grouping import outcome_rewards
from rlsys.algorithms.advantages.returns import reward_to_go


def _validate(*, decay: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(
            f"algorithm.advantage.parameters.decay: {decay} is outside [0, 1). Give the factor per "
            "response, such as 0.95."
        )


@register_advantage_estimator("rae", needs=("problem_ids",), validate=_validate)
def rae_advantages(inputs: AdvantageInputs, *, decay: float = 0.95) -> AdvantageOutput:
    """Return the reward-to-go minus the moving average of the earlier rewards of the problem.

        A_t = G_t - m / w
        m <- decay^n m + (1 - decay^n) mean(R),   w <- decay^n w + 1 - decay^n   after the batch

    m and w are those of the response's problem, R the whole rewards of its n responses in the
    batch. Unlike a baseline of the group it works with one response per prompt, and gives a group
    of equal rewards a gradient as long as they differ from the earlier ones.

    Source: Liu et al. 2025, SPIRAL, role-conditioned advantage estimation (arXiv:2506.24119), and
    its code, with a problem in place of a game and a role.

    Shapes: rewards [B], token_rewards [B, T] or None, problem_ids [B] -> advantages [B, T].

    Conventions: the average is that before the batch, so it leaves the gradient unbiased. SPIRAL
    updates after every game; here the n responses of a batch move the average together, as far as n
    games with their mean reward would, and their order does not matter. SPIRAL's average starts at
    0; here m is divided by its weight w, which corrects for the start, so that the baseline of a
    problem's second visit is the mean of its first. A problem that was not seen before has the
    baseline 0. `decay` is the factor per response. The estimator's state has two numbers for each
    problem seen; a problem is known by its id in the data.

    Example: decay 1/2, first visit with rewards (1, 0): advantages (1, 0), then m = 3/8, w = 3/4;
    second visit: baseline 1/2.

    Raises:
        ValueError: a decay outside [0, 1).
    """
    _validate(decay=decay)
    assert inputs.problem_ids is not None, "problem_ids are declared in `needs`"
    problems = list(inputs.problem_ids)
    known: dict[str, list[float]] = dict(inputs.state.get("averages", {}))

    baselines = [_baseline(known.get(problem)) for problem in problems]
    returns = reward_to_go(inputs.rewards, inputs.token_rewards, inputs.response_mask)
    column = returns.new_tensor(baselines)[:, None]
    advantages = torch.where(inputs.response_mask, returns - column, 0.0)

    totals = outcome_rewards(inputs.rewards, inputs.token_rewards, inputs.response_mask).tolist()
    seen = sum(problem in known for problem in problems)
    state: dict[str, Any] = {"averages": _updated(known, problems, totals, decay)}
    return AdvantageOutput(
        advantages=advantages,
        state=state,
        diagnostics={
            "baseline": sum(baselines) / max(len(baselines), 1),
            "seen_before": seen / max(len(problems), 1),
        },
    )


def _baseline(average: list[float] | None) -> float:
    if average is None or not average[1]:
        return 0.0
    return average[0] / average[1]


def _updated(
    known: dict[str, list[float]], problems: list[str], rewards: list[float], decay: float
) -> dict[str, list[float]]:
    """Return the averages after a batch."""
    of_problem: dict[str, list[float]] = {}
    for problem, reward in zip(problems, rewards, strict=True):
        of_problem.setdefault(problem, []).append(reward)

    averages = dict(known)
    for problem, values in of_problem.items():
        value, weight = known.get(problem, [0.0, 0.0])
        keep = decay ** len(values)
        mean = sum(values) / len(values)
        averages[problem] = [keep * value + (1 - keep) * mean, keep * weight + 1 - keep]
    return averages
