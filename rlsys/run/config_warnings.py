"""Warnings about configurations that are accepted but may not do what was intended."""

from __future__ import annotations

from collections.abc import Iterator

from rlsys.algorithms.advantages import available_advantage_estimators, is_importance_corrected
from rlsys.algorithms.kl import GRADIENT_KINDS
from rlsys.algorithms.policy_objectives import ignores_ratio
from rlsys.config import RunConfig
from rlsys.data.prompt_stream import LoadedProblems
from rlsys.rewards import ground_truth_notices, has_accuracy
from rlsys.rewards.registry import reward_hooks


def config_warnings(config: RunConfig) -> Iterator[str]:
    """Yield warnings about settings that take effect but may not be intended.

    The configuration must have no mistakes. A dry run and the start of a run show the warnings.
    Each has field, value, effect and remedy.
    """
    yield from _objective_warnings(config)
    yield from _kl_warnings(config)
    yield from _staleness_warnings(config)
    yield from _schedule_warnings(config)
    yield from _reward_warnings(config)


def _objective_warnings(config: RunConfig) -> Iterator[str]:
    algorithm, policy = config.algorithm, config.policy
    weight = algorithm.objective.weight
    updates = policy.epochs * policy.num_mini_batches
    corrected = algorithm.advantage.recompute  # the estimator corrects, before each mini-batch

    if updates > 1 and not corrected and ignores_ratio(weight, algorithm.objective.parameters):
        yield (
            f"algorithm.objective.weight: {weight!r} does not correct for the policy having moved, "
            f"and {updates} updates per batch (policy.epochs {policy.epochs}, "
            f"policy.num_mini_batches {policy.num_mini_batches}) make all but the first "
            "off-policy. Set both to 1, or choose a weight that uses the ratio, such as ppo_clip."
        )


def _kl_warnings(config: RunConfig) -> Iterator[str]:
    kl, policy = config.algorithm.kl, config.policy
    uses_ratio = kl.coefficient > 0 and kl.importance_ratio != "none"
    updates = policy.epochs * policy.num_mini_batches
    # With the other kinds the gradient flows through the ratio, which matters even where it is 1.
    only_weighted = kl.estimator in GRADIENT_KINDS

    if uses_ratio and only_weighted and updates == 1:
        yield (
            f"algorithm.kl.importance_ratio: {kl.importance_ratio!r} with kind {kl.estimator!r} "
            "changes nothing in the one update per batch, where live and old policy are the same. "
            "Set it to none, or raise policy.num_mini_batches or policy.epochs."
        )


def _staleness_warnings(config: RunConfig) -> Iterator[str]:
    """Warn where nothing corrects for samples of older weights, or only a part is corrected."""
    staleness, algorithm = config.trainer.max_staleness, config.algorithm
    if not staleness:
        return

    advantage = algorithm.advantage
    corrected = is_importance_corrected(advantage.name, advantage.parameters)
    if algorithm.rollout_correction.level == "none" and not corrected:
        suitable = [e for e in available_advantage_estimators() if is_importance_corrected(e)]
        yield (
            f"trainer.max_staleness: {staleness} without a correction trains samples of older "
            "weights as if the present policy had drawn them: the ratio of the objective is that "
            "of the live policy and the trainer's weights at the start of the update. Set "
            "algorithm.rollout_correction.level to token or sequence, or choose an estimator that "
            f"corrects ({', '.join(suitable)})."
        )
    if algorithm.kl.coefficient > 0 and algorithm.kl.estimator != "exact":
        yield (
            f"algorithm.kl.kind: {algorithm.kl.estimator!r} estimates the KL from the sampled "
            f"tokens, and with trainer.max_staleness {staleness} older weights have drawn them; "
            "no correction reaches this term. Set kind exact, which does not depend on the sampled "
            "token."
        )


def _schedule_warnings(config: RunConfig) -> Iterator[str]:
    trained = {"policy": (config.policy.optimizer, config.policy_steps)}
    if config.critic.enabled:
        trained["critic"] = (config.critic.optimizer, config.trainer.steps)

    for role, (optimizer, steps) in trained.items():
        if optimizer.warmup_steps <= steps:
            continue
        final = optimizer.learning_rate * steps / optimizer.warmup_steps
        total = "trainer.steps"
        if steps < config.trainer.steps:
            total = "trainer.steps - critic.warmup_steps"
        yield (
            f"{role}.optimizer.warmup_steps: {optimizer.warmup_steps} is above {total} {steps}, so "
            f"the learning rate ends at {final:.3g} and never reaches "
            f"{role}.optimizer.learning_rate {optimizer.learning_rate:g}. Lower it, or train "
            "longer."
        )


def _reward_warnings(config: RunConfig) -> Iterator[str]:
    """Warn where accuracy could be measured and is not."""
    functions = config.reward.functions
    if has_accuracy(functions):
        return
    judges = [f.name for f in functions if reward_hooks(f.name).reads_ground_truth is not None]
    if judges:
        yield (
            f"reward.functions: the first is {functions[0].name!r}, a model, so no accuracy is "
            f"measured, although {judges[0]!r} could decide it. Name {judges[0]!r} first."
        )


def reward_notices(config: RunConfig, problems: LoadedProblems) -> list[str]:
    """Return remarks on the ground truths of the data, for the user."""
    answers = {
        "data.train": [problem.answer for problem in problems.train],
        "data.eval": [problem.answer for problem in problems.evaluation],
    }
    return ground_truth_notices(config.reward.functions, answers)
