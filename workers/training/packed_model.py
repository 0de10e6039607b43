"""A language model that is called with a pack and answers with the log-probabilities of its sampled tokens.

There are two forward passes with one result:

    packed    the decoder on all sequences of the pack at once, prompts shared, then the LM head on the
              positions that predict a sampled token
    padded    the model's own forward pass on the sequences, padded to a rectangle; for models whose
              packed pass differs from their own (see `forward_check`)
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlsys.algorithms.token_logprobs import token_logprobs, token_logprobs_of_logits
from rlsys.data.packing import Pack
from workers.training.lm_head import logit_transform
from workers.training.packed_attention import PackedLayout


@dataclass(frozen=True, kw_only=True)
class PackTensors:
    """A `Pack` on the device of the model."""

    token_ids: Tensor  # [1, n]
    position_ids: Tensor  # [1, n]
    layout: PackedLayout
    predict_positions: Tensor  # [m]
    response_index: Tensor  # [m] which of the pack's responses
    targets: Tensor  # [m]
    temperature: float = 1.0  # at which the tokens were sampled

    @staticmethod
    def of(pack: Pack, device: torch.device, temperature: float = 1.0) -> PackTensors:
        """Copy the pack's arrays to `device`."""
        token_ids, position_ids, predict, index, targets = (
            torch.from_numpy(array).to(device)
            for array in (
                pack.token_ids,
                pack.position_ids,
                pack.predict_positions,
                pack.response_index,
                pack.targets,
            )
        )
        layout = PackedLayout(pack.groups, device)
        return PackTensors(
            token_ids=token_ids[None],
            position_ids=position_ids[None],
            layout=layout,
            predict_positions=predict,
            response_index=index,
            targets=targets,
            temperature=temperature,
        )


class PackResult(NamedTuple):
    """Of each of the pack's m sampled tokens; float32 but for `hidden`."""

    logprobs: Tensor  # [m]
    entropies: Tensor  # [m]
    squared_score_norms: Tensor  # [m] without gradient
    hidden: Tensor  # [m, d] last hidden state at the position that predicts it; without gradient


class PackedModel(nn.Module):
    """A transformers model that is called with packs: what all heads on it share."""

    def __init__(self, model: PreTrainedModel, *, packing: bool) -> None:
        super().__init__()
        self.model = model
        self.packing = packing  # else every pack is padded to a rectangle

    def hidden_states(self, pack: PackTensors) -> Tensor:
        """Return [m, d] the last hidden states at the positions that predict a sampled token."""
        output = self.model.get_decoder()(
            input_ids=pack.token_ids,
            position_ids=pack.position_ids,
            use_cache=False,
            packed_layout=pack.layout,
        )
        return output.last_hidden_state[0].index_select(0, pack.predict_positions)


class PackedCausalLM(PackedModel):
    """A causal language model with a packed and a padded forward pass; `packing` says which one runs."""

    def __init__(self, model: PreTrainedModel, *, chunk_tokens: int, packing: bool = True) -> None:
        super().__init__(model, packing=packing)
        self.chunk_tokens = chunk_tokens
        self.transform = logit_transform(model.config)
        self._keeps_some_logits = "logits_to_keep" in signature(model.forward).parameters

    @property
    def hidden_size(self) -> int:
        """Width of a hidden state."""
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear), "a causal language model has an LM head"
        return head.in_features

    def forward(self, pack: PackTensors) -> PackResult:
        """Return log-probabilities, entropies and score norms of the sampled tokens."""
        return self._packed(pack) if self.packing else self._padded(pack)

    def _packed(self, pack: PackTensors) -> PackResult:
        """Run the LM head only on positions that predict a sampled token."""
        hidden = self.hidden_states(pack)
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear), "a causal language model has an LM head"
        tokens = token_logprobs(
            hidden,
            head.weight,
            pack.targets,
            temperature=pack.temperature,
            chunk_tokens=self.chunk_tokens,
            lm_head_bias=head.bias,
            transform=self.transform,
        )
        return PackResult(*tokens, hidden=hidden.detach())

    def _padded(self, pack: PackTensors) -> PackResult:
        """Logits exist at once: from the first predicting position on, where the model can leave out others."""
        rows = padded_rows(pack)
        # A token's position in its sequence is its column.
        columns = pack.position_ids[0].index_select(0, pack.predict_positions)
        options = {}
        if self._keeps_some_logits:
            first = int(columns.min())
            options["logits_to_keep"] = rows.shape[1] - first
            columns = columns - first

        seen: list[Tensor] = []
        head = self.model.get_output_embeddings()
        assert head is not None, "a causal language model has an LM head"
        hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
        try:
            logits = self.model(input_ids=rows, use_cache=False, **options).logits
        finally:
            hook.remove()

        chosen = logits[pack.response_index, columns]
        tokens = token_logprobs_of_logits(chosen, pack.targets, temperature=pack.temperature)
        hidden = seen[0][pack.response_index, columns] if seen else chosen.new_zeros(len(chosen), 0)
        return PackResult(*tokens, hidden=hidden)


def padded_rows(pack: PackTensors) -> Tensor:
    """Return [b, L] the pack's responses behind their prompts, a row each, padded on the right.

    Padding comes after everything that counts, so a causal model needs no mask: the columns that are
    read cannot see it. It repeats the row's first token rather than a pad token, which some models
    treat in a way of their own.
    """
    tokens = pack.token_ids[0]
    sequences: list[Tensor] = []
    for group in pack.layout.groups:
        begin = group.start + group.prompt_length
        prompt = tokens[group.start : begin]
        for length in group.response_lengths:
            sequences.append(torch.cat([prompt, tokens[begin : begin + length]]))
            begin += length

    longest = max(map(len, sequences))
    filled = [torch.cat([row, row[:1].expand(longest - len(row))]) for row in sequences]
    return torch.stack(filled)
