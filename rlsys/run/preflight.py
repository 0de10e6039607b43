"""Checks of a configuration before Ray starts."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

from rlsys.algorithms.advantages import (
    available_advantage_estimators,
    carries_kl,
    check_advantage_estimator,
    compares_group,
    estimator_needs,
    estimator_spec,
    get_advantage_estimator,
    is_importance_corrected,
    is_unbiased,
    reads_values,
)
from rlsys.algorithms.kl import KLLossTerms, check_exact_kl, check_kl_in_reward, check_kl_loss
from rlsys.algorithms.policy_objectives import check_objective
from rlsys.config import RewardFunctionConfig, RunConfig
from rlsys.config.cross_field_rules import contradictions
from rlsys.config.errors import Mistakes
from rlsys.config.hardware import Hardware
from rlsys.data.prompt_templates import load_template
from rlsys.models import check_model_path
from rlsys.plugins import load_plugins
from rlsys.registry import follow_token_limit
from rlsys.rewards import (
    available_reward_functions,
    check_reward_function,
    get_reward_function,
    has_accuracy,
    reward_model_of,
    reward_model_role,
    step_functions,
)
from rlsys.rewards.learned import PATH_FIELD, learned_contradictions
from rlsys.rewards.registry import reward_hooks
from rlsys.run.directory import RunDirectory
from rlsys.run.evaluated_model import check_evaluated_path
from rlsys.run.machine_checks import machine_mistakes
from rlsys.run.observers.run_status import refuse_running
from rlsys.run.plan import shown_parameters
from rlsys.run.required_inputs import estimator_parameters, missing_inputs
from rlsys.run.storage import check_storage

CONNECT_LIMIT_S = 3.0
LAST_PORT = 65535


def config_mistakes(
    config: RunConfig, directory: RunDirectory, hardware: Hardware, *, resume: bool
) -> list[str]:
    """Return the mistakes in a configuration, a line each, before any process is started.

    The data and the files of the model are checked elsewhere, by `load_problems` and `check_model`.
    Of the functions of a plug-in, only `validate` is called.

    Raises:
        ValueError: a plug-in cannot be loaded, so that the names it registers are unknown.
    """
    load_plugins(config.plugins)
    mistakes = Mistakes()

    for field, check in _checks(config, directory, resume=resume):
        mistakes.attempt(field, check)

    mistakes.lines += contradictions(config)
    mistakes.lines += _estimator_contradictions(config)
    mistakes.lines += _accuracy_contradictions(config)
    mistakes.lines += learned_contradictions(config.reward.functions)
    mistakes.lines += machine_mistakes(config, hardware)
    return mistakes.lines


def future_reward_model_mistakes(config: RunConfig) -> list[str]:
    """Return the mistakes in the rewards of a run whose reward model is yet to be trained.

    They are those of `config_mistakes` that depend on the rewards and on no file of the model. Its
    `path` may be any text.

    Raises:
        ValueError: a plug-in cannot be loaded, so that the names it registers are unknown.
    """
    load_plugins(config.plugins)
    mistakes = Mistakes()

    for function in config.reward.functions:
        mistakes.attempt(
            "reward.functions",
            lambda function=function: check_reward(function, config.generation.max_tokens),
        )
    model = reward_model_of(config.reward.functions)
    if model is not None and _is_valid(model):
        mistakes.attempt(PATH_FIELD, lambda: _check_reward_model_ranks(config))

    mistakes.lines += contradictions(config)
    mistakes.lines += _estimator_contradictions(config)
    mistakes.lines += _accuracy_contradictions(config)
    mistakes.lines += learned_contradictions(config.reward.functions)
    return mistakes.lines


def _checks(
    config: RunConfig, directory: RunDirectory, *, resume: bool
) -> Iterator[tuple[str, Callable[[], object]]]:
    objective = config.algorithm.objective
    yield "run.directory", lambda: directory.check(resume=resume)
    if resume:
        yield "run.directory", lambda: refuse_running(directory)
    yield "run.storage", lambda: check_storage(config.run, directory, resume=resume)
    yield "model.path", lambda: check_model_path(config.model.path)
    yield "reference.path", lambda: _check_path("reference.path", config.reference.path)
    if config.critic.enabled:
        yield "critic.path", lambda: _check_path("critic.path", config.critic.path)
    yield "data.template", lambda: load_template(config.data.template)
    yield "algorithm.advantage", lambda: _check_estimator(config)
    yield (
        "algorithm.objective",
        lambda: check_objective(objective.ratio, objective.weight, objective.parameters),
    )
    yield "algorithm.kl", lambda: _check_kl(config)
    yield "cluster.address", lambda: check_address(config)
    for function in config.reward.functions:
        yield (
            "reward.functions",
            lambda function=function: check_reward(function, config.generation.max_tokens),
        )
    yield PATH_FIELD, lambda: _check_reward_model(config)


def _check_path(field: str, path: str | None) -> None:
    if path is None:
        return
    try:
        check_model_path(path)
    except ValueError as error:
        raise ValueError(str(error).replace("model.path:", f"{field}:", 1)) from error


def _check_estimator(config: RunConfig) -> None:
    advantage, limit = config.algorithm.advantage, config.generation.max_tokens
    get_advantage_estimator(advantage.name)

    parameters = estimator_parameters(config)
    check_advantage_estimator(advantage.name, parameters)
    if parameters.get("max_tokens", limit) < limit:
        raise ValueError(
            f"algorithm.advantage.parameters.max_tokens: {parameters['max_tokens']} is below "
            f"generation.max_tokens {limit}, so longer responses would not fit. Leave it null, "
            "which means generation.max_tokens."
        )


def _check_kl(config: RunConfig) -> None:
    """Refuse a KL term whose gradient is not that of the KL that it names."""
    kl = config.algorithm.kl
    if kl.coefficient == 0:
        return
    if kl.estimator == "exact":
        check_exact_kl(kl.direction, kl.level, kl.importance_ratio, kl.placement)
        return
    if kl.placement == "loss":
        check_kl_loss(KLLossTerms(kl.estimator, kl.direction, kl.level, kl.importance_ratio))
    else:
        check_kl_in_reward(kl.estimator, kl.direction, kl.placement)


def check_reward(function: RewardFunctionConfig, token_limit: int) -> None:
    """Refuse an unknown reward function, or parameters that do not fit it or the token limit.

    Raises:
        ValueError: the function or parameter, with the remedy.
    """
    reward = get_reward_function(function.name)
    parameters = follow_token_limit(reward, function.parameters, token_limit)
    check_reward_function(function.name, parameters)
    if parameters.get("max_tokens", 0) > token_limit:
        raise ValueError(
            f"reward.functions.parameters.max_tokens: {parameters['max_tokens']} of "
            f"{function.name!r} is above generation.max_tokens {token_limit}, so no response "
            "reaches it. Leave it null, which means generation.max_tokens."
        )


def _check_reward_model(config: RunConfig) -> None:
    """Refuse a reward model that does not exist, or that has more ranks than the policy."""
    function = reward_model_of(config.reward.functions)
    if function is None or not _is_valid(function):
        return  # `check_reward` refuses its parameters
    check_evaluated_path(function.parameters["path"], PATH_FIELD)
    _check_reward_model_ranks(config)


def _check_reward_model_ranks(config: RunConfig) -> None:
    ranks = reward_model_role(config).ranks
    if ranks > config.policy.ranks:
        raise ValueError(
            f"reward.functions.parameters.ranks: {ranks} is above policy.ranks "
            f"{config.policy.ranks}, and each rank of the reward model runs beside one of the "
            "policy. Lower it, or leave it null."
        )


def _is_valid(function: RewardFunctionConfig) -> bool:
    try:
        check_reward_function(function.name, function.parameters)
    except ValueError:
        return False
    return True


def _accuracy_contradictions(config: RunConfig) -> Iterator[str]:
    """Yield options that read an accuracy where the rewards decide none, or a wrong one."""
    functions = config.reward.functions
    first = functions[0].name
    if first in available_reward_functions() and not reward_hooks(first).scores:
        yield (
            f"reward.functions: {first!r} is first, where it decides accuracy, and its score is "
            "always 0, so every response would count as wrong. Put a function such as math first, "
            "with weight 0 if it is not to be rewarded."
        )
    dynamic = config.algorithm.dynamic_sampling
    by_accuracy = dynamic.max_rounds > 1 and dynamic.by == "accuracy"
    if by_accuracy and not has_accuracy(functions):
        yield (
            f"algorithm.dynamic_sampling.by: 'accuracy' needs right and wrong responses, and the "
            f"first of reward.functions is {first!r}, which decides none. Set it to reward, or put "
            "a function such as math first."
        )


def _estimator_contradictions(config: RunConfig) -> Iterator[str]:
    """Yield fields that contradict the declarations of the configured estimator."""
    name = config.algorithm.advantage.name
    if name not in available_advantage_estimators():
        return  # `_check_estimator` refuses the name
    yield from _group_contradictions(config, name)
    yield from _kl_contradictions(config, name)
    yield from _recompute_contradictions(config, name)
    yield from _staleness_contradictions(config, name)
    yield from _critic_contradictions(config, name)
    yield from _step_contradictions(config, name)
    yield from estimator_spec(name).check(config)
    for need in sorted(missing_inputs(config)):
        remedy = "Set critic.enabled true, or choose" if need == "values" else "Choose"
        yield (
            f"algorithm.advantage.name: {name!r} needs {need}, which no part of this run computes. "
            f"{remedy} another estimator."
        )


def _critic_contradictions(config: RunConfig, name: str) -> Iterator[str]:
    if config.critic.enabled and not reads_values(name):
        suitable = [e for e in available_advantage_estimators() if reads_values(e)]
        yield (
            f"critic.enabled: true trains a critic that the estimator {name!r} does not read. Set "
            f"it to false, or choose --algorithm.advantage.name {' or '.join(suitable)}."
        )


def _step_contradictions(config: RunConfig, name: str) -> Iterator[str]:
    """Yield settings that would lose the rewards of steps, or that lack them."""
    giving = step_functions(config.reward.functions)
    use = estimator_spec(name).step_rewards
    if use == "needed" and not giving:
        given = ", ".join(function.name for function in config.reward.functions)
        steps = [f for f in available_reward_functions() if reward_hooks(f).steps]
        yield (
            f"algorithm.advantage.name: {name!r} compares the rewards of steps, and "
            f"reward.functions ({given}) rewards whole responses alone. Add a function that "
            f"rewards steps ({', '.join(steps)}, or your own), or choose another estimator, such "
            "as grpo."
        )
    if not giving:
        return

    if use == "refused":
        estimators = available_advantage_estimators()
        suitable = [e for e in estimators if estimator_spec(e).step_rewards == "needed"]
        yield (
            f"reward.functions: {giving[0]!r} rewards steps, and the estimator {name!r} is defined "
            "for rewards of whole responses alone. Remove the function, or choose another "
            f"algorithm.advantage.name: {', '.join(suitable)}, or one that sums rewards, as gae."
        )
    sampling = config.algorithm.dynamic_sampling
    if sampling.max_rounds > 1 and sampling.by == "reward":
        yield (
            "algorithm.dynamic_sampling.by: 'reward' drops groups of equal rewards, whose steps "
            f"may still differ in the rewards of {giving[0]!r}. Choose accuracy, or set "
            "algorithm.dynamic_sampling.max_rounds to 1."
        )
    if config.diagnostics.gradient:
        yield (
            "diagnostics.gradient: true compares with baselines of the rewards of whole responses, "
            f"to which those of steps ({giving[0]}) do not belong. Set it to false."
        )


def _group_contradictions(config: RunConfig, name: str) -> Iterator[str]:
    parameters = config.algorithm.advantage.parameters
    if config.generation.samples_per_prompt == 1 and compares_group(name, parameters):
        suitable = [e for e in available_advantage_estimators() if not compares_group(e)]
        yield (
            f"generation.samples_per_prompt: 1 gives {name!r} nothing to compare, so every "
            "advantage would be 0. Sample at least 2, or choose another algorithm.advantage.name "
            f"({', '.join(suitable)})."
        )


def _kl_contradictions(config: RunConfig, name: str) -> Iterator[str]:
    kl = config.algorithm.kl
    if carries_kl(name) and (kl.placement != "advantage" or kl.coefficient == 0):
        yield (
            f"algorithm.kl: the estimator {name!r} carries the KL itself, but placement is "
            f"{kl.placement!r} and coefficient {kl.coefficient:g}. Set --algorithm.kl.placement "
            "advantage and a coefficient above 0."
        )
    if kl.placement == "advantage" and not carries_kl(name):
        suitable = [e for e in available_advantage_estimators() if carries_kl(e)]
        yield (
            "algorithm.kl.placement: 'advantage' needs an estimator that carries the KL, and "
            f"{name!r} does not. Choose {' or '.join(suitable)}, or the placement loss or reward."
        )
    if kl.coefficient and kl.estimator == "exact" and kl.placement == "reward":
        parameters = config.algorithm.advantage.parameters
        if not is_unbiased(name, parameters):
            suitable = [e for e in available_advantage_estimators() if is_unbiased(e)]
            yield (
                "algorithm.kl.kind: 'exact' in the reward takes a part of its gradient from the "
                f"loss, and {name!r}{shown_parameters(parameters)} scales or shifts the other "
                "part. Set placement loss, kind k1, or an estimator of the gradient itself "
                f"({', '.join(suitable)})."
            )
    if "ref_logprobs" in estimator_needs(name) and kl.coefficient == 0 and not carries_kl(name):
        yield (
            f"algorithm.kl.coefficient: 0 starts no reference, and the estimator {name!r} reads "
            "its log-probabilities. Set a coefficient above 0."
        )


def _recompute_contradictions(config: RunConfig, name: str) -> Iterator[str]:
    """Yield settings that would apply the ratio of live and rollout policy twice, or never."""
    algorithm = config.algorithm
    parameters, needs = algorithm.advantage.parameters, estimator_needs(name)
    level = algorithm.rollout_correction.level

    if level != "none" and "rollout_logprobs" in needs:
        yield (
            f"algorithm.rollout_correction.level: {level!r} would apply the ratio old / rollout a "
            f"second time, since it is part of the advantages of {name!r}. Set it to none."
        )
    if not algorithm.advantage.recompute:
        return

    if "greedy_rewards" in needs:
        yield (
            "algorithm.advantage.recompute: true estimates again from outcome rewards alone, "
            f"without the greedy responses that {name!r} reads. Set it to false."
        )
    if not is_importance_corrected(name, parameters):
        suitable = [e for e in available_advantage_estimators() if is_importance_corrected(e)]
        yield (
            "algorithm.advantage.recompute: true takes the live policy as old, so the ratio is "
            f"always 1, and neither the objective nor {name!r}{shown_parameters(parameters)} "
            "corrects for the policy having moved. Set it to false; it is for "
            f"{', '.join(suitable)}, as whole weights of the score."
        )


def _staleness_contradictions(config: RunConfig, name: str) -> Iterator[str]:
    """Yield estimators that cannot be computed from groups of older weights."""
    staleness = config.trainer.max_staleness
    if staleness and "greedy_rewards" in estimator_needs(name):
        yield (
            f"algorithm.advantage.name: {name!r} compares with a greedy response under the same "
            f"weights, which is not sampled with trainer.max_staleness {staleness}. Choose another "
            "estimator, or set trainer.max_staleness to 0."
        )


def check_address(config: RunConfig) -> None:
    """Refuse an address at which nothing answers; Ray would wait for half a minute."""
    address = config.cluster.joined_address
    if address is None or address == "auto":
        return

    field = "cluster.address" if config.cluster.address else "RAY_ADDRESS"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= LAST_PORT:
        raise ValueError(
            f"{field}: {address!r} is not host:port, ray://host:port, auto or local. Give the "
            "address that `ray start --head` prints."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_LIMIT_S).close()
    except (OSError, UnicodeError) as error:  # UnicodeError: not a valid host name
        raise ValueError(
            f"{field}: nothing answers at {address!r} ({error}). Start the head node with `ray "
            "start --head`, or leave it out to start Ray here."
        ) from error
