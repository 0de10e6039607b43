"""The comparison of presets, on a stored batch of the tiny model."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import compare_objectives
from rlsys.config.presets import PRESETS
from rlsys.data.batches import TrainBatch
from rlsys.data.rollout_files import write_rollouts
from tests.support.rollout_examples import random_rollouts, rewards_of


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write responses whose stored log-probabilities lie around those of the tiny model.

    It is nearly uniform over its vocabulary.
    """
    batch = random_rollouts(3, groups=4, samples=6)
    noise = np.random.default_rng(1).normal(-5.7, 0.4, len(batch.token_ids))
    old = np.where(batch.response_mask, noise, 0).astype(np.float32)
    path = tmp_path_factory.mktemp("rollouts") / "step_000001.parquet"
    stored = TrainBatch(
        rollouts=batch, rewards=rewards_of(batch), advantages=0 * old, old_logprobs=old
    )
    write_rollouts(stored, path)
    return path


def test_every_preset_has_its_row_and_the_figure_is_drawn(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert compare_objectives.main([str(stored), "--model", "tiny", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in PRESETS)
    assert (tmp_path / "objectives.md").read_text() in printed
    assert (tmp_path / "objectives.png").read_bytes().startswith(b"\x89PNG")


def test_rows_describe_the_weights(stored: Path):
    batch = compare_objectives.load(stored, "tiny", 1.0)
    rows = {
        name: compare_objectives.compare(batch, preset.algorithm)
        for name, preset in PRESETS.items()
    }
    assert rows["rloo"]["mean w"] == pytest.approx(1.0)  # no weight
    assert rows["rloo"]["ESS"] == pytest.approx(1.0)
    assert rows["grpo"]["no gradient"] > 0.1  # clipped
    assert rows["sapo"]["no gradient"] == rows["cispo"]["no gradient"] == 0.0
    assert rows["adaptive_power"]["ESS"] >= 0.9 - 1e-6
    # A square root spreads less than a one-sided cap.
    assert rows["power"]["ESS"] > rows["cispo"]["ESS"]
    assert 0 < rows["cispo"]["bias proxy"] < rows["grpo"]["bias proxy"]


def test_bad_input_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert compare_objectives.main([str(tmp_path / "none.parquet"), "--model", "tiny"]) == 2
    assert "error: rollouts: there is no file" in capsys.readouterr().err
