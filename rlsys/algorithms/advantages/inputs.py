"""What advantage estimators take and give, and how they are registered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rlsys.algorithms.advantages.hierarchical_network import BaselineRegression
from rlsys.registry import Registry


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

    def require(self, name: str, *, estimator: str, remedy: str) -> Tensor:
        """The array `name`, which `estimator` cannot do without.

        Raises:
            ValueError: it is None; the message says how to get it.
        """
        array = getattr(self, name)
        if array is None:
            raise ValueError(
                f"algorithm.advantage.name: {estimator!r} needs {name}, which this batch does not have. {remedy}"
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
# What costs something to provide, so that it is made only for the estimators that say they read it.
Need = Literal["old_logprobs", "ref_logprobs", "score_norms", "greedy_rewards"]
_ESTIMATORS: Registry[AdvantageEstimator] = Registry("advantage estimator")
_NEEDS: dict[str, frozenset[Need]] = {}
_COMPARE_GROUP: set[str] = set()


def register_advantage_estimator(
    name: str, *, needs: Iterable[Need] = (), compares_group: bool = False
) -> Callable[[AdvantageEstimator], AdvantageEstimator]:
    """Decorator: make `function(inputs, *, keywords...) -> AdvantageOutput` available as `algorithm.advantage.name`.

    `needs` names the optional inputs that the estimator reads: the driver has them computed, and they are not None then. `compares_group` says that
    a response without another to the same prompt gets 0: a run that samples one response a prompt is refused.
    """
    register = _ESTIMATORS.register(name)

    def decorator(estimator: AdvantageEstimator) -> AdvantageEstimator:
        register(estimator)
        _NEEDS[name] = frozenset(needs)
        (_COMPARE_GROUP.add if compares_group else _COMPARE_GROUP.discard)(name)
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
    return _NEEDS[name]


def compares_group(name: str) -> bool:
    """Whether the estimator `name` gives 0 to a response without another to the same prompt."""
    get_advantage_estimator(name)
    return name in _COMPARE_GROUP
