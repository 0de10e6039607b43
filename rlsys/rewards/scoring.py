"""Scoring one completion with all configured reward functions: what a process of the reward pool does.

Each function counts for itself: one that fails leaves the others' scores as they are.
"""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlsys.config import RewardFunctionConfig
from rlsys.rewards.registry import get_reward_function, reward_hooks, takes_completion_tokens

if TYPE_CHECKING:  # the pool's processes need no NumPy
    from rlsys.data.batches import FailureKind

LARGEST_REWARD = (2 - 2**-23) * 2.0**127  # of float32
MAX_TRACEBACK_CHARACTERS = 4000
MAX_MESSAGE_CHARACTERS = 500


@dataclass(frozen=True, kw_only=True)
class FunctionScore:
    """What one function said of one completion."""

    score: float
    reason: str = "ok"
    answer: str = ""


@dataclass(frozen=True, kw_only=True)
class FunctionFailure:
    """Why one function gave no number for one completion."""

    kind: FailureKind
    message: str  # one line
    traceback: str = ""


Outcome = FunctionScore | FunctionFailure


@dataclass(frozen=True, kw_only=True)
class Score:
    """The outcomes of one completion, in the order of the functions."""

    outcomes: tuple[Outcome, ...]

    @property
    def components(self) -> tuple[float, ...]:
        """The unweighted scores; NaN where a function failed."""
        return tuple(
            outcome.score if isinstance(outcome, FunctionScore) else math.nan
            for outcome in self.outcomes
        )

    @property
    def reason(self) -> str:
        """What the first function said, or how it failed."""
        first = self.outcomes[0]
        return first.reason if isinstance(first, FunctionScore) else first.kind

    @property
    def answer(self) -> str:
        """The answer that the first function found; "" where there is none."""
        first = self.outcomes[0]
        return first.answer if isinstance(first, FunctionScore) else ""


def score_completion(
    functions: Sequence[RewardFunctionConfig],
    completion: str,
    ground_truth: str,
    completion_tokens: int = 0,
) -> Score:
    """Run all functions on one completion of so many sampled tokens."""
    return Score(
        outcomes=tuple(
            run_function(
                function, completion, ground_truth, completion_tokens, terms=len(functions)
            )
            for function in functions
        )
    )


def run_function(
    function: RewardFunctionConfig,
    completion: str,
    ground_truth: str,
    completion_tokens: int,
    *,
    terms: int,
) -> Outcome:
    """What one function makes of one completion; nothing that it raises gets out. `terms`: how many functions are summed."""
    try:
        return _score(function, completion, ground_truth, completion_tokens, terms)
    except SystemExit as error:
        return _failure(error, f"it called sys.exit({error.code!r})")
    except MemoryError as error:
        return _failure(error, "MemoryError: it needs more than reward.memory_gb")
    except BaseException as error:  # a user's function may raise anything
        return _failure(error, "".join(traceback.format_exception_only(error)))


def _failure(error: BaseException, message: str) -> FunctionFailure:
    """With the part of the traceback that is in the function."""
    shown = error.__traceback__
    while shown is not None and shown.tb_frame.f_code.co_filename == __file__:
        shown = shown.tb_next
    text = "".join(traceback.format_exception(type(error), error, shown))
    return FunctionFailure(
        kind="error",
        message=" ".join(message.split())[:MAX_MESSAGE_CHARACTERS],
        traceback=text[-MAX_TRACEBACK_CHARACTERS:] if shown is not None else "",
    )


def _score(
    function: RewardFunctionConfig,
    completion: str,
    ground_truth: str,
    completion_tokens: int,
    terms: int,
) -> FunctionScore:
    verdict = reward_hooks(function.name).verdict
    if verdict is not None:
        result = verdict(completion, ground_truth, **function.parameters)
        value = _number(result.score)
        _check_size(value, function.weight, terms)
        return FunctionScore(score=value, reason=result.reason, answer=result.answer or "")
    reward = get_reward_function(function.name)
    arguments = (completion, ground_truth)
    if takes_completion_tokens(reward):
        arguments += (completion_tokens,)
    value = _number(reward(*arguments, **function.parameters))
    _check_size(value, function.weight, terms)
    return FunctionScore(score=value)


def _number(value: Any) -> float:
    """`value` as a float; a bool, an integer, a NumPy number and a tensor of no dimension are numbers too.

    Raises:
        TypeError: it is no number.
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
    """Refuse what would make the weighted sum infinite or NaN in float32."""
    if not math.isfinite(value):
        raise ValueError(f"it returned {value}; a reward must be finite")
    if max(abs(value), abs(value * weight) * terms) > LARGEST_REWARD:
        raise OverflowError(
            f"it returned {value:g}, which with weight {weight:g} is beyond float32"
        )
