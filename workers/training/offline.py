"""A model that learns from examples: updates, held-out losses, checkpoints."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlsys.config import RunConfig
from rlsys.config.offline import (
    OfflineRunConfig,
    PreferenceRunConfig,
    ProcessRewardModelRunConfig,
    RewardModelRunConfig,
    SupervisedRunConfig,
)
from rlsys.data.example_encoding import NO_STEP
from rlsys.data.example_stream import ExampleBatch, ReferenceLogprobs
from rlsys.data.packing import Pack
from rlsys.metrics import Metric, mean
from rlsys.models.saving import change_model_config
from rlsys.models.value_models import separate_padding
from workers.training.backends import build_backend
from workers.training.backends.backend import ModelBackend
from workers.training.losses import Denominators, PackColumns, PackLoss, backward_passes
from workers.training.model_setup import Role, prepare, value_model
from workers.training.offline_losses import (
    OfflineLoss,
    PreferenceLoss,
    RankingLoss,
    StepLoss,
    SupervisedLoss,
)
from workers.training.optimizer_steps import OptimizerSteps
from workers.training.reference import OwnReferenceWorker, ReferencePasses
from workers.training.sampled_from import SampledFromWorker
from workers.training.sharded_checkpoint import RankFiles
from workers.training.trained_worker import TrainedWorker

# The entry of config.json with the mean reward over held-out responses.
REWARD_MEAN = "reward_mean"


def online_of(config: OfflineRunConfig) -> RunConfig:
    """Return the RL run whose longest response is that of training or evaluation."""
    longest = max(config.online().generation.max_tokens, config.longest_response)
    return config.online(longest_response=longest)


class OfflineWorker(TrainedWorker):
    """One rank of a model that learns from examples."""

    def __init__(
        self, config: OfflineRunConfig, model_directory: str, rank: int, world_size: int
    ) -> None:
        super().__init__(online_of(config), config.trained, model_directory, rank, world_size)
        self.offline = config
        optimizer = config.trained.optimizer
        self.steps = OptimizerSteps(self.role, optimizer, config.trainer.steps)

    def update(self, batch: ExampleBatch, *reference: ReferenceLogprobs) -> dict[str, Metric]:
        """Take one optimizer step on a batch; every rank gets the whole batch.

        Args:
            reference: what the ranks of the reference returned for the batch, if there is one.
        """
        self.steps.begin(empty=0)
        loss = self.loss_of(batch, reference)
        taken = self.take_step(self.packs_of_batch(batch), loss, self.denominators(batch))
        return taken | self.steps.end(self.rank) | self.metrics()

    def take_step(
        self, packs: Iterable[Pack], loss: OfflineLoss, sizes: Denominators
    ) -> dict[str, Metric]:
        """Take one optimizer step on this rank's packs of a mini-batch; return its metrics."""
        passes = backward_passes(self.backend, packs, loss, sizes)
        measured = self._measured(loss, (pack_loss for _, _, pack_loss in passes))
        norm = self.steps.take(self.backend)
        return {f"{self.role}/{name}": metric for name, metric in measured.items()} | norm

    @torch.no_grad()
    def evaluate(self, batch: ExampleBatch, *reference: ReferenceLogprobs) -> dict[str, Metric]:
        """Return loss and metrics of a batch under the live weights; collective."""
        loss, sizes = self.held_out_loss_of(batch, reference), self.denominators(batch)

        def losses() -> Iterable[PackLoss]:
            for pack in self.packs_of_batch(batch):
                result = self.run(pack, 1.0)
                if not pack.is_padding:
                    yield loss(result, PackColumns(pack, self.backend.device), sizes)

        return {f"eval/{name}": metric for name, metric in self._measured(loss, losses()).items()}

    def loss_of(self, batch: ExampleBatch, reference: Sequence[ReferenceLogprobs]) -> OfflineLoss:
        """Return the loss of the configured objective on a batch."""
        raise NotImplementedError

    def held_out_loss_of(
        self, batch: ExampleBatch, reference: Sequence[ReferenceLogprobs]
    ) -> OfflineLoss:
        """Return the loss of an evaluation, which may measure more than that of an update."""
        return self.loss_of(batch, reference)

    def packs_of_batch(self, batch: ExampleBatch) -> list[Pack]:
        """Return this rank's packs of a batch, with all responses to a prompt in one of them."""
        rows = np.arange(len(batch))
        return self.packs_of_sequences(batch.sequences, rows, whole_groups=True)

    def denominators(self, batch: ExampleBatch) -> Denominators:
        """Return the sizes of a batch over all ranks; its sequences are the examples."""
        return Denominators(
            num_tokens=max(1, batch.sequences.num_loss_tokens),
            num_sequences=batch.num_examples,
            max_tokens=self.offline.longest_response,
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


class LanguageModelWorker(OfflineWorker, SampledFromWorker):
    """One rank of a policy that learns from examples."""

    role = "policy"

    def setup(self, address: str) -> tuple[str, ...]:
        """See `RankWorker.setup`."""
        notes = super().setup(address)
        if self.offline.trainer.evaluation.problems:
            self.check_export()
        return notes


class SupervisedWorker(LanguageModelWorker):
    """One rank of a policy that learns from demonstrations or texts."""

    offline: SupervisedRunConfig

    def loss_of(self, batch: ExampleBatch, reference: Sequence[ReferenceLogprobs]) -> OfflineLoss:
        """See `OfflineWorker`."""
        return SupervisedLoss(objective=self.offline.objective)


class PreferenceWorker(LanguageModelWorker, OwnReferenceWorker):
    """One rank of a policy that learns from preference pairs."""

    offline: PreferenceRunConfig

    def loss_of(self, batch: ExampleBatch, reference: Sequence[ReferenceLogprobs]) -> OfflineLoss:
        """See `OfflineWorker`."""
        return PreferenceLoss(
            objective=self.offline.objective,
            batch=batch,
            reference=ReferenceLogprobs.scatter(reference, len(batch)),
        )


class ExampleReferenceWorker(ReferencePasses):
    """One rank of the frozen reference of preference pairs."""

    role = "reference"

    def __init__(
        self, config: PreferenceRunConfig, model_directory: str, rank: int, world_size: int
    ) -> None:
        super().__init__(
            online_of(config), config.reference_role(), model_directory, rank, world_size
        )


class RewardModelWorker(OfflineWorker):
    """One rank of a reward model: a decoder with a scalar head, read after the last token."""

    role = "reward_model"
    value_role = "reward_model"
    offline: RewardModelRunConfig

    def __init__(
        self, config: RewardModelRunConfig, model_directory: str, rank: int, world_size: int
    ) -> None:
        super().__init__(config, model_directory, rank, world_size)
        self.reward_mean: float | None = None  # over the held-out responses, once it was measured

    def build(self, device: torch.device) -> tuple[ModelBackend[Any], str | None]:
        """See `RankWorker`; a new head has the layout of sequence classification."""
        kind = value_model("sequence", head_seed=self.config.trainer.seed)
        role = Role(section=self.role, path=self.config.model.path)
        module, verdict = prepare(
            kind, self.config, self.settings, self.model_directory, device, role
        )
        backend = build_backend(module, self.settings, device, self.model_directory)
        return backend, verdict.reason

    def packs_of_batch(self, batch: ExampleBatch) -> list[Pack]:
        """See `OfflineWorker`; the value after the last token of each response is read."""
        last = np.zeros(len(batch.sequences.token_ids), dtype=np.bool_)
        last[_ends(batch)] = True
        marked = batch.sequences.marked_after(last)
        return self.packs_of_sequences(marked, np.arange(len(batch)), whole_groups=True)

    def loss_of(self, batch: ExampleBatch, reference: Sequence[ReferenceLogprobs]) -> OfflineLoss:
        """See `OfflineWorker`."""
        return RankingLoss(objective=self.offline.objective, batch=batch)

    def held_out_loss_of(
        self, batch: ExampleBatch, reference: Sequence[ReferenceLogprobs]
    ) -> OfflineLoss:
        """See `OfflineWorker`; it measures calibration, too."""
        objective = self.offline.objective
        return RankingLoss(objective=objective, batch=batch, measures_calibration=True)

    def keep_reward_mean(self, value: float) -> None:
        """Keep the mean reward of the held-out responses for the next checkpoint."""
        self.reward_mean = value

    def write_checkpoint(self, files: RankFiles) -> None:
        """See `OfflineWorker`; config.json gets the mean reward, to be subtracted by readers.

        Where it was not measured, the entry is null: that of the model at the start is of others.
        """
        super().write_checkpoint(files)
        if self.rank == 0:
            trust = self.config.model.trust_remote_code
            fields = {REWARD_MEAN: self.reward_mean}
            files.write(lambda: separate_padding(files.path, trust_remote_code=trust))
            files.write(lambda: change_model_config(files.path, fields))

    def load(self, directory: str) -> None:
        """See `OfflineWorker`."""
        super().load(directory)
        facts = json.loads((Path(directory) / "config.json").read_text())
        self.reward_mean = facts.get(REWARD_MEAN)


class ProcessRewardModelWorker(OfflineWorker):
    """One rank of a process reward model: a decoder with a scalar head, read after each step."""

    role = "reward_model"
    value_role = "process_reward_model"
    offline: ProcessRewardModelRunConfig

    def build(self, device: torch.device) -> tuple[ModelBackend[Any], str | None]:
        """See `RankWorker`; a new head has the layout of token classification."""
        kind = value_model("token", head_seed=self.config.trainer.seed)
        role = Role(section=self.role, path=self.config.model.path)
        module, verdict = prepare(
            kind, self.config, self.settings, self.model_directory, device, role
        )
        backend = build_backend(module, self.settings, device, self.model_directory)
        return backend, verdict.reason

    def packs_of_batch(self, batch: ExampleBatch) -> list[Pack]:
        """See `OfflineWorker`; the value after the last token of each step is read."""
        marked = batch.sequences.marked_after(_labels(batch) != NO_STEP)
        return self.packs_of_sequences(marked, np.arange(len(batch)), whole_groups=True)

    def denominators(self, batch: ExampleBatch) -> Denominators:
        """See `OfflineWorker`; the tokens are the ends of steps."""
        steps = int((_labels(batch) != NO_STEP).sum())
        return replace(super().denominators(batch), num_tokens=steps)

    def loss_of(self, batch: ExampleBatch, reference: Sequence[ReferenceLogprobs]) -> OfflineLoss:
        """See `OfflineWorker`."""
        # As `marked_after` moves its marks: the value after a token is that before the next one.
        starts = batch.sequences.offsets[:-1]
        return StepLoss(labels=np.insert(_labels(batch), starts, NO_STEP))


def _labels(batch: ExampleBatch) -> NDArray[np.int8]:
    assert batch.step_labels is not None, "the data of such a run are responses in steps"
    return batch.step_labels


def _ends(batch: ExampleBatch) -> NDArray[np.int64]:
    """Return [B] the last learned token of each response: its end token."""
    learned = np.flatnonzero(batch.sequences.loss_mask)
    after = np.searchsorted(learned, batch.sequences.offsets[1:])
    return learned[after - 1]
