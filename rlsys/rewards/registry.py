"""Reward functions by name: text in, number out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlsys.config import RewardFunctionConfig
from rlsys.registry import (
    Registry,
    Validate,
    check_values,
    follow_token_limit,
    full_name,
    plain_function,
)

RewardFunction = Callable[..., float]
_REWARDS: Registry[RewardFunction] = Registry("reward function")
_HOOKS: dict[str, RewardHooks] = {}

CONVENTION = (
    "A reward function is called with (completion, ground_truth), or (completion, ground_truth, completion_tokens) where its third "
    "argument has that name; its parameters are keyword-only"
)
BATCH_ARGUMENTS = ("prompts", "completions", "responses", "solutions")


class Verdict(Protocol):
    """A score with its explanation: `rlsys.rewards.MathVerdict` is one."""

    @property
    def score(self) -> float: ...

    @property
    def answer(self) -> str | None:
        """The answer that was found in the completion."""
        ...

    @property
    def reason(self) -> str:
        """Why it got this score: one word, which is counted in the metrics."""
        ...


@dataclass(frozen=True, kw_only=True)
class RewardHooks:
    """What may be declared beside a reward function.

    validate: called before a run starts as `validate(**parameters)`, with all keyword parameters, defaults included; raises a ValueError, with the
        remedy, for values that the function cannot take.
    reads_ground_truth: whether the function can do anything with a ground truth; counted over the data before a run starts.
    verdict: called as the function is, and instead of it, where the reason of a score and the extracted answer are wanted as well.
    """

    validate: Validate | None = None
    reads_ground_truth: Callable[[str], bool] | None = None
    verdict: Callable[..., Verdict] | None = None


def register_reward_function(
    name: str,
    *,
    validate: Validate | None = None,
    reads_ground_truth: Callable[[str], bool] | None = None,
    verdict: Callable[..., Verdict] | None = None,
) -> Callable[[RewardFunction], RewardFunction]:
    """Decorator: make `function(completion, ground_truth, *, keywords...) -> float` available in `reward.functions`.

    A function that needs the number of sampled tokens takes it third: `function(completion, ground_truth, completion_tokens, *, keywords...)`.
    A `functools.partial` and an object with `__call__` are registered by a call: `register_reward_function("mine")(Mine())`. The keywords are
    explained at `RewardHooks`.

    Raises:
        ValueError: the name is taken, or the thing cannot be called as a function.
    """
    register = _REWARDS.register(name)
    hooks = RewardHooks(validate=validate, reads_ground_truth=reads_ground_truth, verdict=verdict)

    def decorator(function: RewardFunction) -> RewardFunction:
        registered = register(function)
        _HOOKS[name] = hooks
        return registered

    return decorator


def get_reward_function(name: str) -> RewardFunction:
    """The reward function called `name`.

    Raises:
        ValueError: unknown name, with the nearest ones.
    """
    return _REWARDS.get(name, field="reward.functions.name")


def with_token_limit(
    functions: Sequence[RewardFunctionConfig], limit: int
) -> tuple[RewardFunctionConfig, ...]:
    """The functions of a run whose responses have at most `limit` tokens: a parameter `max_tokens` that is null or left out follows it.

    Raises:
        ValueError: unknown name.
    """
    return tuple(
        function.model_copy(
            update={
                "parameters": follow_token_limit(
                    get_reward_function(function.name), function.parameters, limit
                )
            }
        )
        for function in functions
    )


def reward_hooks(name: str) -> RewardHooks:
    """What was declared beside the function called `name`.

    Raises:
        ValueError: unknown name.
    """
    get_reward_function(name)
    return _HOOKS[name]


def takes_completion_tokens(function: RewardFunction) -> bool:
    """Whether a reward function asks for the number of sampled tokens."""
    return "completion_tokens" in inspect.signature(function).parameters


def available_reward_functions() -> tuple[str, ...]:
    """All registered names, sorted."""
    return _REWARDS.names()


def check_reward_function(name: str, parameters: Mapping[str, Any]) -> None:
    """Refuse what cannot work, without calling the function: its kind, its arguments, and its parameters with their values.

    Raises:
        ValueError: names field and remedy.
    """
    function = get_reward_function(name)
    _check_kind(name, function)
    _check_arguments(name, function)
    validate = reward_hooks(name).validate
    check_values(name, function, validate, parameters, field="reward.functions.parameters")


def _check_kind(name: str, function: RewardFunction) -> None:
    plain = plain_function(function)
    is_async = inspect.iscoroutinefunction(plain) or inspect.isasyncgenfunction(plain)
    if is_async or inspect.isgeneratorfunction(plain):
        kind = "an async function" if is_async else "a generator"
        raise ValueError(
            f"reward.functions.name: {name!r} ({full_name(function)}) is {kind}. Write it as a plain function that returns one number."
        )


def _check_arguments(name: str, function: RewardFunction) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"reward.functions.name: {name!r} has no signature that Python can tell. Wrap it in a def. {CONVENTION}."
        ) from error
    who = f"reward.functions.name: {name!r} ({full_name(function)}{signature})"
    first, second = _names_of_two_arguments(signature)
    if first in BATCH_ARGUMENTS:
        raise ValueError(
            f"{who} takes a batch; here a reward function gets one completion. {CONVENTION}."
        )
    if first == "ground_truth" or second == "completion":
        raise ValueError(
            f"{who} takes ground_truth and completion in the wrong order. {CONVENTION}."
        )
    tokens = signature.parameters.get("completion_tokens")
    if tokens is not None and tokens.kind is tokens.KEYWORD_ONLY:
        raise ValueError(
            f"{who} takes completion_tokens by keyword only. Put it third, before the *."
        )
    arguments = (None,) * (3 if tokens is not None else 2)
    required = {
        parameter: None
        for parameter, declared in signature.parameters.items()
        if declared.kind is declared.KEYWORD_ONLY
    }
    try:
        bound = signature.bind(*arguments, **required)
    except TypeError as error:
        raise ValueError(f"{who} cannot be called: {error}. {CONVENTION}.") from error
    if tokens is not None and list(bound.arguments).index("completion_tokens") != 2:
        raise ValueError(f"{who} must take completion_tokens third. {CONVENTION}.")


def _names_of_two_arguments(signature: inspect.Signature) -> tuple[str, str]:
    names = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return (names[0] if names else "", names[1] if len(names) > 1 else "")
