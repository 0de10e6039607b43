"""report.html: one self-contained page."""

from __future__ import annotations

import numpy as np
import pytest

from rlsys.data.batches import ScoredBatch
from rlsys.data.rollout_files import write_rollouts
from rlsys.run.directory import RunDirectory
from rlsys.run.observers.html_report import write_report
from rlsys.run.observers.metrics_log import MetricsLog
from tests.support.rollout_examples import random_rollouts, rewards_of
from tests.support.step_values import STEP


def test_the_report_is_one_page_that_needs_nothing_else(directory: RunDirectory):
    log = MetricsLog(directory)
    for step in range(1, 12):
        log.on_step(step, STEP)
    log.on_evaluation(11, {"eval/accuracy": 0.6})
    log.on_end("finished", "")
    write_report(directory)
    page = directory.report.read_text()
    assert "Reward" in page
    assert "algorithm.advantage.name" in page
    for outside in ('src="http', "href=", "@import", "url("):
        assert outside not in page
    assert not list(directory.path.glob("*.partial"))


@pytest.mark.parametrize(("advantages", "shown"), [(True, "+0.00"), (False, "–")])
def test_the_report_shows_samples_with_the_advantage_that_their_file_holds(
    directory: RunDirectory, advantages: bool, shown: str
):
    """Show a dash for a response that has no advantages."""
    rollouts = random_rollouts(4)
    batch = ScoredBatch(rollouts=rollouts, rewards=rewards_of(rollouts))
    if advantages:
        batch = batch.credited(np.zeros(len(rollouts.token_ids), dtype=np.float32))
    write_rollouts(batch, directory.rollouts / "step_000001.parquet")
    write_report(directory)
    assert f'<td class="num">{shown}</td>' in directory.report.read_text()


def test_the_report_of_a_run_without_steps(directory: RunDirectory):
    write_report(directory)
    assert "No step is complete yet" in directory.report.read_text()
