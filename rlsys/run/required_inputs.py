"""Inputs that a configured run must compute, and the keyword parameters of its estimator."""

from __future__ import annotations

from typing import Any

from rlsys.algorithms.advantages import Need, estimator_needs, get_advantage_estimator
from rlsys.config import RunConfig
from rlsys.registry import follow_token_limit
from rlsys.rewards import step_functions


def required_inputs(config: RunConfig) -> frozenset[Need]:
    """Return the inputs that the driver must compute before it assigns credit."""
    algorithm, policy = config.algorithm, config.policy
    recomputes = algorithm.advantage.recompute
    needs: set[Need] = set()
    if not recomputes:  # otherwise the ranks of the policy call the estimator
        needs |= estimator_needs(algorithm.advantage.name)
    if algorithm.kl.coefficient > 0:
        needs.add("ref_logprobs")
    if config.critic.enabled:
        needs.add("values")

    several_updates = policy.epochs * policy.num_mini_batches > 1 and not recomputes
    adapts_kl = algorithm.kl.target is not None
    needs_score_norms = "squared_score_norms" in needs  # computed in the same forward pass
    if several_updates or charges_tokens(config) or adapts_kl or needs_score_norms:
        needs.add("old_logprobs")
    return frozenset(needs)


# Inputs that every run can provide.
PROVIDED: frozenset[Need] = frozenset(
    (
        "rollout_logprobs",
        "old_logprobs",
        "ref_logprobs",
        "squared_score_norms",
        "greedy_rewards",
        "truncated",
        "reward_components",
        "problem_ids",
    )
)


def missing_inputs(config: RunConfig) -> frozenset[Need]:
    """Return the inputs of the configured estimator that no part of the run computes."""
    algorithm = config.algorithm
    provided = set(PROVIDED)
    if charges_tokens(config):
        provided.add("token_rewards")
    if step_functions(config.reward.functions):
        provided |= {"token_rewards", "step_ends"}
    if config.critic.enabled:
        provided.add("values")
    return estimator_needs(algorithm.advantage.name) - provided


def charges_tokens(config: RunConfig) -> bool:
    """Return whether the reward of each token has a KL penalty or an entropy bonus."""
    kl, entropy = config.algorithm.kl, config.algorithm.entropy
    return (kl.coefficient > 0 and kl.placement == "reward") or entropy.temperature > 0


def estimator_parameters(config: RunConfig) -> dict[str, Any]:
    """Return the keyword parameters of the configured estimator.

    A `max_tokens` that is null becomes `generation.max_tokens`.
    """
    advantage = config.algorithm.advantage
    estimator = get_advantage_estimator(advantage.name)
    return follow_token_limit(estimator, advantage.parameters, config.generation.max_tokens)
