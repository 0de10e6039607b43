"""The base classes of a rank of a model that is trained and saved."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rlsys.models.saving import change_model_config
from rlsys.models.value_models import VALUE_ROLE, ValueRole
from workers.training.background_files import BackgroundFiles, HostMemory
from workers.training.optimizer_steps import OptimizerSteps
from workers.training.rank_worker import RankWorker
from workers.training.saved_state import load_state, save_state
from workers.training.sharded_checkpoint import RankFiles


class SavedWorker(RankWorker):
    """One rank of a model that is saved: at once, or in the background."""

    _host_memory: HostMemory | None = None  # from the first checkpoint in the background on
    _in_background: BackgroundFiles | None = None  # the last ones

    def save(self, directory: str) -> None:
        """Write the model in Hugging Face layout, optimizer and schedule; collective."""
        files = RankFiles(Path(directory))
        self.write_checkpoint(files)
        files.finish()

    def copy_state(self, directory: str) -> None:
        """Copy what `save` writes into host memory, and start to write it; collective.

        The files of an earlier call must be complete.
        """
        former = self._in_background
        assert former is None or former.seconds() is not None, "one checkpoint at a time"
        self._host_memory = self._host_memory or HostMemory()
        files = BackgroundFiles(Path(directory), self._host_memory)
        self.write_checkpoint(files)
        files.start()
        self._in_background = files

    def seconds_of_files(self) -> float | None:
        """Return how long the files of `copy_state` took; None while they are written.

        Raises:
            Exception: they could not be written.
        """
        assert self._in_background is not None, "copy_state comes first"
        return self._in_background.seconds()

    def write_checkpoint(self, files: RankFiles) -> None:
        """Give all that belongs to a checkpoint to `files`; collective."""
        raise NotImplementedError


class TrainedWorker(SavedWorker):
    """One rank of a model whose checkpoint is its weights, its optimizer and its schedule."""

    steps: OptimizerSteps
    value_role: ValueRole | None = None  # of a model with a head for values

    def write_checkpoint(self, files: RankFiles) -> None:
        """See `SavedWorker`."""
        facts = {"ranks": self.world_size, "steps": self.steps.completed}
        save_state(self.backend, files, role=self.role, facts=facts)
        if self.rank == 0 and self.value_role is not None:
            files.write(partial(change_model_config, files.path, {VALUE_ROLE: self.value_role}))

    def load(self, directory: str) -> None:
        """Continue from what `save` wrote; collective.

        Raises:
            ValueError: the checkpoint is of another model, or its files are damaged.
        """
        facts = load_state(self.backend, Path(directory), role=self.role)
        self.steps.completed = facts["steps"]
