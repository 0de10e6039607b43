"""Reward functions by name, with the way to call each and the checks before a run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from rlsys.config import RewardFunctionConfig
from rlsys.registry import (
    Registry,
    Validate,
    check_values,
    follow_token_limit,
    full_name,
    plain_function,
    type_hints,
)
from rlsys.rewards.records import RewardInput, RewardResult

RewardFunction = Callable[..., float | RewardResult]
F = TypeVar("F", bound=RewardFunction)
_REWARDS: Registry[RewardFunction] = Registry("reward function")
_HOOKS: dict[str, RewardHooks] = {}

CONVENTION = (
    "A reward function takes (completion, ground_truth), or (completion, ground_truth, "
    "completion_tokens) where its third argument has that name, or one RewardInput; its parameters "
    "are keyword-only"
)
BATCH_ARGUMENTS = ("prompts", "completions", "responses", "solutions")
TEXT_ARGUMENTS = ("completion", "response", "solution", "text", "ground_truth")


class Call(Enum):
    """The arguments that a reward function takes."""

    INPUT = "one RewardInput"
    TEXTS = "completion and ground_truth"
    TEXTS_AND_TOKENS = "completion, ground_truth and completion_tokens"


@dataclass(frozen=True, kw_only=True)
class RewardHooks:
    """The optional declarations of a reward function.

    validate: called before a run starts as `validate(**parameters)`, with all keyword parameters,
        defaults included. Raises a ValueError, with the remedy, for values that the function cannot
        take.
    reads_ground_truth: returns whether the function can read a ground truth. It is called on the
        data before a run starts.
    warm_up: called once in each process of the pool before the first response, while time and
        memory are not limited yet.
    steps: whether the function gives rewards of steps, in a `RewardResult`.
    scores: false where the score of a whole response is always 0. Such a function cannot be the
        first one, which decides accuracy.
    """

    validate: Validate | None = None
    reads_ground_truth: Callable[[str], bool] | None = None
    warm_up: Callable[[], object] | None = None
    steps: bool = False
    scores: bool = True


def register_reward_function(
    name: str,
    *,
    validate: Validate | None = None,
    reads_ground_truth: Callable[[str], bool] | None = None,
    warm_up: Callable[[], object] | None = None,
    steps: bool = False,
    scores: bool = True,
) -> Callable[[F], F]:
    """Return a decorator that registers a reward function for `reward.functions`.

    The function is `function(inputs: RewardInput, *, keywords...)` and returns a number or a
    `RewardResult`. It may also take `(completion, ground_truth)`, or `(completion, ground_truth,
    completion_tokens)` with the number of sampled tokens. A `functools.partial` and an object with
    `__call__` are registered by a call: `register_reward_function("mine")(Mine())`. The keywords
    are explained at `RewardHooks`.

    Raises:
        ValueError: the name is taken, or the object cannot be called as a function.
    """
    register = _REWARDS.register(name)
    hooks = RewardHooks(
        validate=validate,
        reads_ground_truth=reads_ground_truth,
        warm_up=warm_up,
        steps=steps,
        scores=scores,
    )

    def decorator(function: F) -> F:
        register(function)
        _HOOKS[name] = hooks
        call_of.cache_clear()  # in a notebook a later cell may replace the function
        return function

    return decorator


def get_reward_function(name: str) -> RewardFunction:
    """Return the reward function called `name`.

    Raises:
        ValueError: unknown name, with the nearest ones.
    """
    return _REWARDS.get(name, field="reward.functions.name")


def with_token_limit(
    functions: Sequence[RewardFunctionConfig], limit: int
) -> tuple[RewardFunctionConfig, ...]:
    """Return the functions with the token limit of a run in their parameters.

    A parameter `max_tokens` that is null or left out becomes `limit`.

    Raises:
        ValueError: unknown name.
    """
    limited = []
    for function in functions:
        registered = get_reward_function(function.name)
        parameters = follow_token_limit(registered, function.parameters, limit)
        limited.append(function.model_copy(update={"parameters": parameters}))
    return tuple(limited)


def reward_hooks(name: str) -> RewardHooks:
    """Return the declarations of the function called `name`.

    Raises:
        ValueError: unknown name.
    """
    get_reward_function(name)
    return _HOOKS[name]


@functools.cache
def call_of(name: str) -> Call:
    """Return the arguments that the function called `name` takes.

    Raises:
        ValueError: unknown name.
    """
    return _call(get_reward_function(name))


def _call(function: RewardFunction) -> Call:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # refused before a run
        return Call.TEXTS
    if _takes_input(function, signature):
        return Call.INPUT
    if "completion_tokens" in signature.parameters:
        return Call.TEXTS_AND_TOKENS
    return Call.TEXTS


def _takes_input(function: RewardFunction, signature: inspect.Signature) -> bool:
    """Return whether the function takes a `RewardInput`.

    Its first argument is annotated so, or is the only one, without annotation and without the name
    of a text.
    """
    positional = _positional(signature)
    if not positional:
        return False
    first = positional[0]
    declared = type_hints(function).get(first.name, first.annotation)
    if declared is RewardInput or str(declared).rsplit(".")[-1] == RewardInput.__name__:
        return True
    is_untyped = declared is first.empty
    is_text = first.name in (*TEXT_ARGUMENTS, *BATCH_ARGUMENTS)
    return len(positional) == 1 and is_untyped and not is_text


def reads_metadata(functions: Sequence[RewardFunctionConfig]) -> bool:
    """Return whether a function takes a `RewardInput`, and so may read other columns of the data.

    Unknown names are ignored; they are refused elsewhere.
    """
    names = {function.name for function in functions} & set(available_reward_functions())
    return any(call_of(name) is Call.INPUT for name in names)


def step_functions(functions: Sequence[RewardFunctionConfig]) -> tuple[str, ...]:
    """Return the names of the functions that give rewards of steps.

    Unknown names are ignored; they are refused elsewhere.
    """
    known = set(available_reward_functions())
    return tuple(
        function.name
        for function in functions
        if function.name in known and reward_hooks(function.name).steps
    )


def available_reward_functions() -> tuple[str, ...]:
    """Return all registered names, sorted."""
    return _REWARDS.names()


def check_reward_function(name: str, parameters: Mapping[str, Any]) -> None:
    """Refuse a function or parameters that cannot work, without calling the function.

    Its kind, its arguments, and its parameters with their values are checked.

    Raises:
        ValueError: the message names field and remedy.
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
            f"reward.functions.name: {name!r} ({full_name(function)}) is {kind}. Write it as a "
            "plain function that returns one number."
        )


def _check_arguments(name: str, function: RewardFunction) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"reward.functions.name: {name!r} has no signature that Python can inspect. Wrap it in "
            f"a def. {CONVENTION}."
        ) from error

    who = f"reward.functions.name: {name!r} ({full_name(function)}{signature})"
    required = {
        parameter: None
        for parameter, declared in signature.parameters.items()
        if declared.kind is declared.KEYWORD_ONLY
    }
    if _takes_input(function, signature):
        _check_binding(who, signature, (None,), required)
        return

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
    bound = _check_binding(who, signature, arguments, required)
    if tokens is not None and list(bound.arguments).index("completion_tokens") != 2:
        raise ValueError(f"{who} must take completion_tokens third. {CONVENTION}.")


def _check_binding(
    who: str, signature: inspect.Signature, arguments: tuple[None, ...], required: Mapping[str, Any]
) -> inspect.BoundArguments:
    try:
        return signature.bind(*arguments, **required)
    except TypeError as error:
        raise ValueError(f"{who} cannot be called: {error}. {CONVENTION}.") from error


def _names_of_two_arguments(signature: inspect.Signature) -> tuple[str, str]:
    names = [parameter.name for parameter in _positional(signature)]
    return (names[0] if names else "", names[1] if len(names) > 1 else "")


def _positional(signature: inspect.Signature) -> list[inspect.Parameter]:
    return [
        parameter
        for parameter in signature.parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
