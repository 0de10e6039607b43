"""A model that learns from examples: updates, held-out losses, checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch

from rlsys.config.offline import OfflineRunConfig
from rlsys.data.example_stream import ExampleBatch
from rlsys.metrics import Metric, mean
from workers.training.losses import Denominators, PackColumns, PackLoss, backward_passes
from workers.training.offline_losses import LOSSES, OfflineLoss
from workers.training.trained_worker import TrainedCausalLMWorker, TrainedWorker
from workers.training.update_metrics import UpdateCounts


class OfflineWorker(TrainedWorker):
    """One rank of a model that learns from examples."""

    def __init__(
        self, config: OfflineRunConfig, model_directory: str, rank: int, world_size: int
    ) -> None:
        # The longest sequence of training or evaluation.
        online = config.online()
        longest = max(online.generation.max_tokens, config.data.max_response_tokens)
        super().__init__(
            config.online(longest_response=longest),
            config.trained,
            model_directory,
            rank,
            world_size,
        )
        self.offline = config

    def update(self, batch: ExampleBatch) -> dict[str, Metric]:
        """Take one optimizer step on a batch; every rank gets the whole batch."""
        self.counts = UpdateCounts()
        loss = self.loss_of(batch)
        packs = self.packs_of_sequences(batch.sequences, np.arange(len(batch)))
        passes = backward_passes(self.backend, packs, loss, self.denominators(batch))
        measured = self._measured(loss, (pack_loss for _, _, pack_loss in passes))
        norm = self.optimizer_step()

        # Every rank counts the same, so one of them reports.
        rate = {f"{self.role}/learning_rate": mean(self.learning_rate())}
        counts = self.counts.metrics(self.role) if self.rank == 0 else {}
        self.steps += 1
        reported = {f"{self.role}/{name}": metric for name, metric in measured.items()}
        return reported | norm | rate | counts | self.metrics()

    @torch.no_grad()
    def evaluate(self, batch: ExampleBatch) -> dict[str, Metric]:
        """Return loss and metrics of a batch under the live weights; collective."""
        loss, sizes = self.loss_of(batch), self.denominators(batch)

        def losses() -> Iterable[PackLoss]:
            for pack in self.packs_of_sequences(batch.sequences, np.arange(len(batch))):
                result = self.run(pack, 1.0)
                if not pack.is_padding:
                    yield loss(result, PackColumns(pack, self.backend.device), sizes)

        return {f"eval/{name}": metric for name, metric in self._measured(loss, losses()).items()}

    def loss_of(self, batch: ExampleBatch) -> OfflineLoss:
        """Return the loss of the configured objective on a batch."""
        return LOSSES[type(self.offline)](self.offline, batch)

    def denominators(self, batch: ExampleBatch) -> Denominators:
        """Return the sizes of a batch over all ranks."""
        return Denominators(
            num_tokens=max(1, batch.sequences.num_loss_tokens),
            num_sequences=len(batch),
            max_tokens=self.offline.data.max_response_tokens,
        )

    def _measured(self, loss: OfflineLoss, losses: Iterable[PackLoss]) -> dict[str, Metric]:
        """Return the loss of the batch and its metrics; `losses` are those of this rank's packs."""
        value = 0.0
        sums: Counter[str] = Counter()
        for pack_loss in losses:
            value += float(pack_loss.loss.detach())
            sums.update(pack_loss.sums)
        # The loss is a sum over ranks, and metrics of ranks are averaged.
        return {"loss": mean(self.world_size * value)} | loss.metrics(sums)


class SupervisedWorker(OfflineWorker, TrainedCausalLMWorker):
    """One rank of a policy that learns from demonstrations."""

    role = "policy"

    def setup(self, address: str) -> tuple[str, ...]:
        """See `RankWorker.setup`."""
        notes = super().setup(address)
        self.check_export()
        return notes
