"""The generated pages are the committed ones."""

import subprocess
import sys
from pathlib import Path

import pytest

import docs.generate.algorithms
import docs.generate.configuration
import docs.generate.metrics

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


@pytest.mark.parametrize(
    ("page", "module"),
    [
        ("configuration.md", docs.generate.configuration),
        ("algorithms.md", docs.generate.algorithms),
        ("metrics.md", docs.generate.metrics),
    ],
)
def test_the_page_is_current(page: str, module):
    assert (DOCS / page).read_text() == module.reference(), "run `make docs`"


def test_the_page_of_models_is_that_of_the_recorded_results(tmp_path: Path):
    page = tmp_path / "models.md"
    command = [sys.executable, "-m", "benchmarks.campaigns.models_page", str(page)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert (DOCS / "models.md").read_text() == page.read_text(), "run `make docs`"
