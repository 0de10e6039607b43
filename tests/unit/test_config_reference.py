"""The generated page is the committed one."""

from pathlib import Path

from rlsys.config.reference import reference


def test_the_configuration_page_is_current():
    page = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
    assert page.read_text() == reference(), "run `make docs`"
