"""The outputs of a model that the check of its forward pass compares (see `forward_check`).

LOGPROBS    of a language model
VALUES      of a model with a scalar head, under random weights of the head: a new head is 0,
            which would hide every difference
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlsys.models.value_models import value_head
from workers.training.packed_model import PackedCausalLM, PackTensors, padded_rows
from workers.training.packed_value_model import PackedValueModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits of so many tokens exist at once.
CHUNK_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class CheckedOutput:
    """An output of a kind of model, which the check compares; a number for each sampled token."""

    noun: str
    unit: str  # after a number, with a space before it; "" where there is none
    # [m] of the pass that `packing` selects.
    outputs: Callable[[PreTrainedModel, PackTensors, bool], Tensor]
    # [m] of the model's own pass on one sequence.
    alone: Callable[[PreTrainedModel, PackTensors], Tensor]
    # Weights that show a difference, inside of the context.
    weights: Callable[[PreTrainedModel], AbstractContextManager[Any]] = nullcontext


def _logprob_outputs(model: PreTrainedModel, pack: PackTensors, packing: bool) -> Tensor:
    return PackedCausalLM(model, chunk_tokens=CHUNK_TOKENS, packing=packing)(pack).logprobs


LOGPROBS = CheckedOutput(
    noun="log-probabilities",
    unit=" nats",
    outputs=_logprob_outputs,
    alone=lambda model, pack: _logprob_outputs(model, pack, False),
)


def _value_outputs(model: PreTrainedModel, pack: PackTensors, packing: bool) -> Tensor:
    return PackedValueModel(model, packing=packing)(pack).values


def _own_values(model: PreTrainedModel, pack: PackTensors) -> Tensor:
    """Return the output of the head in the model's own forward pass on a single sequence."""
    kept: list[Tensor] = []

    def keep_output(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept.append(output)

    hook = value_head(model).register_forward_hook(keep_output)
    try:
        model(input_ids=padded_rows(pack), use_cache=False)
    finally:
        hook.remove()

    # [1, L, 1]: one number per position, before a class for sequences chooses the last.
    columns = pack.position_ids[0].index_select(0, pack.predict_positions)
    return kept[0][0, columns, 0]


@contextmanager
def _random_head(model: PreTrainedModel) -> Iterator[None]:
    """Give the head of a value model random weights inside the context."""
    head = value_head(model)
    before = head.weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(before.shape, generator=generator) * before.shape[1] ** -0.5
    try:
        with torch.no_grad():
            head.weight.copy_(weight)
        yield
    finally:
        with torch.no_grad():
            head.weight.copy_(before)


VALUES = CheckedOutput(
    noun="values", unit="", outputs=_value_outputs, alone=_own_values, weights=_random_head
)
