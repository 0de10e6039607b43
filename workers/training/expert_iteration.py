"""A policy that learns its own correct responses: several passes over those of each step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlsys.config.expert_iteration import ExpertIterationRunConfig
from rlsys.data.epoch_order import mini_batches
from rlsys.data.example_stream import ExampleBatch, ReferenceLogprobs
from rlsys.metrics import Metric, combine
from workers.training.losses import Denominators
from workers.training.offline import OfflineWorker
from workers.training.offline_losses import OfflineLoss, SupervisedLoss
from workers.training.sampled_from import SampledFromWorker


class ExpertIterationWorker(OfflineWorker, SampledFromWorker):
    """One rank of a policy that learns the responses that were kept of its samples."""

    role = "policy"
    offline: ExpertIterationRunConfig

    def setup(self, address: str) -> tuple[str, ...]:
        """See `RankWorker.setup`."""
        notes = super().setup(address)
        self.check_export()
        return notes

    def update(self, batch: ExampleBatch, *reference: ReferenceLogprobs) -> dict[str, Metric]:
        """Train all epochs and mini-batches of the responses of a step; there may be none.

        Every rank gets the whole batch and divides it in the same way. Over the updates of a step
        the schedule of the learning rate advances by one step, however many updates there are.
        """
        updates = self._mini_batches(batch)
        self.steps.begin(empty=0 if updates else 1, spread_over=len(updates))

        loss = self.loss_of(batch, reference)
        reports = [
            self.take_step(
                self.packs_of_sequences(batch.sequences, rows), loss, self._sizes(batch, rows)
            )
            for rows in updates
        ]
        return combine(reports) | self.steps.end(self.rank) | self.metrics()

    def loss_of(self, batch: ExampleBatch, reference: Sequence[ReferenceLogprobs]) -> OfflineLoss:
        """See `OfflineWorker`."""
        return SupervisedLoss(objective=self.offline.objective)

    def _mini_batches(self, batch: ExampleBatch) -> list[NDArray[np.int64]]:
        """Return the rows of each update, in order."""
        expert = self.offline.expert
        seed = (self.offline.trainer.seed, batch.batch_id)
        return [
            *mini_batches(
                len(batch), size=expert.examples_per_update, epochs=expert.epochs, seed=seed
            )
        ]

    def _sizes(self, batch: ExampleBatch, rows: NDArray[np.int64]) -> Denominators:
        """Return the sizes of a mini-batch over all ranks; each response is an example."""
        return Denominators(
            num_tokens=max(1, int(batch.sequences.loss_lengths[rows].sum())),
            num_sequences=len(rows),
            max_tokens=self.offline.longest_response,
        )
