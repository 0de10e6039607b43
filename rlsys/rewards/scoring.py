"""Evaluation of all configured reward functions on one completion, in a process of the pool.

Functions are independent: a failure of one does not change the rewards of the rest.
"""

from __future__ import annotations

import inspect
import itertools
import math
import operator
import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlsys.config import RewardFunctionConfig
from rlsys.config.secrets import redacted
from rlsys.rewards.records import RewardInput, RewardResult
from rlsys.rewards.registry import Call, call_of, get_reward_function, reward_hooks

if TYPE_CHECKING:  # the pool's processes need no NumPy
    from rlsys.data.batches import FailureKind

LARGEST_REWARD = (2 - 2**-23) * 2.0**127  # of float32
MAX_TRACEBACK_CHARACTERS = 4000
MAX_MESSAGE_CHARACTERS = 500
REASON = re.compile(r"[\w.:-]{1,40}")


@dataclass(frozen=True, kw_only=True)
class FunctionReward:
    """The reward of one function for one completion."""

    reward: float
    reason: str = "ok"
    answer: str = ""
    step_rewards: tuple[float, ...] = ()
    # As the function returned them: characters of the completion up to and with each step.
    step_ends: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FunctionFailure:
    """The failure of one function on one completion."""

    kind: FailureKind
    message: str  # one line
    traceback: str = ""


Outcome = FunctionReward | FunctionFailure


@dataclass(frozen=True, kw_only=True)
class CompletionOutcomes:
    """The outcomes of all functions for one completion, in their order."""

    outcomes: tuple[Outcome, ...]

    @property
    def components(self) -> tuple[float, ...]:
        """The unweighted rewards; NaN where a function failed."""
        return tuple(
            outcome.reward if isinstance(outcome, FunctionReward) else math.nan
            for outcome in self.outcomes
        )

    @property
    def reason(self) -> str:
        """The reason that the first function gave, or the kind of its failure."""
        first = self.outcomes[0]
        return first.reason if isinstance(first, FunctionReward) else first.kind

    @property
    def answer(self) -> str:
        """The answer that the first function found; "" where there is none."""
        first = self.outcomes[0]
        return first.answer if isinstance(first, FunctionReward) else ""


def run_functions(
    functions: Sequence[RewardFunctionConfig], inputs: RewardInput
) -> CompletionOutcomes:
    """Run all functions on one completion."""
    terms = len(functions)
    outcomes = tuple(run_function(function, inputs, terms=terms) for function in functions)
    return CompletionOutcomes(outcomes=outcomes)


def run_function(function: RewardFunctionConfig, inputs: RewardInput, *, terms: int) -> Outcome:
    """Run one function on one completion; whatever it raises becomes a failure.

    `terms` is the number of functions whose rewards are summed.
    """
    try:
        return _reward(function, inputs, terms)
    except SystemExit as error:
        return _failure(error, f"it called sys.exit({error.code!r})")
    except MemoryError as error:
        return _failure(error, "MemoryError: it needs more than reward.memory_gb")
    except BaseException as error:  # a user's function may raise anything
        return _failure(error, "".join(traceback.format_exception_only(error)))


def outcome_of_score(score: float, function: RewardFunctionConfig, *, terms: int) -> Outcome:
    """Return the outcome of a score that was computed elsewhere: a failure if it is not usable.

    `terms` is as in `run_function`.
    """
    try:
        _check_size(score, function.weight, terms)
    except (ValueError, OverflowError) as error:
        return _failed_score(error)
    return FunctionReward(reward=score)


def outcome_of_steps(
    steps: Sequence[tuple[int, float]], function: RewardFunctionConfig, *, terms: int
) -> Outcome:
    """Return the outcome of the scores of steps that were computed elsewhere.

    Args:
        steps: last token and score of each step, in order. The ends of the outcome are tokens.
        terms: as in `run_function`.
    """
    try:
        for _, score in steps:
            _check_size(score, function.weight, terms * (1 + len(steps)))
    except (ValueError, OverflowError) as error:
        return _failed_score(error)
    return FunctionReward(
        reward=0.0,
        step_rewards=tuple(score for _, score in steps),
        step_ends=tuple(end for end, _ in steps),
    )


def _failed_score(error: Exception) -> FunctionFailure:
    message = str(error).replace("it returned", "its score is", 1)
    return FunctionFailure(kind="error", message=f"{type(error).__name__}: {message}")


def _failure(error: BaseException, message: str) -> FunctionFailure:
    """Return a failure with the part of the traceback that is in the function."""
    shown = error.__traceback__
    while shown is not None and shown.tb_frame.f_code.co_filename == __file__:
        shown = shown.tb_next
    text = "".join(traceback.format_exception(type(error), error, shown))
    return FunctionFailure(
        kind="error",
        message=redacted(" ".join(message.split()))[:MAX_MESSAGE_CHARACTERS],
        traceback=redacted(text)[-MAX_TRACEBACK_CHARACTERS:] if shown is not None else "",
    )


def _reward(function: RewardFunctionConfig, inputs: RewardInput, terms: int) -> FunctionReward:
    """Call the function and check its result.

    Raises:
        Exception: raised by the function, or a TypeError, ValueError or OverflowError for a result
            that cannot be used.
    """
    call = get_reward_function(function.name)
    arguments = _arguments(call_of(function.name), inputs)
    result = call(*arguments, **function.parameters)
    gives_steps = reward_hooks(function.name).steps
    if not isinstance(result, RewardResult):
        if gives_steps:
            raise TypeError(
                f"it returned {_shown(result)}; a function registered with steps=True returns a "
                "RewardResult with step_rewards and step_ends"
            )
        result = RewardResult(result)

    value = _number(result.score)
    _check_size(value, function.weight, terms)
    if len(result.step_rewards) and not gives_steps:
        raise TypeError("it returned step_rewards; register it with steps=True")
    step_rewards = tuple(_number(reward) for reward in result.step_rewards)
    for reward in step_rewards:
        # The reward of a token may be the sum of all that come after it.
        _check_size(reward, function.weight, terms * (1 + len(step_rewards)))

    return FunctionReward(
        reward=value,
        reason=_reason(result.reason),
        answer=_answer(result.answer),
        step_rewards=step_rewards,
        step_ends=_step_ends(result, len(inputs.completion)),
    )


def _step_ends(result: RewardResult, characters: int) -> tuple[int, ...]:
    """Return the ends of the steps in a completion of so many characters.

    Raises:
        TypeError: an end is not an integer.
        ValueError: they do not fit the step rewards or the completion.
    """
    if len(result.step_ends) != len(result.step_rewards):
        raise ValueError(
            f"it returned {len(result.step_rewards)} step_rewards and {len(result.step_ends)} "
            "step_ends; give each step both"
        )
    try:
        ends = tuple(operator.index(end) for end in result.step_ends)
    except TypeError:
        raise TypeError(
            f"its step_ends are {_shown(result.step_ends)}; an end is a number of characters"
        ) from None

    for before, end in itertools.pairwise((0, *ends)):
        if not before < end <= characters:
            raise ValueError(
                f"its step_ends have {end} after {before}; ends rise, from 1 to the "
                f"{characters} characters of the completion"
            )
    return ends


def _arguments(call: Call, inputs: RewardInput) -> tuple[Any, ...]:
    if call is Call.INPUT:
        return (inputs,)
    texts = (inputs.completion, inputs.ground_truth)
    return (*texts, inputs.num_tokens) if call is Call.TEXTS_AND_TOKENS else texts


def _reason(value: Any) -> str:
    """Return a reason that can name a metric.

    Raises:
        TypeError: it is not one word.
    """
    if not isinstance(value, str) or not REASON.fullmatch(value):
        raise TypeError(
            f"its reason is {_shown(value)}; a reason is one word of at most 40 letters, digits "
            "and _.:-"
        )
    return value


def _answer(value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"its answer is {_shown(value)}; an answer is text or None")
    return value or ""


def _number(value: Any) -> float:
    """Return `value` as a float.

    A bool, an integer, a NumPy number and a tensor without dimensions are numbers too.

    Raises:
        TypeError: it is not a number.
        OverflowError: it is beyond the range of a float.
    """
    if inspect.iscoroutine(value):
        value.close()
        raise TypeError("it returned a coroutine; a reward function is a plain function")
    is_text = isinstance(value, str | bytes)
    if value is None or is_text or getattr(value, "ndim", 0) > 0:
        raise TypeError(f"it returned {_shown(value)}; a reward is one number")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"it returned {_shown(value)}; a reward is one number") from None
    except OverflowError:
        raise OverflowError(f"it returned {_shown(value)}, which is beyond float32") from None


def _shown(value: Any) -> str:
    return "None" if value is None else f"{value!r:.60} ({type(value).__name__})"


def _check_size(value: float, weight: float, terms: int) -> None:
    """Refuse a reward that could make the weighted sum infinite or NaN in float32."""
    if not math.isfinite(value):
        raise ValueError(f"it returned {value}; a reward must be finite")
    if max(abs(value), abs(value * weight) * terms) > LARGEST_REWARD:
        raise OverflowError(
            f"it returned {value:g}, which with weight {weight:g} is beyond float32"
        )
