"""A language model that maps a pack to the log-probabilities of the pack's sampled tokens.

There are two forward passes with one result:

    packed    the decoder on all sequences of the pack at once, prompts shared, then the LM head on
              the positions that predict a sampled token
    padded    the model's own forward pass on the sequences, padded to a rectangle; for models whose
              packed pass differs from their own (see `forward_check`)
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlsys.algorithms.token_logprobs import token_logprobs, token_logprobs_of_logits
from rlsys.algorithms.vocabulary_kl import LMHead, vocabulary_kl
from rlsys.data.hidden_states import JoinedStates
from rlsys.data.packing import Pack
from workers.training.lm_head import logit_transform
from workers.training.lora import Adapters
from workers.training.packed_attention import PackedLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class PackTensors:
    """A `Pack` on the device of the model."""

    token_ids: Tensor  # [1, n]
    position_ids: Tensor  # [1, n]
    layout: PackedLayout
    predict_positions: Tensor  # [m]
    response_index: Tensor  # [m] into the pack's responses
    targets: Tensor  # [m]
    temperature: float = 1.0  # at which the tokens were sampled
    # [m, e] the reference's hidden states, for the KL over the vocabulary; None: not computed
    ref_hidden: Tensor | None = None

    @staticmethod
    def of(
        pack: Pack,
        device: torch.device,
        temperature: float = 1.0,
        ref_hidden: JoinedStates | None = None,
    ) -> PackTensors:
        """Copy the pack's arrays, and the states of its tokens, to `device`."""

        def on_device(array: NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(array).to(device)

        return PackTensors(
            token_ids=on_device(pack.token_ids)[None],
            position_ids=on_device(pack.position_ids)[None],
            layout=PackedLayout(pack.groups, device),
            predict_positions=on_device(pack.predict_positions),
            response_index=on_device(pack.response_index),
            targets=on_device(pack.targets),
            temperature=temperature,
            ref_hidden=ref_hidden.take(pack.flat_positions).to(device) if ref_hidden else None,
        )


class PackResult(NamedTuple):
    """The model's output at the pack's m sampled tokens; all but `hidden` are float32."""

    logprobs: Tensor  # [m]
    entropies: Tensor  # [m]
    squared_score_norms: Tensor  # [m] without gradient
    hidden: Tensor  # [m, d] last hidden state at the position that predicts it; without gradient
    exact_kl: Tensor | None = None  # [m] KL to the reference over the vocabulary


class PackedModel(nn.Module):
    """A transformers model that is called with packs; the base of models with different heads."""

    def __init__(self, model: PreTrainedModel, *, packing: bool) -> None:
        super().__init__()
        self.model = model
        self.packing = packing  # else every pack is padded to a rectangle
        self.adapters: Adapters | None = None  # None: the weights themselves are trained
        # Rows of this rank by name, of parameters on the meta device; the backend takes them.
        self.own_rows: dict[str, Tensor] = {}

    def hidden_states(self, pack: PackTensors) -> Tensor:
        """Return [m, d] the last hidden states at the positions that predict a sampled token."""
        # transformers hands `packed_layout` down to the attention function (`packed_attention`).
        output = self.model.get_decoder()(
            input_ids=pack.token_ids,
            position_ids=pack.position_ids,
            use_cache=False,
            packed_layout=pack.layout,
        )
        return output.last_hidden_state[0].index_select(0, pack.predict_positions)

    def config_fields(self) -> dict[str, Any]:
        """Return what config.json of the saved model has to say beyond that of the loaded one."""
        return {}


class PackedCausalLM(PackedModel):
    """A causal language model with a packed and a padded forward pass.

    `packing` selects the one that runs.
    """

    def __init__(self, model: PreTrainedModel, *, chunk_tokens: int, packing: bool = True) -> None:
        super().__init__(model, packing=packing)
        self.chunk_tokens = chunk_tokens
        self.transform = logit_transform(model.config)
        self.reference_head: LMHead | None = None  # with the packs' `ref_hidden`
        self._keeps_some_logits = "logits_to_keep" in signature(model.forward).parameters

    @property
    def hidden_size(self) -> int:
        """Width of a hidden state."""
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear), "a causal language model has an LM head"
        return head.in_features

    @property
    def vocabulary_size(self) -> int:
        """Number of logits of a token."""
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear), "a causal language model has an LM head"
        return head.out_features

    def forward(self, pack: PackTensors) -> PackResult:
        """Return log-probabilities, entropies and squared score norms of the sampled tokens."""
        return self._packed(pack) if self.packing else self._padded(pack)

    def _packed(self, pack: PackTensors) -> PackResult:
        """Run the LM head only on positions that predict a sampled token."""
        # The weight of the head is used in chunks of tokens, so that the logits of all tokens never
        # exist at once.
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
        exact_kl = None
        if pack.ref_hidden is not None:
            assert self.reference_head is not None, "loaded at set-up, where hidden states are used"
            exact_kl = vocabulary_kl(
                hidden,
                LMHead(head.weight, head.bias, self.transform),
                pack.ref_hidden,
                self.reference_head,
                temperature=pack.temperature,
                chunk_tokens=self.chunk_tokens,
            )
        return PackResult(*tokens, hidden=hidden.detach(), exact_kl=exact_kl)

    def _padded(self, pack: PackTensors) -> PackResult:
        """Run the model's own forward pass, which computes the logits of all positions at once."""
        rows = padded_rows(pack)
        # A token's position in its sequence is its column.
        columns = pack.position_ids[0].index_select(0, pack.predict_positions)

        # Many models can leave out the logits before a column; prompts need none.
        options = {}
        if self._keeps_some_logits:
            first = int(columns.min())
            options["logits_to_keep"] = rows.shape[1] - first
            columns = columns - first

        # The input of the LM head is the last hidden state. A model that does not call its head
        # as a module leaves the list empty.
        head_inputs: list[Tensor] = []

        def keep_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            head_inputs.append(inputs[0].detach())

        head = self.model.get_output_embeddings()
        assert head is not None, "a causal language model has an LM head"
        hook = head.register_forward_pre_hook(keep_input)
        try:
            all_logits = self.model(input_ids=rows, use_cache=False, **options).logits
        finally:
            hook.remove()

        logits = all_logits[pack.response_index, columns]
        tokens = token_logprobs_of_logits(logits, pack.targets, temperature=pack.temperature)
        hidden = logits.new_zeros(len(logits), 0)
        if head_inputs:
            hidden = head_inputs[0][pack.response_index, columns]
        return PackResult(*tokens, hidden=hidden)


def padded_rows(pack: PackTensors) -> Tensor:
    """Return [b, L] the pack's responses after their prompts, one per row, padded on the right.

    A causal model needs no mask for this padding: the columns that are read come before it. Padding
    repeats the row's first token, since some models treat their pad token specially.
    """
    tokens = pack.token_ids[0]
    sequences: list[Tensor] = []
    for group in pack.layout.groups:
        begin = group.start + group.prompt_length
        prompt = tokens[group.start : begin]
        for length in group.response_lengths:
            sequences.append(torch.cat([prompt, tokens[begin : begin + length]]))
            begin += length

    longest = max(len(row) for row in sequences)
    padded = [torch.cat([row, row[:1].expand(longest - len(row))]) for row in sequences]
    return torch.stack(padded)
