"""The loss of the critic on one pack."""

from __future__ import annotations

from dataclasses import dataclass

from rlsys.algorithms.loss_aggregation import aggregate_loss
from rlsys.algorithms.value import value_is_clipped, value_loss
from rlsys.data.batches import TrainBatch
from workers.training.losses import Denominators, PackColumns, PackLoss
from workers.training.packed_value_model import ValueResult


@dataclass(frozen=True, kw_only=True)
class ValueLoss:
    """The `TokenLoss` of the critic: the mean of `value_loss` over the tokens of the mini-batch.

    Gradient flows through the pack's result only.
    """

    batch: TrainBatch
    clip: float | None

    def __call__(self, result: ValueResult, columns: PackColumns, sizes: Denominators) -> PackLoss:
        """Return the loss of a pack, as a term of the loss of the mini-batch."""
        assert self.batch.returns is not None, "the estimator has returned targets"
        assert self.batch.values is not None, "the critic has computed the old values"
        old = columns.take(self.batch.values)
        returns = columns.take(self.batch.returns)

        losses = value_loss(result.values, old, returns, clip=self.clip)
        loss = aggregate_loss(
            columns.pad(losses), columns.mask(), "token_mean", num_tokens=sizes.num_tokens
        )
        clipped = value_is_clipped(result.values.detach(), old, returns, clip=self.clip)
        return PackLoss(loss=loss, sums={"clipped": float(clipped.sum())}, maxima={})
