"""The directory of an evaluation.

runs/<name>/
    config.yaml    run.log    responses/model/*.parquet    responses/compare/*.parquet
    evaluation.json           report.html                        logs/<actor>.{out,err}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlsys.config import RootConfig
from rlsys.data.response_files import ResponseFiles
from rlsys.run.directory import RunDirectory


class EvaluationDirectory(RunDirectory):
    """Paths of one evaluation."""

    @property
    def responses(self) -> Path:
        return self.path / "responses"

    @property
    def results(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def has_responses(self) -> bool:
        """Whether responses of some model were written."""
        return any(self.responses.rglob("*.parquet"))

    def responses_of(self, field: str) -> ResponseFiles:
        """Return the responses of the model that a field (model.path, compare) names."""
        return ResponseFiles(self.responses / field.split(".")[0])

    def create(self, config: RootConfig, reasons: Sequence[str] = ()) -> None:
        """Create the subdirectories and write the resolved configuration."""
        self.responses.mkdir(parents=True, exist_ok=True)
        self.write_config(config, reasons)
