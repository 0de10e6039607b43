"""A run's directory, for tests of the files in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlsys.config import RunConfig
from rlsys.run.directory import RunDirectory


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "run")
    made.create(RunConfig())
    return made
