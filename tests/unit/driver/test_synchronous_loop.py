"""The synchronous loop on in-process fakes: its results, its order of calls, its files."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from docs.generate.metrics import documented
from rlsys.config import AdvantageConfig, OverlongConfig
from rlsys.data.rollout_files import read_rollouts
from rlsys.driver.sampling import sampling_parameters
from rlsys.run.observers.metrics_log import read_metrics
from rlsys.run.observers.observer import PHASES
from tests.support.in_process_fakes import OpenedByDriverError, make_prompts
from tests.support.in_process_runs import make_config, start, wait


async def test_learns(tmp_path: Path) -> None:
    """Group baselines must get far beyond chance, 1/8, on training samples and greedy answers."""
    run = await start(tmp_path, make_config(steps=30, evaluate=10))
    assert await run.finish() == "finished"
    rewards = [values["reward/mean"] for _, values in run.recorder.steps]
    accuracies = {step: values["eval/accuracy"] for step, values in run.recorder.evaluations}
    assert np.mean(rewards[:3]) < 0.35
    assert np.mean(rewards[-3:]) > 0.8
    assert list(accuracies) == [0, 10, 20, 30]
    assert accuracies[0] <= 0.5 < 0.8 < accuracies[30]


async def test_order_of_a_step_and_versions(tmp_path: Path) -> None:
    run = await start(tmp_path, make_config(steps=3, kl=0.1, num_mini_batches=2))
    await run.finish()
    step = [event for event in run.stage.journal if not event.startswith(("phase", "part", "scor"))]
    one = ["generate", "logprobs:old", "logprobs:ref", "credit", "update", "write_rollouts", "sync"]
    assert step == ["sync", *one * 3, "save"]
    assert [batch["versions"] for batch in run.batches] == [{0}, {1}, {2}]
    assert run.generator.version == run.policy.updates == 3


async def test_old_and_ref_run_side_by_side_and_beside_rewards(tmp_path: Path) -> None:
    """`old` waits for `ref` to begin and `ref` for `old`; scoring waits for both."""
    run = await start(tmp_path, make_config(steps=1, kl=0.1, num_mini_batches=2))
    old, ref = asyncio.Event(), asyncio.Event()

    async def on_old() -> None:
        old.set()
        await ref.wait()

    async def on_ref() -> None:
        ref.set()
        await old.wait()

    async def on_scoring() -> None:
        await old.wait()
        await ref.wait()

    run.stage.hooks = {"logprobs:old": on_old, "logprobs:ref": on_ref, "scoring": on_scoring}
    assert await run.finish() == "finished"


async def test_waiting_for_rewards_is_a_phase_of_its_own(tmp_path: Path) -> None:
    """The time of a reward for which the loop only waits is counted under time/reward."""
    run = await start(tmp_path, make_config(steps=1))
    waiting = asyncio.Event()
    run.recorder.react = lambda _, phase: waiting.set() if phase == "reward" else None
    run.stage.hooks = {"scoring": lambda: wait(waiting)}
    assert await run.finish() == "finished"
    watched = ("phase:reward", "scored", "phase:advantages")
    events = [event for event in run.stage.journal if event in watched]
    assert events == ["phase:reward", *["scored"] * 4, "phase:advantages"]


async def test_logprobs_are_computed_only_where_needed(tmp_path: Path) -> None:
    cases = {
        "one update, no KL": (make_config(steps=1), set()),
        "two updates per batch": (make_config(steps=1, num_mini_batches=2), {"logprobs:old"}),
        "the estimator reads them": (
            make_config(steps=1, kl=0.01, estimator="token_kl_grpo"),
            {"logprobs:old", "logprobs:ref"},
        ),
        "KL": (make_config(steps=1, kl=0.01), {"logprobs:ref"}),
        "KL in the reward": (
            make_config(steps=1, kl=0.01, placement="reward"),
            {"logprobs:old", "logprobs:ref"},
        ),
        "rewarded entropy": (make_config(steps=1, temperature=0.1), {"logprobs:old"}),
    }
    for name, (config, expected) in cases.items():
        run = await start(tmp_path / name, config)
        await run.finish()
        assert {event for event in run.stage.journal if event.startswith("logprobs")} == expected, (
            name
        )
        (batch,) = run.batches
        assert (batch["old_difference"] is not None) == ("logprobs:old" in expected)
        assert (batch["ref_difference"] is not None) == ("logprobs:ref" in expected)


async def test_old_logprobs_reach_their_rows(tmp_path: Path) -> None:
    """Two ranks return alternate rows, which are joined.

    They equal the engine's log-probabilities, while the reference differs more and more.
    """
    run = await start(tmp_path, make_config(steps=4, kl=0.01, num_mini_batches=2))
    await run.finish()
    assert max(batch["old_difference"] for batch in run.batches) < 1e-6
    assert run.batches[0]["ref_difference"] < 1e-6 < 0.1 < run.batches[3]["ref_difference"]


async def test_handles_are_dropped_after_each_step(tmp_path: Path) -> None:
    """Reference counts suffice: the object store cannot wait for a garbage collection."""
    run = await start(tmp_path, make_config(steps=4, kl=0.1, num_mini_batches=2, evaluate=2))
    alive: list[int] = []
    run.recorder.at_step = lambda: alive.append(len(run.stage.handles))
    most = 0

    async def count() -> None:
        nonlocal most
        most = max(most, len(run.stage.handles))

    run.stage.hooks = {"update": count}
    await run.finish()
    assert alive == [0, 0, 0, 0]
    # Rollouts and rewards of four groups, old and ref of two ranks, the train batch.
    assert most == 4 + 4 + 2 + 2 + 1


async def test_the_fakes_catch_a_driver_that_opens_a_batch(tmp_path: Path) -> None:
    """All tests here rely on it."""
    run = await start(tmp_path, make_config())
    await run.workers.weights.sync(0)
    prompts = make_prompts(make_config()).next_batch()
    sampling = sampling_parameters(make_config(), samples=8, temperature=1.0, seed=0)
    async for part in run.workers.generator.generate(prompts, sampling):
        with pytest.raises(OpenedByDriverError):
            await part.rollouts


async def test_metrics_of_a_step(tmp_path: Path) -> None:
    run = await start(tmp_path, make_config(steps=3, save=2))
    await run.finish()
    for _, values in run.recorder.steps:
        phases = [phase for phase in PHASES if phase != "critic"]  # there is none
        assert "time/critic" not in values
        assert sum(values[f"time/{phase}"] for phase in phases) == pytest.approx(
            values["time/step"]
        )
        assert min(values[f"time/{phase}"] for phase in phases) >= 0
        assert values["rollout/tokens"] == values["policy/tokens"] == 4 * 8 * 2
        assert values["throughput/generate"] == pytest.approx(64 / values["time/generate"])
        assert values["throughput/update"] == pytest.approx(64 / values["time/update"])
        assert values["memory/driver"] > 0.01
        assert {"memory/generation", "memory/reward", "memory/advantage"} <= set(values)
    assert ["time/checkpoint" in values for _, values in run.recorder.steps] == [False, False, True]


@pytest.mark.parametrize("estimator", ["grpo", "remax", "hierarchical"])
async def test_a_run_writes_no_metric_that_is_not_documented(
    tmp_path: Path, estimator: str
) -> None:
    """Every option that the fakes support is enabled; docs/metrics.md has all of their metrics."""
    config = make_config(
        steps=2,
        evaluate=1,
        save=1,
        kl=0.01,
        placement="reward",
        temperature=0.1,
        estimator=estimator,
        sampling_rounds=2,
        pass_at=2,
    )
    run = await start(tmp_path, config)
    await run.finish()
    written = {name for record in read_metrics(run.directory.metrics) for name in record.values}
    assert len(written) > 40
    assert [name for name in sorted(written) if documented(name) is None] == []


async def test_rollouts_of_each_step_are_written(tmp_path: Path) -> None:
    config = make_config(steps=5)
    every_second = config.model_copy(
        update={"trainer": config.trainer.model_copy(update={"save_rollouts_every": 2})}
    )
    run = await start(tmp_path, every_second)
    await run.finish()
    assert sorted(path.name for path in run.directory.rollouts.iterdir()) == [
        f"step_{step:06d}.parquet" for step in (1, 2, 4, 5)
    ]


async def test_the_file_holds_the_advantages_that_the_update_estimated(tmp_path: Path) -> None:
    """With `recompute` the batch has none; the file has those of RLOO for its rewards."""
    config = make_config(steps=2)
    algorithm = config.algorithm.model_copy(
        update={"advantage": AdvantageConfig(name="rloo", recompute=True)}
    )
    run = await start(tmp_path, config.model_copy(update={"algorithm": algorithm}))
    await run.finish()
    for step in (1, 2):
        rows = read_rollouts(run.directory.rollouts / f"step_{step:06d}.parquet")
        groups: dict[int, list[float]] = {}
        for row in rows:
            groups.setdefault(row["group_id"], []).append(row["reward"])
        for row in rows:
            rewards = groups[row["group_id"]]
            baseline = (sum(rewards) - row["reward"]) / (len(rewards) - 1)
            assert row["advantages"] == pytest.approx([0.0, *[row["reward"] - baseline] * 2])


async def test_a_step_in_which_everything_is_masked_has_a_note(tmp_path: Path) -> None:
    """The fake's responses all reach the limit."""
    config = make_config(steps=1)
    algorithm = config.algorithm.model_copy(
        update={"overlong": OverlongConfig(mask_truncated=True)}
    )
    run = await start(tmp_path, config.model_copy(update={"algorithm": algorithm}))
    await run.finish()
    ((_, step),) = run.recorder.steps
    assert step["trained/responses"] == step["policy/updates"] == 0
    assert "trained/reward_mean" not in step
    assert step["rollout/truncated_fraction"] == 1
    (record,) = read_metrics(run.directory.metrics)
    assert record.notes == (
        "every response was truncated at generation.max_tokens and masked out of the loss: nothing "
        "was trained",
    )
    rows = read_rollouts(run.directory.rollouts / "step_000001.parquet")
    assert not any(row["trained"] or row["advantages"] for row in rows)
