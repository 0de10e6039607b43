"""The loop with pretraining texts: batches, warm-up, checkpoints, evaluation, metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from docs.generate.metrics import documented
from rlsys.config import ConfigError, RunConfig
from rlsys.config.command_line import evolve
from rlsys.data.example_stream import ExampleBatch
from tests.support.in_process_runs import assert_same_metrics, make_config, start
from tests.support.text_examples import text_stream

TEXTS_PER_STEP = 4


def with_texts(**changes: Any) -> RunConfig:
    """Return `make_config` with a coefficient; `__` in a name stands for a dot."""
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    ptx = {
        "ptx.coefficient": 0.5,
        "ptx.train": "synthetic",
        "ptx.examples_per_step": TEXTS_PER_STEP,
    }
    return evolve(make_config(), ptx | dotted)


def learned(batches: list[ExampleBatch]) -> list[list[int]]:
    return [batch.sequences.token_ids.tolist() for batch in batches]


def expected_batches(count: int) -> list[list[int]]:
    stream = text_stream(TEXTS_PER_STEP)
    return learned([stream.next_batch() for _ in range(count)])


async def test_each_update_gets_the_next_texts(tmp_path: Path):
    run = await start(tmp_path, with_texts(trainer__steps=5))
    await run.finish()
    assert learned(run.policy.texts) == expected_batches(5)
    assert not run.stage.handles, "the handles of the texts are dropped after each step"


async def test_without_a_coefficient_the_loop_has_no_texts(tmp_path: Path):
    run = await start(tmp_path, make_config(steps=2))
    await run.finish()
    assert run.policy.texts == []
    checkpoint = run.store.latest()
    assert checkpoint is not None
    assert "texts" not in checkpoint.state


async def test_the_warm_up_of_a_critic_takes_no_texts(tmp_path: Path):
    critic = {
        "critic.enabled": True,
        "critic.warmup_steps": 2,
        "algorithm.advantage.name": "gae",
    }
    run = await start(tmp_path, evolve(with_texts(trainer__steps=5), critic))
    await run.finish()
    assert learned(run.policy.texts) == expected_batches(3)


async def test_a_recomputed_update_gets_texts_too(tmp_path: Path):
    changes = {
        "algorithm.advantage.name": "hierarchical",
        "algorithm.advantage.recompute": True,
        "algorithm.objective.weight": "none",
    }
    run = await start(tmp_path, evolve(with_texts(trainer__steps=2), changes))
    await run.finish()
    assert learned(run.policy.texts) == expected_batches(2)


async def test_a_resumed_run_goes_on_with_the_texts(tmp_path: Path):
    config = with_texts(trainer__steps=6, trainer__checkpoints__every=3)
    whole = await start(tmp_path / "whole", config)
    await whole.finish()

    part = await start(tmp_path / "part", config)
    part.recorder.at_step = lambda: (
        part.session.request_stop() if len(part.recorder.steps) == 3 else None
    )
    await part.finish()
    resumed = await start(tmp_path / "part", config, resume=True)
    await resumed.finish()
    assert learned(part.policy.texts + resumed.policy.texts) == learned(whole.policy.texts)
    assert_same_metrics(tmp_path / "whole", tmp_path / "part")


async def test_training_on_text_can_be_switched_off_on_a_resume_but_not_on(tmp_path: Path):
    config = with_texts(trainer__steps=2)
    await (await start(tmp_path / "with", config)).finish()
    off = evolve(config, {"ptx.coefficient": 0.0, "trainer.steps": 3})
    run = await start(tmp_path / "with", off, resume=True)
    await run.finish()
    assert run.policy.texts == []

    await (await start(tmp_path / "without", make_config(steps=2))).finish()
    with pytest.raises(ConfigError, match=r"^ptx\.coefficient: checkpoint .* --ptx\.coe"):
        await start(tmp_path / "without", with_texts(trainer__steps=3), resume=True)


async def test_evaluations_measure_held_out_text_with_or_without_problems(tmp_path: Path):
    config = with_texts(trainer__steps=2, trainer__evaluation__every=1)
    run = await start(tmp_path / "both", config)
    await run.finish()
    assert len(run.recorder.evaluations) == 3
    for _, values in run.recorder.evaluations:
        assert values["eval/text_loss"] == pytest.approx(np.log(8))
        assert "eval/accuracy" in values
        assert [name for name in values if documented(name) is None] == []

    run = await start(tmp_path / "text", evolve(config, {"data.eval": "off"}))
    await run.finish()
    assert [sorted(values) for _, values in run.recorder.evaluations] == [
        ["eval/text_loss", "time/evaluate"]
    ] * 3
