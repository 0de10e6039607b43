"""The loop with a critic: values, update order, warm-up, checkpoints, metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from docs.generate.metrics import documented
from rlsys.algorithms.advantages import AdvantageInputs, AdvantageOutput
from rlsys.config import ConfigError, RunConfig
from rlsys.config.command_line import evolve
from rlsys.data.rollout_files import read_rollouts
from rlsys.run.observers.observer import PHASES
from tests.support.in_process_fakes import TableCritic
from tests.support.in_process_runs import Run, assert_same_metrics, make_config, start


def with_critic(**changes: Any) -> RunConfig:
    """Return `make_config` with GAE and a critic; `__` in a name stands for a dot."""
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    steps = {"trainer.steps": dotted.pop("trainer.steps", 6)}
    return evolve(make_config(estimator="gae"), {"critic.enabled": True, **steps, **dotted})


def critic_of(run: Run) -> TableCritic:
    assert isinstance(run.workers.critic, TableCritic)
    return run.workers.critic


async def test_values_are_computed_beside_the_rewards_and_updated_before_the_policy(
    tmp_path: Path,
) -> None:
    run = await start(tmp_path, with_critic(trainer__steps=2))
    await run.finish()
    watched = ("phase:logprobs", "values", "credit", "phase:critic", "update:critic", "update")
    events = [event for event in run.stage.journal if event in watched]
    assert events == list(watched) * 2


async def test_the_estimator_gets_the_values_of_the_critic_in_their_rows(tmp_path: Path) -> None:
    """Zeros in the first step; then those of the table, and returns that contain them."""
    run = await start(tmp_path, with_critic(trainer__steps=2))
    tables: list[np.ndarray] = []
    run.recorder.at_step = lambda: tables.append(critic_of(run).table.copy())
    await run.finish()
    first, second = (batch["values"] for batch in run.batches)
    assert not first.any()
    assert second.any()

    rows = read_rollouts(tmp_path / "rollouts" / "step_000002.parquet")
    for row in rows:
        problem = row["token_ids"][0]
        expected = np.where(row["response_mask"], [0, *tables[0][problem]], 0)
        np.testing.assert_allclose(row["values"], expected, atol=1e-6)
        # gamma = lam = 1: the return is the reward at every token.
        np.testing.assert_allclose(row["returns"], [0, row["reward"], row["reward"]], atol=1e-6)


async def test_in_the_warm_up_only_the_critic_is_trained(tmp_path: Path) -> None:
    run = await start(tmp_path, with_critic(trainer__steps=4, critic__warmup_steps=2))
    updates: list[tuple[int, int]] = []
    run.recorder.at_step = lambda: updates.append((critic_of(run).updates, run.policy.updates))
    await run.finish()
    assert updates == [(1, 0), (2, 0), (3, 1), (4, 2)]
    assert (tmp_path / "rollouts" / "step_000001.parquet").exists()

    for step, values in run.recorder.steps:
        assert ("policy/updates" in values) == ("time/update" in values) == (step > 2)
        total = sum(values.get(f"time/{phase}", 0.0) for phase in PHASES)
        assert total == pytest.approx(values["time/step"])


def test_the_policys_schedule_spans_the_steps_after_the_warm_up() -> None:
    assert with_critic(trainer__steps=10, critic__warmup_steps=3).policy_steps == 7
    off = with_critic(trainer__steps=10, critic__warmup_steps=3, critic__enabled=False)
    assert off.policy_steps == 10


async def test_the_critic_explains_more_and_more_of_the_returns(tmp_path: Path) -> None:
    """With a policy that does not move: the reward depends on the problem, and is noisy."""
    run = await start(tmp_path, with_critic(trainer__steps=30, critic__warmup_steps=29))
    await run.finish()
    losses = [values["critic/loss"] for _, values in run.recorder.steps]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    first = run.recorder.steps[0][1]
    assert first["critic/explained_variance"] == 0, "all values are 0"
    assert first["critic/value_mean"] == 0
    assert first["critic/return_mean"] == pytest.approx(first["reward/mean"])


async def test_a_resumed_run_has_the_numbers_of_an_uninterrupted_one(tmp_path: Path) -> None:
    config = with_critic(trainer__steps=6, critic__warmup_steps=1, trainer__checkpoints__every=3)
    whole = await start(tmp_path / "whole", config)
    await whole.finish()

    part = await start(tmp_path / "part", config)
    part.recorder.at_step = lambda: (
        part.session.request_stop() if len(part.recorder.steps) == 3 else None
    )
    await part.finish()
    assert (part.store.latest().path / "critic" / "critic.npy").exists()  # pyright: ignore

    resumed = await start(tmp_path / "part", config, resume=True)
    assert resumed.stage.journal.count("load:critic") == 1
    await resumed.finish()
    assert_same_metrics(tmp_path / "whole", tmp_path / "part")
    np.testing.assert_array_equal(critic_of(resumed).table, critic_of(whole).table)


async def test_a_checkpoint_without_a_critic_continues_without_one(tmp_path: Path) -> None:
    """Also one of an earlier version, whose configuration does not have the section."""
    config = make_config(estimator="gae", steps=2, save=1)
    run = await start(tmp_path, config)
    await run.finish()
    checkpoint = run.store.latest()
    assert checkpoint is not None
    del checkpoint.state["config"]["critic"]

    more = evolve(config, {"trainer.steps": 3})
    enabled = await start(tmp_path / "new", evolve(more, {"critic.enabled": True}))
    with pytest.raises(ConfigError, match=r"critic\.enabled: True, but checkpoint .* with False"):
        await enabled.session.restore(checkpoint)
    resumed = await start(tmp_path / "other", more)
    await resumed.session.restore(checkpoint)
    assert resumed.session.step == 2


async def test_a_checkpoint_with_a_critic_does_not_continue_without_it(tmp_path: Path) -> None:
    config = with_critic(trainer__steps=2, trainer__checkpoints__every=1)
    run = await start(tmp_path, config)
    await run.finish()
    with pytest.raises(ConfigError, match=r"critic\.enabled: False, but checkpoint"):
        await start(tmp_path, evolve(config, {"critic.enabled": False}), resume=True)


async def test_all_metrics_of_a_run_with_a_critic_are_documented(tmp_path: Path) -> None:
    run = await start(tmp_path, with_critic(trainer__steps=2, algorithm__entropy__temperature=0.1))
    await run.finish()
    names = {name for _, values in run.recorder.steps for name in values}
    assert {"critic/explained_variance", "critic/loss", "time/critic"} <= names
    assert [name for name in sorted(names) if documented(name) is None] == []


async def test_an_estimator_without_returns_gives_the_critic_no_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_returns(config: RunConfig, inputs: AdvantageInputs) -> AdvantageOutput:
        return AdvantageOutput(advantages=inputs.response_mask.float())

    monkeypatch.setattr("rlsys.driver.credit_assignment.estimate_advantages", without_returns)
    run = await start(tmp_path, with_critic())
    with pytest.raises(ValueError, match=r"'gae' returned no returns, which are the targets"):
        await run.finish()
