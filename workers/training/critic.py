"""The critic of PPO: values of the policy's tokens, and their update."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from rlsys.config import RunConfig
from rlsys.data.batches import RolloutBatch, TrainBatch, ValueBatch
from rlsys.data.packing import mini_batch_rows
from rlsys.metrics import Metric, combine, mean
from rlsys.models.loading import UnsupportedModelError
from workers.training.backends import build_backend
from workers.training.backends.backend import ModelBackend
from workers.training.lora import TrainedParametersError
from workers.training.losses import Denominators, backward_passes
from workers.training.model_setup import Role, prepare, value_model
from workers.training.optimizer_steps import OptimizerSteps
from workers.training.trained_worker import TrainedWorker
from workers.training.value_loss import ValueLoss


class CriticWorker(TrainedWorker):
    """One rank of the critic."""

    role = "critic"
    value_role = "critic"

    def __init__(self, config: RunConfig, model_directory: str, rank: int, world_size: int) -> None:
        super().__init__(config, config.critic_role(), model_directory, rank, world_size)
        self.steps = OptimizerSteps("critic", config.critic.optimizer, config.trainer.steps)

    def build(self, device: torch.device) -> tuple[ModelBackend[Any], str | None]:
        """See `RankWorker`.

        Raises:
            UnsupportedModelError: the model of `critic.path` can give no right values.
        """
        path = self.config.critic.path or self.config.model.path
        role = Role(section=self.role, path=path)
        try:
            module, verdict = prepare(
                value_model(), self.config, self.settings, self.model_directory, device, role
            )
        except TrainedParametersError:
            raise
        except UnsupportedModelError as error:
            reason = str(error).removeprefix("model.path: ")
            raise UnsupportedModelError(f"critic.path: {reason}") from error
        backend = build_backend(module, self.settings, device, self.model_directory)
        return backend, verdict.reason

    def values(self, *parts: RolloutBatch) -> ValueBatch:
        """Return the values of this rank's rows of a batch; `parts` in prompt order."""
        rollouts = RolloutBatch.concatenate(parts)
        rows, (values,) = self.outputs_of_own_rows(rollouts, lambda _, result: (result.values,))
        return ValueBatch(batch_id=rollouts.batch_id, rows=rows, values=values)

    def put_values(self, *parts: RolloutBatch) -> Any:
        """Put the result of `values` into the object store and return its reference."""
        return ray.put(self.values(*parts))

    def update(self, batch: TrainBatch) -> dict[str, Metric]:
        """Train on the returns of one batch, in all epochs and mini-batches of the critic.

        Every rank gets the whole batch and trains on its part. The critic trains on all responses
        that have a reward, also on those that the policy does not train on (truncated ones, with
        `algorithm.overlong.mask_truncated`): they have returns all the same.
        """
        epochs, num_mini_batches = self.config.critic_passes()
        mini_batches = mini_batch_rows(
            batch.rollouts.sequences,
            num_mini_batches=num_mini_batches,
            epochs=epochs,
            seed=self.config.trainer.seed,
            batch_id=batch.batch_id,
        )
        trained = [rows[batch.rewards.scored[rows]] for rows in mini_batches]
        self.steps.begin(empty=sum(not len(rows) for rows in trained))

        reports = [self._update_on(batch, rows) for rows in trained if len(rows)]
        return combine(reports) | self.steps.end(self.rank) | self.metrics()

    def _update_on(self, batch: TrainBatch, rows: NDArray[np.int64]) -> dict[str, Metric]:
        """Take one optimizer step on the responses `rows`."""
        lengths = batch.rollouts.response_lengths[rows]
        sizes = Denominators(
            num_tokens=max(1, int(lengths.sum())),
            num_sequences=len(rows),
            max_tokens=self.config.generation.max_tokens,
        )
        loss = ValueLoss(batch=batch, clip=self.config.critic.value_clip)

        total, clipped, tokens = 0.0, 0.0, 0
        packs = self.packs_of(batch.rollouts, rows)
        for pack, _, pack_loss in backward_passes(self.backend, packs, loss, sizes):
            total += float(pack_loss.loss.detach())
            clipped += pack_loss.sums["clipped"]
            tokens += len(pack.targets)

        # The loss is a sum over ranks: times their number, its mean over ranks is that sum.
        metrics = {"critic/loss": mean(self.world_size * total)}
        if tokens:
            metrics["critic/clip_fraction"] = mean(clipped / tokens, tokens)
        return metrics | self.steps.take(self.backend)
