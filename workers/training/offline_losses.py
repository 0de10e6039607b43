"""The losses of models that learn from examples, by the kind of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rlsys.algorithms.loss_aggregation import aggregate_loss
from rlsys.algorithms.supervised import negative_log_likelihood
from rlsys.config.offline import OfflineRunConfig, SupervisedConfig, SupervisedRunConfig
from rlsys.data.example_stream import ExampleBatch
from rlsys.metrics import Metric, mean, total
from workers.training.losses import Denominators, PackColumns, PackLoss
from workers.training.packed_model import PackResult


class OfflineLoss(Protocol):
    """A `TokenLoss` of a batch of examples, with the metrics of its sums."""

    def __call__(self, result: Any, columns: PackColumns, sizes: Denominators) -> PackLoss:
        """Return the loss of a pack, as a term of the loss of the batch."""
        ...

    def metrics(self, sums: Mapping[str, float]) -> dict[str, Metric]:
        """Return the metrics of this rank, by names without a prefix.

        Args:
            sums: `PackLoss.sums`, added up over the packs of this rank.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class SupervisedLoss:
    """The negative log-likelihood of demonstrations or texts."""

    objective: SupervisedConfig

    def __call__(self, result: PackResult, columns: PackColumns, sizes: Denominators) -> PackLoss:
        """See `OfflineLoss`."""
        logprobs, mask = columns.pad(result.logprobs), columns.mask()
        if self.objective.aggregation == "token_mean":
            loss = negative_log_likelihood(logprobs, mask, num_tokens=sizes.num_tokens)
        else:
            loss = aggregate_loss(
                -logprobs, mask, "sequence_mean", num_sequences=sizes.num_sequences
            )
        sums = {
            "tokens": float(len(result.logprobs)),
            "entropy": float(result.entropies.detach().sum()),
        }
        return PackLoss(loss=loss, sums=sums, maxima={})

    def metrics(self, sums: Mapping[str, float]) -> dict[str, Metric]:
        """See `OfflineLoss`."""
        tokens = sums.get("tokens", 0.0)
        entropy = sums.get("entropy", 0.0) / max(tokens, 1.0)
        return {"tokens": total(tokens), "entropy": mean(entropy, tokens)}


def _supervised(config: SupervisedRunConfig, batch: ExampleBatch) -> SupervisedLoss:
    return SupervisedLoss(objective=config.objective)


# The loss of a batch, by the kind of the run.
LOSSES: Mapping[type[OfflineRunConfig], Callable[..., OfflineLoss]] = {
    SupervisedRunConfig: _supervised,
}
