"""The directory of a pipeline: one run directory for each stage, and what joins them.

runs/<name>/
    config.yaml       the configuration of all stages
    <stage>.yaml      that of one stage, with which it was started; `--config` of its own recipe
    <stage>/          the run directory of a stage; of rankings, the file rankings.parquet
    stages.json       seconds that each stage took
    report.html       all stages on one page
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlsys.run.checkpoints import PREFIX, CheckpointStore
from rlsys.run.directory import RunDirectory, write_whole
from rlsys.run.observers.run_status import read_status

# new: nothing was written. begun: it can be resumed. complete: its result is there.
StageState = Literal["new", "begun", "complete"]


@dataclass(frozen=True)
class PipelineDirectory:
    """Paths of one pipeline."""

    run: RunDirectory

    @property
    def path(self) -> Path:
        return self.run.path

    @property
    def report(self) -> Path:
        return self.run.report

    @property
    def times(self) -> Path:
        return self.path / "stages.json"

    @property
    def rankings(self) -> Path:
        return self.path / "rankings" / "rankings.parquet"

    def stage(self, name: str) -> RunDirectory:
        """Return the directory of a training stage."""
        return RunDirectory(self.path / name)

    def stage_config(self, name: str) -> Path:
        """Return the file of the configuration with which a stage is started."""
        return self.path / f"{name}.yaml"

    def checkpoint(self, stage: str, steps: int) -> Path:
        """Return the last checkpoint of a training stage of so many steps."""
        return self.stage(stage).checkpoints / f"{PREFIX}{steps:06d}"

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each stage so far, over all its starts."""
        if not self.times.is_file():
            return {}
        return json.loads(self.times.read_text(encoding="utf-8"))

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Add the time of one start of a stage."""
        times = self.seconds()
        times[stage] = times.get(stage, 0.0) + seconds
        write_whole(self.times, json.dumps(times, indent=1))


def training_state(directory: RunDirectory, steps: int, *, checksums: bool = True) -> StageState:
    """Return the state of a training stage of so many steps.

    A run that ended after fewer steps is begun: it can be resumed with more.

    Args:
        checksums: also read the last checkpoint, and say begun where it is damaged.
    """
    if not directory.config.is_file():
        return "new"
    status = read_status(directory)
    if status is None or status.state != "finished" or status.step < steps:
        return "begun"
    if not checksums:
        return "complete"
    checkpoint = CheckpointStore(directory.checkpoints, keep=1).latest()
    return "complete" if checkpoint is not None and checkpoint.step >= steps else "begun"


def rankings_state(file: Path) -> StageState:
    """Return the state of the stage that writes rankings, which is whole or absent."""
    return "complete" if file.is_file() else "new"
