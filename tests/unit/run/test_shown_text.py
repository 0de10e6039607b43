"""Texts for people have no characters that act on a display, and no secrets."""

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.run.run_log import log_to
from rlsys.run.shown_text import shown, visible


def test_what_acts_on_a_display_is_an_escape():
    assert (
        visible("a\x1b[31mb\x00\x9b\u202ec\r\x7f") == r"a\u001b[31mb\u0000\u009b\u202ec\u000d\u007f"
    )
    assert visible("\ud800 \U000e0041") == r"\ud800 \U000e0041"


def test_other_texts_stay():
    text = "x ≤ ½\t日本語 \n\n é 👩\u200d🔬 שלום"
    assert visible(text) == text


@given(st.text(st.characters(exclude_categories=())))
def test_every_text_can_be_written(text: str):
    written = visible(text).encode()
    assert not any(byte < 0x20 and byte not in b"\t\n" for byte in written)


def test_secrets_are_hidden_first():
    """A secret with a character that becomes an escape would not be found after."""
    assert shown("is \x1bsecret\x1b", {"A_TOKEN": "\x1bsecret\x1b"}) == "is ***"


def test_the_log_has_no_secret_and_no_control_sequence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "planted-hub-token")
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    root.handlers.clear()
    log = log_to(tmp_path / "run.log", held=False)
    try:
        logging.getLogger("hub").error("refused %s", "planted-hub-token\x1b[2J\ud800")
        try:
            raise RuntimeError("planted-hub-token")
        except RuntimeError:
            logging.getLogger("hub").exception("again")
    finally:
        root.removeHandler(log)
        log.close()
        root.setLevel(level)
        root.handlers[:] = handlers

    text = (tmp_path / "run.log").read_text()
    assert r"refused ***\u001b[2J\ud800" in text
    assert "RuntimeError: ***" in text
    assert "planted" not in text
