"""The base classes of the ranks of models that are trained.

TrainedWorker            optimizer steps, their schedule and counts, checkpoints
TrainedCausalLMWorker    also weights for the engines, and the probe that compares with them
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from rlsys.config import RunConfig, TrainableRoleConfig
from rlsys.config.engines import ENGINES
from rlsys.data.packing import pack_rows
from rlsys.data.sequences import TokenSequences
from rlsys.metrics import Metric, mean
from rlsys.models.checkpoint_names import names_without_mapping
from rlsys.models.loading import UnsupportedModelError
from rlsys.models.weights import WeightManifest, pack_weights
from workers.training.learning_rate import learning_rate
from workers.training.model_setup import DTYPES
from workers.training.rank_worker import CausalLMWorker, RankWorker
from workers.training.update_metrics import UpdateCounts


class TrainedWorker(RankWorker):
    """One rank of a model that is trained."""

    trained_settings: TrainableRoleConfig

    def __init__(
        self,
        config: RunConfig,
        settings: TrainableRoleConfig,
        model_directory: str,
        rank: int,
        world_size: int,
    ) -> None:
        super().__init__(config, settings, model_directory, rank, world_size)
        self.trained_settings = settings
        self.steps = 0  # of the trainer, each with one or more optimizer steps
        self.counts = UpdateCounts()

    @property
    def state_file(self) -> str:
        """The file of a checkpoint with the state that all ranks share."""
        return f"{self.role}_state.json"

    def learning_rate(self) -> float:
        """Return the learning rate of the present step."""
        return learning_rate(self.trained_settings.optimizer, self.steps, self.config.trainer.steps)

    def optimizer_step(self) -> dict[str, Metric]:
        """Take one optimizer step and count it; return the gradient's norm if it is finite."""
        norm = self.backend.step(self.learning_rate())
        finite = math.isfinite(norm)
        self.counts = self.counts.after(finite=finite)
        return {f"{self.role}/grad_norm": mean(norm)} if finite else {}

    def own_state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of this role, beside steps and ranks; ready for JSON."""
        return {}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what `own_state` returned."""

    def save(self, directory: str) -> None:
        """Write the model in Hugging Face layout and all state of the role; collective."""
        path = Path(directory)
        self.backend.save(path)
        # The rest is the same on all ranks.
        if self.rank == 0:
            facts = {"ranks": self.world_size, "steps": self.steps, **self.own_state()}
            (path / self.state_file).write_text(json.dumps(facts))

    def load(self, directory: str) -> None:
        """Continue from what `save` wrote; collective.

        Raises:
            ValueError: the checkpoint is of another number of ranks or of another model.
        """
        path = Path(directory)
        facts = json.loads((path / self.state_file).read_text())
        if facts["ranks"] != self.world_size:
            raise ValueError(
                f"{self.role}.ranks: {directory} was written by {facts['ranks']} ranks, now there "
                f"are {self.world_size}. Resume with --{self.role}.ranks {facts['ranks']}, or "
                f"start a new run with --model.path {directory}."
            )

        self.backend.load(path)
        self.steps = facts["steps"]
        self.load_own_state(facts)


class TrainedCausalLMWorker(TrainedWorker, CausalLMWorker):
    """One rank of a trained model whose weights engines use."""

    def check_export(self) -> None:
        """Refuse a model whose weights cannot be exported by the names of its checkpoint.

        Raises:
            UnsupportedModelError: transformers holds several weights of the checkpoint as one
                tensor, and has no mapping back.
        """
        engine = self.config.generation.engine
        if not ENGINES[engine].takes_checkpoint_names:
            return

        model = self.backend.module.model
        names = names_without_mapping(model, self.model_directory)
        if names:
            raise UnsupportedModelError(
                f"generation.engine: {engine!r} cannot follow the training of model type "
                f"{model.config.model_type!r}: transformers holds {names[0]} as one tensor and "
                "has no mapping back to the weights of the checkpoint. "
                "Use --generation.engine transformers."
            )

    def export_weights(self, version: int) -> tuple[WeightManifest, list[Any]] | None:
        """Put the weights into the object store; collective.

        Returns:
            On rank 0 the manifest and references to the shards, None on the other ranks.
        """
        # All ranks gather the weights; rank 0 alone gets them.
        dtype = DTYPES[self.config.generation.dtype]
        manifest, shards = pack_weights(self.backend.weights(), version=version, dtype=dtype)
        if self.rank != 0:
            return None
        return manifest, [ray.put(shard) for shard in shards]

    @torch.no_grad()
    def probe_logprobs(
        self, sequences: Sequence[NDArray[np.int32]], temperature: float
    ) -> list[NDArray[np.float32]]:
        """Return [L - 1] log-probabilities for each sequence of L tokens; the first has none.

        Collective; every rank computes the same.
        """
        batch = TokenSequences.of_texts(sequences)
        # Planned as for a single rank: all ranks run all packs.
        packs = pack_rows(
            batch,
            np.arange(len(batch)),
            budget=self.settings.microbatch_tokens,
            rank=0,
            ranks=1,
            shared_prefix_packing=False,
        )

        flat = np.zeros(len(batch.token_ids), dtype=np.float32)
        for pack in packs:
            flat[pack.flat_positions] = self.run(pack, temperature).logprobs.cpu().numpy()
        return [row[1:] for row in np.split(flat, batch.offsets[1:-1])]
