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
        config.policy.epochs * config.policy.num_mini_batches > 1
        and not algorithm.advantage.recompute
    )
    if (
        several_updates
        or charges_tokens(config)
        or algorithm.kl.target is not None
        or "squared_score_norms" in needs
    ):
        needs.add("old_logprobs")
    return frozenset(needs)


# What a run has for an estimator, besides the rewards of tokens: no critic, and no steps of a response.
PROVIDED: frozenset[Need] = frozenset(
    (
        "rollout_logprobs",
        "old_logprobs",
        "ref_logprobs",
        "squared_score_norms",
        "greedy_rewards",
        "truncated",
    )
)


def missing_inputs(config: RunConfig) -> frozenset[Need]:
    """Return what the configured estimator needs and no part of the run computes."""
    algorithm = config.algorithm
    provided = set(PROVIDED)
    if charges_tokens(config):
        provided.add("token_rewards")
    return estimator_needs(algorithm.advantage.name) - provided


def charges_tokens(config: RunConfig) -> bool:
    """Return whether a KL or an entropy is part of the reward of each token."""
    kl, entropy = config.algorithm.kl, config.algorithm.entropy
    return (kl.coefficient > 0 and kl.placement == "reward") or entropy.temperature > 0


def estimator_parameters(config: RunConfig) -> dict[str, Any]:
    """The keyword parameters that the configured estimator is called with: a `max_tokens` that is null follows `generation.max_tokens`."""
    advantage = config.algorithm.advantage
    estimator = get_advantage_estimator(advantage.name)
    return follow_token_limit(estimator, advantage.parameters, config.generation.max_tokens)
