"""What a configured run must have computed for its estimator, and the keyword parameters that the estimator is called with."""

from __future__ import annotations

from typing import Any

from rlsys.algorithms.advantages import Need, estimator_needs, get_advantage_estimator
from rlsys.config import RunConfig
from rlsys.registry import follow_token_limit


def required_inputs(config: RunConfig) -> frozenset[Need]:
    """What the driver must have computed before credit is assigned: for the estimator, unless the policy's ranks ask it, and for everything else."""
    algorithm = config.algorithm
    needs: set[Need] = (
        set() if algorithm.advantage.recompute else set(estimator_needs(algorithm.advantage.name))
    )
    if algorithm.kl.coefficient > 0:
        needs.add("ref_logprobs")
    several_updates = (
        config.policy.epochs * config.policy.mini_batches > 1 and not algorithm.advantage.recompute
    )
    in_rewards = (
        algorithm.kl.coefficient > 0 and algorithm.kl.placement == "reward"
    ) or algorithm.entropy.temperature > 0
    if several_updates or in_rewards or algorithm.kl.target is not None or "score_norms" in needs:
        needs.add("old_logprobs")
    return frozenset(needs)


def estimator_parameters(config: RunConfig) -> dict[str, Any]:
    """The keyword parameters that the configured estimator is called with: a `max_tokens` that is null follows `generation.max_tokens`."""
    advantage = config.algorithm.advantage
    estimator = get_advantage_estimator(advantage.name)
    return follow_token_limit(estimator, advantage.parameters, config.generation.max_tokens)
