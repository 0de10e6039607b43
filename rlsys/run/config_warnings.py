"""Configurations that are accepted and computed as they are, and are easily not meant."""

from __future__ import annotations

from collections.abc import Iterator

from rlsys.algorithms.kl import GRADIENT_KINDS
from rlsys.algorithms.policy_objectives import ignores_ratio
from rlsys.config import RunConfig
from rlsys.data.prompt_stream import LoadedProblems
from rlsys.rewards import ground_truth_notices


def config_warnings(config: RunConfig) -> Iterator[str]:
    """Yield what is accepted and computed as configured, but is easily not what was meant.

    For a configuration without mistakes. Shown on the console by a dry run and before a run starts;
    each line names field and value, says what happens, and gives the remedy.
    """
    yield from _objective_warnings(config)
    yield from _kl_warnings(config)
    yield from _schedule_warnings(config)


def _objective_warnings(config: RunConfig) -> Iterator[str]:
    algorithm, policy = config.algorithm, config.policy
    weight = algorithm.objective.weight
    updates = policy.epochs * policy.num_mini_batches
    corrected = algorithm.advantage.recompute  # by the estimator, before each mini-batch
    if updates > 1 and not corrected and ignores_ratio(weight, algorithm.objective.parameters):
        yield (
            f"algorithm.objective.weight: {weight!r} does not correct for the policy having moved, "
            "and "
            f"{updates} updates a batch (policy.epochs {policy.epochs}, policy.num_mini_batches "
            f"{policy.num_mini_batches}) "
            "make all but the first off-policy. Set both to 1, or choose a weight that uses the "
            "ratio, such as ppo_clip."
        )


def _kl_warnings(config: RunConfig) -> Iterator[str]:
    kl, policy = config.algorithm.kl, config.policy
    weighs_only = kl.estimator in GRADIENT_KINDS
    if (
        kl.coefficient > 0
        and kl.importance_ratio != "none"
        and weighs_only
        and policy.epochs * policy.num_mini_batches == 1
    ):
        yield (
            f"algorithm.kl.importance_ratio: {kl.importance_ratio!r} with kind {kl.estimator!r} "
            "changes nothing in the one update a batch, where live "
            "and old policy are the same. Set it to none, or raise policy.num_mini_batches or "
            "policy.epochs."
        )


def _schedule_warnings(config: RunConfig) -> Iterator[str]:
    optimizer, steps = config.policy.optimizer, config.trainer.steps
    if optimizer.warmup_steps > steps:
        yield (
            f"policy.optimizer.warmup_steps: {optimizer.warmup_steps} is above trainer.steps "
            f"{steps}, so the learning rate ends at "
            f"{optimizer.learning_rate * steps / optimizer.warmup_steps:.3g} and never reaches "
            "policy.optimizer.learning_rate "
            f"{optimizer.learning_rate:g}. Lower it, or train longer."
        )


def reward_notices(config: RunConfig, problems: LoadedProblems) -> list[str]:
    """Return what a person should know about the ground truths of the data."""
    answers = {
        "data.train": [problem.answer for problem in problems.train],
        "data.eval": [problem.answer for problem in problems.evaluation],
    }
    return ground_truth_notices(config.reward.functions, answers)
