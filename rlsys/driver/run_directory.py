"""Where a run is written: all its paths in one place.

runs/<name>/config.yaml  metrics.jsonl  tensorboard/  rollouts/step_*.parquet  checkpoints/step_*  report.html  status.json  run.log
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from rlsys.config import RunConfig
from rlsys.config.command_line import dump_yaml


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def log(self) -> Path:
        return self.path / "run.log"

    @staticmethod
    def named_by(config: RunConfig) -> RunDirectory:
        """`run.directory`, or a new name under runs/ from the recipe and the time."""
        directory = config.run.directory or f"runs/{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
        return RunDirectory(Path(directory).expanduser())

    def check(self, *, resume: bool) -> None:
        """Refuse to overwrite a run, or to resume one that is not there.

        Raises:
            ValueError: naming run.directory.
        """
        used = self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))
        if used and not resume:
            raise ValueError(
                f"run.directory: {str(self.path)!r} exists already. Add --resume to continue it, or name another directory."
            )
        if resume and not self.config.is_file():
            raise ValueError(
                f"run.directory: {str(self.path)!r} holds no run to resume. Name the directory of an earlier run."
            )

    def create(self, config: RunConfig) -> None:
        """Make the directories and write the resolved configuration."""
        for directory in (self.rollouts, self.checkpoints, self.tensorboard):
            directory.mkdir(parents=True, exist_ok=True)
        self.config.write_text(dump_yaml(config))
