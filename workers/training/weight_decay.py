"""Which parameters weight decay acts on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def decays(name: str, parameter: Tensor) -> bool:
    """Return whether weight decay acts on the parameter called `name`: a matrix (or a stack of them) that is neither of a norm nor a bias.

    Scales of norms and biases may have two dimensions as well (one for each head or expert), hence the look at the name.
    """
    parts = name.lower().split(".")
    is_bias = parts[-1] == "bias" or parts[-1].endswith("_bias")
    is_norm = any("norm" in part for part in parts)
    return parameter.ndim >= 2 and not is_bias and not is_norm


def parameter_groups(
    named_parameters: Iterable[tuple[str, Tensor]], weight_decay: float
) -> list[dict[str, Any]]:
    """Return the groups of an optimizer: with decay, and without. Shards of a parameter count as the parameter; a group may be empty."""
    with_decay: list[Tensor] = []
    without: list[Tensor] = []
    for name, parameter in named_parameters:
        (with_decay if decays(name, parameter) else without).append(parameter)
    return [
        {"params": with_decay, "weight_decay": weight_decay},
        {"params": without, "weight_decay": 0.0},
    ]
