"""A language model that is called with a pack and answers with the log-probabilities of its sampled tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlsys.algorithms.token_logprobs import token_logprobs
from rlsys.data.packing import Pack
from workers.policy.packed_attention import PackedLayout


@dataclass(frozen=True, kw_only=True)
class PackTensors:
    """A `Pack` on the device of the model."""

    token_ids: Tensor  # [1, n]
    position_ids: Tensor  # [1, n]
    layout: PackedLayout
    predict_positions: Tensor  # [m]
    targets: Tensor  # [m]

    @staticmethod
    def of(pack: Pack, device: torch.device) -> PackTensors:
        token_ids, position_ids, predict, targets = (
            torch.from_numpy(array).to(device)
            for array in (pack.token_ids, pack.position_ids, pack.predict_positions, pack.targets)
        )
        layout = PackedLayout(pack.groups, device)
        return PackTensors(
            token_ids=token_ids[None],
            position_ids=position_ids[None],
            layout=layout,
            predict_positions=predict,
            targets=targets,
        )


class PackResult(NamedTuple):
    """Of each of the pack's m sampled tokens; float32 but for `hidden`."""

    logprobs: Tensor  # [m]
    entropies: Tensor  # [m]
    score_norms: Tensor  # [m] without gradient
    hidden: Tensor  # [m, d] last hidden state at the position that predicts it; without gradient


class PackedCausalLM(nn.Module):
    """Decoder, then the LM head on the predicting positions only: prompts and the last tokens of responses never meet the vocabulary."""

    def __init__(self, model: PreTrainedModel, *, chunk_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.chunk_tokens = chunk_tokens

    @property
    def hidden_size(self) -> int:
        """Numbers of a hidden state."""
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear), "a causal language model has an LM head"
        return head.in_features

    def forward(self, pack: PackTensors, temperature: float) -> PackResult:
        """Log-probabilities, entropies and score norms of the sampled tokens, and what they were predicted from."""
        decoder = self.model.get_decoder()
        output = decoder(
            input_ids=pack.token_ids,
            position_ids=pack.position_ids,
            use_cache=False,
            packed_layout=pack.layout,
        )
        hidden = output.last_hidden_state[0].index_select(0, pack.predict_positions)
        head = self.model.get_output_embeddings()
        assert head is not None, "a causal language model has an LM head"
        tokens = token_logprobs(
            hidden,
            head.weight,
            pack.targets,
            temperature=temperature,
            chunk_tokens=self.chunk_tokens,
        )
        return PackResult(*tokens, hidden=hidden.detach())
