"""The generated pages are the committed ones."""

from pathlib import Path

import pytest

import rlsys.algorithms.reference
import rlsys.config.reference
import rlsys.driver.metric_reference

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize(
    ("page", "module"),
    [
        ("configuration.md", rlsys.config.reference),
        ("algorithms.md", rlsys.algorithms.reference),
        ("metrics.md", rlsys.driver.metric_reference),
    ],
)
def test_the_page_is_current(page: str, module):
    assert (DOCS / page).read_text() == module.reference(), "run `make docs`"
