"""The command of a recipe: what its signals do, and its exit codes."""

from __future__ import annotations

import asyncio
import io
import math
import os
import signal
from collections.abc import Iterator

import pytest
from rich.console import Console

from recipes import training
from recipes.run_command import exit_with_code_of
from recipes.training import _stop_on_signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Restore the handlers of signals."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


async def signalled(console: Console, *numbers: signal.Signals) -> int:
    """Send signals to this process, and return how often a stop was requested."""
    requests: list[None] = []
    _stop_on_signals(lambda: requests.append(None), console)
    for number in numbers:
        os.kill(os.getpid(), number)
        for _ in range(10):  # the loop handles what arrived
            await asyncio.sleep(0)
    return len(requests)


def test_a_signal_that_arrives_twice_is_one_request(monkeypatch: pytest.MonkeyPatch):
    """`ray job stop` signals a stage of a pipeline, and the pipeline, which passes it on."""
    monkeypatch.setattr(training, "SAME_REQUEST_S", math.inf)  # on a machine of any speed
    output = io.StringIO()
    console = Console(file=output)
    assert asyncio.run(signalled(console, signal.SIGTERM, signal.SIGTERM)) == 1
    assert output.getvalue().count("stopping after this step") == 1


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_later_signal_stops_at_once(second: signal.Signals, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "SAME_REQUEST_S", -1.0)
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(signalled(Console(file=io.StringIO()), signal.SIGTERM, second))


def test_libraries_draw_no_progress_bars_into_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Under pytest stderr is no terminal."""
    monkeypatch.setenv("TQDM_DISABLE", "")  # so that it is removed at the end
    monkeypatch.delenv("TQDM_DISABLE")
    with pytest.raises(SystemExit) as ended:
        exit_with_code_of(lambda: 0, continued="nothing")
    assert ended.value.code == 0
    assert os.environ["TQDM_DISABLE"] == "1"
