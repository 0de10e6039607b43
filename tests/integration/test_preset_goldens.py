"""Every preset trains the tiny model to the numbers on record (tests/data/golden)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlsys.config.presets import PRESETS
from tests.support.golden_runs import PORTABLE, STEPS

# The runs of all presets count for the first test.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
TOLERANCE = 1e-6  # relative, and absolute below 1


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train every preset, and return the directory of their numbers."""
    directory = tmp_path_factory.mktemp("golden")
    command = [sys.executable, "-m", "tests.support.golden_runs", str(directory)]
    done = subprocess.run(
        command, env=os.environ | PORTABLE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def test_every_preset_is_on_record():
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(PRESETS)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_numbers_are_those_on_record(runs: Path, preset: str):
    expected = json.loads((GOLDEN / f"{preset}.json").read_text())
    found = json.loads((runs / f"{preset}.json").read_text())
    assert sorted(found) == sorted(expected)
    for name, values in expected.items():
        assert len(values) <= STEPS
        assert found[name] == pytest.approx(values, rel=TOLERANCE, abs=TOLERANCE), name
