"""Presets train the tiny model to the numbers on record (tests/data/golden).

By default those of `USUAL`, which take different paths through the code. All of them, in about ten
minutes:

    GOLDEN_PRESETS=all python -m pytest tests/integration/test_preset_goldens.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlsys.config.presets import PRESETS
from tests.support.golden_runs import PORTABLE, STEPS

USUAL = (
    "adaptive_power",
    "dapo",
    "grpo",
    "hierarchical",
    "ppo",
)
CHOSEN = sorted(PRESETS) if os.environ.get("GOLDEN_PRESETS") == "all" else USUAL
# The runs of all presets count for the first test.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
TOLERANCE = 1e-6  # relative, and absolute below 1


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the chosen presets, and return the directory of their numbers."""
    directory = tmp_path_factory.mktemp("golden")
    command = [sys.executable, "-m", "tests.support.golden_runs", str(directory), *CHOSEN]
    done = subprocess.run(
        command, env=os.environ | PORTABLE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def test_every_preset_is_on_record():
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(PRESETS)


@pytest.mark.parametrize("preset", CHOSEN)
def test_the_numbers_are_those_on_record(runs: Path, preset: str):
    expected = json.loads((GOLDEN / f"{preset}.json").read_text())
    found = json.loads((runs / f"{preset}.json").read_text())
    assert sorted(found) == sorted(expected)
    for name, values in expected.items():
        assert len(values) <= STEPS
        assert found[name] == pytest.approx(values, rel=TOLERANCE, abs=TOLERANCE), name
