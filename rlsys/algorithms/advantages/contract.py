"""What advantage estimators take and give, and how they are registered."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rlsys.algorithms.advantages.hierarchical.baseline_network import BaselineRegression
from rlsys.registry import Registry, Validate, check_values


@dataclass(frozen=True, kw_only=True)
class AdvantageInputs:
    """A batch of B responses padded to T tokens. Arrays that an estimator does not need may be None."""

    rewards: Tensor  # [B] outcome reward of each response
    response_mask: Tensor  # [B, T] bool
    group_ids: Tensor  # [B] int64, equal iff two responses answer the same prompt
    token_rewards: Tensor | None = None  # [B, T] process rewards, added to the outcome
    rollout_logprobs: Tensor | None = None  # [B, T]
    old_logprobs: Tensor | None = None  # [B, T]
    ref_logprobs: Tensor | None = None  # [B, T]
    values: Tensor | None = None  # [B, T] critic
    score_norms: Tensor | None = (
        None  # [B, T] proxy of ||grad log pi||^2: 1 - 2 pi(a) + sum_k pi_k^2
    )
    greedy_rewards: Tensor | None = None  # [B] reward of the greedy response to the same prompt
    truncated: Tensor | None = None  # [B] bool: cut off at the token limit
    step_ends: Tensor | None = (
        None  # [B, T] bool: a process reward was given here; None: where token_rewards are not 0
    )
    kl_coefficient: float = 0.0  # of algorithm.kl, where its placement is "advantage"
    layer_baselines: Tensor | None = (
        None  # [B, T, p] of a network that has not seen the batch; None: all 0
    )
    state: Mapping[str, Any] = field(
        default_factory=dict
    )  # what the estimator returned as its state for the batch before

    def __post_init__(self) -> None:
        mask = self.response_mask
        if mask.ndim != 2 or mask.dtype != torch.bool:
            raise ValueError(
                f"response_mask must be a [B, T] bool tensor, not {tuple(mask.shape)} {mask.dtype}"
            )
        for name in ("rewards", "group_ids", "greedy_rewards", "truncated"):
            array = getattr(self, name)
            if array is not None and array.shape != mask.shape[:1]:
                raise ValueError(
                    f"{name} must have shape [{mask.shape[0]}], not {tuple(array.shape)}"
                )
        for name in (
            "token_rewards",
            "rollout_logprobs",
            "old_logprobs",
            "ref_logprobs",
            "values",
            "score_norms",
            "step_ends",
        ):
            array = getattr(self, name)
            if array is not None and array.shape != mask.shape:
                raise ValueError(
                    f"{name} must have the shape of response_mask, {tuple(mask.shape)}, not {tuple(array.shape)}"
                )

    def require(self, name: str, *, estimator: str, remedy: str, finite: bool = False) -> Tensor:
        """The array `name`, which `estimator` cannot do without.

        Raises:
            ValueError: it is None, and the message says how to get it; or, where it must be `finite`, it is not.
        """
        array = getattr(self, name)
        if array is None:
            raise ValueError(
                f"algorithm.advantage.name: {estimator!r} needs {name}, which this batch does not have. {remedy}"
            )
        read = array[self.response_mask] if array.ndim == 2 else array
        broken = int((~torch.isfinite(read)).sum())
        if finite and broken:
            raise ValueError(
                f"algorithm.advantage.name: {estimator!r} needs {name}, of which {broken} of {read.numel()} are not finite. Look at the policy's "
                "weights and at the batch: nothing that follows would mean anything."
            )
        return array


@dataclass(frozen=True, kw_only=True)
class AdvantageOutput:
    """Advantages are 0 outside the mask. Diagnostics go to the metrics as advantage/<name>."""

    advantages: Tensor  # [B, T]
    returns: Tensor | None = None  # [B, T] critic targets
    regression: BaselineRegression | None = (
        None  # what a network of layer baselines is to learn from this batch
    )
    state: Mapping[str, Any] = field(
        default_factory=dict
    )  # ready for JSON: comes back with the next batch; saved in checkpoints
    diagnostics: Mapping[str, float] = field(default_factory=dict)


AdvantageEstimator = Callable[..., AdvantageOutput]
# What costs something to provide, so that it is made only for the estimators that say they read it; and what decides which settings go together.
Need = Literal["rollout_logprobs", "old_logprobs", "ref_logprobs", "score_norms", "greedy_rewards"]
Declared = bool | Callable[[Mapping[str, Any]], bool]  # perhaps a function of the parameters


@dataclass(frozen=True, kw_only=True)
class EstimatorSpec:
    """What an estimator says of itself when it is registered."""

    needs: frozenset[Need]
    compares_group: Declared
    importance_corrected: Declared
    carries_kl: bool
    validate: Validate | None


_ESTIMATORS: Registry[AdvantageEstimator] = Registry("advantage estimator")
_SPECS: dict[str, EstimatorSpec] = {}


def register_advantage_estimator(
    name: str,
    *,
    needs: Iterable[Need] = (),
    compares_group: Declared = False,
    importance_corrected: Declared = False,
    carries_kl: bool = False,
    validate: Validate | None = None,
) -> Callable[[AdvantageEstimator], AdvantageEstimator]:
    """Decorator: make `function(inputs, *, keywords...) -> AdvantageOutput` available as `algorithm.advantage.name`.

    `needs` names the optional inputs that the estimator reads: the driver has them computed, and they are not None then. One that reads
    `rollout_logprobs` corrects for the policy having moved since sampling: a second correction (`algorithm.rollout_correction`) is refused.
    `compares_group` says that a response without another to the same prompt gets 0: a run that samples one response a prompt is refused.
    `importance_corrected` says that the result is the whole weight of the score, with the ratio old / rollout in it: only such an estimator may
    estimate again before each mini-batch (`algorithm.advantage.recompute`). Both may be functions of the keyword parameters.

    `carries_kl` says that its advantages contain the KL to the reference, with the weight `inputs.kl_coefficient`: it goes with
    `algorithm.kl.placement: advantage`, and only such an estimator does.
    `validate(**parameters)` is called before a run starts with all keyword parameters, defaults included; it raises a ValueError, with the
    remedy, for values that the signature cannot refuse. The estimator itself is not called before it meets its first batch.

    A keyword called `max_tokens` is the token limit of the run: null or left out, it follows `generation.max_tokens`.
    """
    register = _ESTIMATORS.register(name)

    def decorator(estimator: AdvantageEstimator) -> AdvantageEstimator:
        register(estimator)
        _SPECS[name] = EstimatorSpec(
            needs=frozenset(needs),
            compares_group=compares_group,
            importance_corrected=importance_corrected,
            carries_kl=carries_kl,
            validate=validate,
        )
        return estimator

    return decorator


def get_advantage_estimator(name: str) -> AdvantageEstimator:
    """The estimator called `name`.

    Raises:
        ValueError: unknown name, with the nearest ones.
    """
    return _ESTIMATORS.get(name, field="algorithm.advantage.name")


def available_advantage_estimators() -> tuple[str, ...]:
    """All registered names, sorted."""
    return _ESTIMATORS.names()


def estimator_needs(name: str) -> frozenset[Need]:
    """The optional inputs that the estimator `name` reads."""
    get_advantage_estimator(name)
    return _SPECS[name].needs


def compares_group(name: str, parameters: Mapping[str, Any] | None = None) -> bool:
    """Whether the estimator `name` gives 0 to a response without another to the same prompt, with those keyword parameters."""
    get_advantage_estimator(name)
    return _holds(_SPECS[name].compares_group, parameters)


def is_importance_corrected(name: str, parameters: Mapping[str, Any] | None = None) -> bool:
    """Whether what the estimator `name` returns is the whole weight of the score, with the ratio old / rollout in it."""
    get_advantage_estimator(name)
    return _holds(_SPECS[name].importance_corrected, parameters)


def carries_kl(name: str) -> bool:
    """Return whether the advantages of the estimator `name` contain the KL to the reference."""
    get_advantage_estimator(name)
    return _SPECS[name].carries_kl


def check_advantage_estimator(name: str, parameters: Mapping[str, Any]) -> None:
    """Refuse keyword parameters that the estimator `name` does not take, without calling it.

    Raises:
        ValueError: names field, value and remedy.
    """
    estimator = get_advantage_estimator(name)
    field = "algorithm.advantage.parameters"
    check_values(name, estimator, _SPECS[name].validate, parameters, field=field)


def _holds(declared: Declared, parameters: Mapping[str, Any] | None) -> bool:
    return declared(parameters or {}) if callable(declared) else declared


def run_estimator(
    name: str, inputs: AdvantageInputs, parameters: Mapping[str, Any]
) -> AdvantageOutput:
    """What the estimator `name` makes of `inputs`, checked; detached, and 0 outside the mask whatever the estimator left there.

    Raises:
        ValueError: the result has another type or shape than `AdvantageOutput` says, or values inside the mask that are not finite.
    """
    output = get_advantage_estimator(name)(inputs, **parameters)
    mask, problem = inputs.response_mask, f"algorithm.advantage.name: {name!r} returned"
    if not isinstance(output, AdvantageOutput):
        raise ValueError(
            f"{problem} {_described(output)}. Return an AdvantageOutput, with advantages of shape {list(mask.shape)}."
        )
    advantages = _checked_array(output.advantages, mask, f"{problem} advantages")
    returns = output.returns
    if returns is not None:
        returns = _checked_array(returns, mask, f"{problem} returns")
    if not isinstance(output.diagnostics, Mapping):
        raise ValueError(
            f"{problem} diagnostics as {_described(output.diagnostics)}. Return a mapping of names to numbers."
        )
    for key, value in output.diagnostics.items():
        if not isinstance(value, int | float):
            raise ValueError(
                f"{problem} the diagnostic {key!r} as {_described(value)}. Return a number."
            )
    try:
        json.dumps(dict(output.state))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{problem} a state that cannot be saved as JSON ({error}). Return a mapping of numbers, text and lists."
        ) from error
    return replace(output, advantages=advantages, returns=returns)


def _checked_array(array: object, mask: Tensor, problem: str) -> Tensor:
    if not isinstance(array, Tensor) or not array.is_floating_point():
        raise ValueError(
            f"{problem} as {_described(array)}. Return a floating-point tensor of shape {list(mask.shape)} (responses, tokens)."
        )
    if array.shape != mask.shape:
        raise ValueError(
            f"{problem} of shape {list(array.shape)}. Return the shape of response_mask, {list(mask.shape)} (responses, tokens)."
        )
    broken = int((mask & ~torch.isfinite(array)).sum())
    if broken:
        raise ValueError(
            f"{problem} of which {broken} of {int(mask.sum())} inside the response mask are not finite. "
            "Look for a division by 0, and at the rewards and log-probabilities that it was given."
        )
    return torch.where(mask, array.detach(), 0.0)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {list(value.shape)}"
    return f"{'an' if type(value).__name__[0] in 'AEIOUaeiou' else 'a'} {type(value).__name__}"
