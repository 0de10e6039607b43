"""The choice of the parameters that weight decay acts on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def decays(name: str, parameter: Tensor) -> bool:
    """Return True if weight decay acts on the parameter called `name`.

    It acts on matrices and stacks of matrices. Biases and the scales of norms are exempt; they are
    recognised by name, since they may have two dimensions as well (one per head or expert).
    """
    parts = name.lower().split(".")
    is_bias = parts[-1] == "bias" or parts[-1].endswith("_bias")
    is_norm = any("norm" in part for part in parts)
    return parameter.ndim >= 2 and not is_bias and not is_norm


def parameter_groups(
    named_parameters: Iterable[tuple[str, Tensor]], weight_decay: float
) -> list[dict[str, Any]]:
    """Return the parameter groups of an optimizer: first with decay, then without.

    Sharded parameters have the shape of the whole parameter. A group may be empty.
    """
    with_decay: list[Tensor] = []
    without: list[Tensor] = []
    for name, parameter in named_parameters:
        group = with_decay if decays(name, parameter) else without
        group.append(parameter)

    return [
        {"params": with_decay, "weight_decay": weight_decay},
        {"params": without, "weight_decay": 0.0},
    ]
