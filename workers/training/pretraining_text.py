"""Pretraining text in the updates of the policy: its loss, and its part of each mini-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlsys.algorithms.policy_objectives.ptx import ptx_loss
from rlsys.data.example_stream import ExampleBatch
from rlsys.metrics import Metric, mean, total
from workers.training.losses import Denominators, PackColumns, PackLoss
from workers.training.packed_model import PackResult


@dataclass(frozen=True, kw_only=True)
class TextLoss:
    """The `TokenLoss` of pretraining text: the coefficient times its negative log-likelihood."""

    coefficient: float

    def __call__(self, result: PackResult, columns: PackColumns, sizes: Denominators) -> PackLoss:
        """Return the loss of a pack, as a term of the loss of one optimizer step."""
        loss = ptx_loss(
            columns.pad(result.logprobs),
            columns.mask(),
            coefficient=self.coefficient,
            num_tokens=sizes.num_tokens,
        )
        sums = {
            "tokens": float(len(result.logprobs)),
            "negative_logprob": -float(result.logprobs.detach().double().sum()),
        }
        return PackLoss(loss=loss, sums=sums, maxima={})


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """The texts of one optimizer step: some rows of the batch of a training step."""

    texts: ExampleBatch
    rows: NDArray[np.int64]

    @property
    def sizes(self) -> Denominators:
        """The sizes of the part over all ranks."""
        sequences = self.texts.sequences
        return Denominators(
            num_tokens=int(sequences.loss_lengths[self.rows].sum()),
            num_sequences=len(self.rows),
            max_tokens=int(sequences.loss_lengths.max()),
        )


def text_parts(texts: ExampleBatch | None, updates: int) -> Sequence[TextPart | None]:
    """Divide the texts of a training step among its `updates`, in their order; None: no text.

    The numbers of texts differ by one at most.
    """
    if texts is None:
        return [None] * updates
    assert len(texts) >= updates, "checked by the rules of the configuration"
    parts = np.array_split(np.arange(len(texts)), updates)
    return [TextPart(texts=texts, rows=rows) for rows in parts]


def text_metrics(losses: Sequence[PackLoss]) -> dict[str, Metric]:
    """Return loss per token and number of tokens of one optimizer step on one rank."""
    tokens, mean_loss = _mean_loss(losses)
    return {"policy/ptx_loss": mean(mean_loss, tokens), "policy/ptx_tokens": total(tokens)}


def held_out_metrics(losses: Sequence[PackLoss]) -> dict[str, Metric]:
    """Return the loss per token of held-out text on one rank."""
    tokens, mean_loss = _mean_loss(losses)
    return {"eval/text_loss": mean(mean_loss, tokens)}


def _mean_loss(losses: Sequence[PackLoss]) -> tuple[float, float]:
    """Return the number of tokens in packs, and their mean negative log-likelihood."""
    tokens = sum(loss.sums["tokens"] for loss in losses)
    return tokens, sum(loss.sums["negative_logprob"] for loss in losses) / max(tokens, 1.0)
