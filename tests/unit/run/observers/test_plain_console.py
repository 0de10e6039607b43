"""The console shows texts as they are, without their effect on a terminal."""

import io

import pytest
from rich.table import Table
from rich.text import Text

from rlsys.run.observers.console import Progress
from rlsys.run.observers.evaluation_console import EvaluationProgress
from rlsys.run.observers.plain_console import PlainConsole
from rlsys.run.shown_text import visible

HOSTILE = "[red]r[/red] :fire: \x1b]0;title\x07 \x9b2J \u202etxt \x00 \ud800"
SHOWN = r"[red]r[/red] :fire: \u001b]0;title\u0007 \u009b2J \u202etxt \u0000 \ud800"


def console() -> tuple[PlainConsole, io.TextIOWrapper]:
    """Return a console that writes to a file, which refuses lone surrogates as a terminal does."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    return PlainConsole(file=stream, width=300, force_terminal=False), stream


def written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode()


def test_a_hostile_text_is_shown():
    plain, stream = console()
    plain.print(HOSTILE)
    plain.print(HOSTILE, highlight=False, soft_wrap=True, markup=False)
    assert written(stream) == f"{SHOWN}\n" * 2


def test_hostile_cells_titles_and_notices_are_shown():
    plain, stream = console()
    table = Table("head", title=HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(visible(HOSTILE)))
    table.add_row(Text(HOSTILE))  # cut, since rich measures it as it was
    plain.print(table)
    Progress(plain, live=False).notice(HOSTILE)
    text = written(stream)
    assert text.count(SHOWN) == 4  # title, two rows, notice
    assert not {"\x1b", "\x9b", "\u202e", "\x00"} & set(text)


def test_a_hostile_model_name_in_the_live_display():
    stream = io.StringIO()
    plain = PlainConsole(file=stream, width=300, force_terminal=True, color_system=None)
    progress = EvaluationProgress(plain, live=True)
    progress.start(HOSTILE, total=2)
    progress.stop()
    assert r"[red]r[/red] :fire: \u001b]0;title" in stream.getvalue()
    assert not {"\x9b", "\u202e", "\x00"} & set(stream.getvalue())


def test_secrets_are_hidden(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "planted-key")
    plain, stream = console()
    plain.print("refused: planted-key at https://a:b@host")
    assert written(stream) == "refused: *** at https://***@host\n"
