"""A decoder with a scalar head that maps a pack to a value for each of its sampled tokens.

The value of a token is read where its log-probability is: at the position before it, the state in
which the policy chose it. So V_t knows the prompt and the tokens before t, as `gae` expects.

A reward model is the same module, read after a token instead of before it: see
`TokenSequences.marked_after`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rlsys.models.value_models import value_config_fields, value_head
from workers.training.packed_model import PackedModel, PackTensors, padded_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ValueResult(NamedTuple):
    """The model's output at the pack's m sampled tokens."""

    values: Tensor  # [m] float32


class PackedValueModel(PackedModel):
    """A value model with a packed and a padded forward pass; `packing` selects the one that runs.

    `model` is one of `rlsys.models.value_models`.
    """

    def __init__(self, model: PreTrainedModel, *, packing: bool = True) -> None:
        super().__init__(model, packing=packing)
        value_head(model)  # refuses a model without one

    @property
    def hidden_size(self) -> int:
        """Width of a hidden state."""
        return value_head(self.model).in_features

    def config_fields(self) -> dict[str, Any]:
        """See `PackedModel`."""
        return value_config_fields(self.model)

    def forward(self, pack: PackTensors) -> ValueResult:
        """Return the values of the pack's sampled tokens."""
        hidden = self.hidden_states(pack) if self.packing else self._padded(pack)

        # In float32 whatever the compute dtype: bfloat16 has two to three digits, too few for a
        # difference of values.
        head = value_head(self.model)
        values = torch.mv(hidden.float(), head.weight[0].float())
        return ValueResult(values if head.bias is None else values + head.bias.float())

    def _padded(self, pack: PackTensors) -> Tensor:
        """Return [m, d] the last hidden states of the decoder's own pass on padded sequences."""
        rows = padded_rows(pack)
        # A token's position in its sequence is its column.
        columns = pack.position_ids[0].index_select(0, pack.predict_positions)
        states = self.model.get_decoder()(input_ids=rows, use_cache=False).last_hidden_state
        return states[pack.response_index, columns]
