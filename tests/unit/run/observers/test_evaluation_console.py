"""The progress of an evaluation, on a terminal and in a file."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import numpy as np
from rich.console import Console

from rlsys.data.response_files import ScoredResponses
from rlsys.run.observers.evaluation_console import EvaluationProgress
from tests.support.rollout_examples import rewards_of, rollouts


def group(place: int, right: int) -> ScoredResponses:
    """Return four samples of three tokens, of which the first `right` are right."""
    batch = rollouts([([1, 2], [[3, 4, 5]] * 4)], first_group=place)
    values = np.array([i < right for i in range(4)], dtype=np.float32)
    return ScoredResponses(
        rollouts=batch, rewards=replace(rewards_of(batch), rewards=values, accuracies=values)
    )


def test_elsewhere_than_on_a_terminal_progress_is_at_most_ten_lines():
    stream = io.StringIO()
    progress = EvaluationProgress(Console(file=stream, width=100), live=True)
    progress.start("tiny", 40)
    progress.keep(8)
    for place in range(8, 40):
        progress.add(group(place, right=place % 2))
    progress.stop()

    lines = stream.getvalue().splitlines()
    assert lines[0] == "tiny: 8/40 prompts, 8 kept from an earlier run"
    assert len(lines) == 9  # 20 %, 30 %, ... 100 %
    # Of the 32 prompts that were sampled now half have one right response of four.
    assert re.fullmatch(r"tiny: 40/40 prompts, accuracy 12\.5%, \d+ tokens/s", lines[-1])
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_shows_a_bar_for_one_model_after_the_other():
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=True)
    progress = EvaluationProgress(console, live=True)
    progress.stop()  # nothing was shown yet
    for name in ("first", "second"):
        progress.start(name, 2)
        progress.add(group(0, right=4))
        progress.notice(f"a notice about {name}")
        progress.add(group(1, right=0))
        progress.stop()
    progress.stop()

    text = stream.getvalue()
    assert "a notice about second" in text
    assert "2/2" in text
    assert "accuracy 50.0%" in text
    assert "prompts," not in text  # no lines beside the bar
