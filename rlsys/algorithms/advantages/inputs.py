"""What advantage estimators take and give, and how they are registered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

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
    score_norms: Tensor | None = None  # [B, T] proxy of ||grad log pi||^2

    def __post_init__(self) -> None:
        mask = self.response_mask
        if mask.ndim != 2 or mask.dtype != torch.bool:
            raise ValueError(f"response_mask must be a [B, T] bool tensor, not {tuple(mask.shape)} {mask.dtype}")
        for name in ("rewards", "group_ids"):
            if getattr(self, name).shape != mask.shape[:1]:
                raise ValueError(f"{name} must have shape [{mask.shape[0]}], not {tuple(getattr(self, name).shape)}")
        for name in ("token_rewards", "rollout_logprobs", "old_logprobs", "ref_logprobs", "values", "score_norms"):
            array = getattr(self, name)
            if array is not None and array.shape != mask.shape:
                raise ValueError(f"{name} must have the shape of response_mask, {tuple(mask.shape)}, not {tuple(array.shape)}")


@dataclass(frozen=True, kw_only=True)
class AdvantageOutput:
    """Advantages are 0 outside the mask. Diagnostics go to the metrics as advantage/<name>."""

    advantages: Tensor  # [B, T]
    returns: Tensor | None = None  # [B, T] critic targets
    diagnostics: Mapping[str, float] = field(default_factory=dict)


AdvantageEstimator = Callable[..., AdvantageOutput]
_ESTIMATORS: Registry[AdvantageEstimator] = Registry("advantage estimator")


def register_advantage_estimator(name: str) -> Callable[[AdvantageEstimator], AdvantageEstimator]:
    """Decorator: make `function(inputs, *, keywords...) -> AdvantageOutput` available as `algorithm.advantage.name`."""
    return _ESTIMATORS.register(name)


def get_advantage_estimator(name: str) -> AdvantageEstimator:
    """The estimator called `name`.

    Raises:
        ValueError: unknown name, with the nearest ones.
    """
    return _ESTIMATORS.get(name, field="algorithm.advantage.name")


def available_advantage_estimators() -> tuple[str, ...]:
    """All registered names, sorted."""
    return _ESTIMATORS.names()


def needs_old_logprobs(name: str) -> bool:
    """Whether an estimator reads `old_logprobs`, so that the policy must compute them before the update."""
    return bool(getattr(get_advantage_estimator(name), "needs_old_logprobs", False))
