"""A model that learns from examples: updates, held-out losses, checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from rlsys.config.offline import OfflineRunConfig
from rlsys.data.example_stream import ExampleBatch
from rlsys.metrics import Metric, mean
from workers.training.losses import Denominators, PackColumns, PackLoss, backward_passes
from workers.training.offline_losses import LOSSES, OfflineLoss
from workers.training.optimizer_steps import OptimizerSteps
from workers.training.rank_worker import RankWorker
from workers.training.sampled_from import SampledFromWorker
from workers.training.saved_state import load_state, save_state


class OfflineWorker(RankWorker):
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
        optimizer = config.trained.optimizer
        self.steps = OptimizerSteps(self.role, optimizer, config.trainer.steps)

    def update(self, batch: ExampleBatch) -> dict[str, Metric]:
        """Take one optimizer step on a batch; every rank gets the whole batch."""
        self.steps.begin(empty=0)
        loss = self.loss_of(batch)
        packs = self.packs_of_sequences(batch.sequences, np.arange(len(batch)))
        passes = backward_passes(self.backend, packs, loss, self.denominators(batch))
        measured = self._measured(loss, (pack_loss for _, _, pack_loss in passes))
        norm = self.steps.take(self.backend)

        reported = {f"{self.role}/{name}": metric for name, metric in measured.items()}
        return reported | norm | self.steps.end(self.rank) | self.metrics()

    def save(self, directory: str) -> None:
        """Write the model in Hugging Face layout, optimizer and schedule; collective."""
        facts = {"ranks": self.world_size, "steps": self.steps.completed}
        save_state(self.backend, Path(directory), role=self.role, rank=self.rank, facts=facts)

    def load(self, directory: str) -> None:
        """Continue from what `save` wrote; collective.

        Raises:
            ValueError: the checkpoint is of another number of ranks or of another model.
        """
        facts = load_state(self.backend, Path(directory), role=self.role, ranks=self.world_size)
        self.steps.completed = facts["steps"]

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


class SupervisedWorker(OfflineWorker, SampledFromWorker):
    """One rank of a policy that learns from demonstrations."""

    role = "policy"

    def setup(self, address: str) -> tuple[str, ...]:
        """See `RankWorker.setup`."""
        notes = super().setup(address)
        if self.offline.trainer.evaluation.problems:
            self.check_export()
        return notes
