"""The base class of a rank of a model that is trained and saved."""

from __future__ import annotations

from pathlib import Path

from rlsys.models.saving import change_model_config
from rlsys.models.value_models import VALUE_ROLE, ValueRole
from workers.training.optimizer_steps import OptimizerSteps
from workers.training.rank_worker import RankWorker
from workers.training.saved_state import load_state, save_state


class TrainedWorker(RankWorker):
    """One rank of a model whose checkpoint is its weights, its optimizer and its schedule."""

    steps: OptimizerSteps
    value_role: ValueRole | None = None  # of a model with a head for values

    def save(self, directory: str) -> None:
        """Write the model in Hugging Face layout, optimizer and schedule; collective."""
        facts = {"ranks": self.world_size, "steps": self.steps.completed}
        save_state(self.backend, Path(directory), role=self.role, rank=self.rank, facts=facts)
        if self.rank == 0 and self.value_role is not None:
            change_model_config(Path(directory), {VALUE_ROLE: self.value_role})

    def load(self, directory: str) -> None:
        """Continue from what `save` wrote; collective.

        Raises:
            ValueError: the checkpoint is of another model, or its files are damaged.
        """
        facts = load_state(self.backend, Path(directory), role=self.role)
        self.steps.completed = facts["steps"]
