"""report.html."""

from __future__ import annotations

from collections.abc import Mapping

from rlsys.driver.observer import Outcome
from rlsys.driver.run_directory import RunDirectory


class ReportWriter:
    """Observer that writes the report."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory

    def on_start(self, first_step: int, total_steps: int) -> None: ...

    def on_phase(self, step: int, phase: str) -> None: ...

    def on_step(self, step: int, values: Mapping[str, float]) -> None: ...

    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None: ...

    def on_checkpoint(self, step: int, path: str) -> None: ...

    def on_end(self, outcome: Outcome, message: str) -> None: ...
