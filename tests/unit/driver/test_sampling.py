"""Sampling of groups: rewards, seeds, dynamic sampling, greedy responses."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlsys.config.algorithm import GroupFilter
from rlsys.data.batches import RewardBatch, RolloutBatch
from rlsys.data.rollout_files import read_rollouts
from rlsys.driver.ports import Handle
from rlsys.run.reward_failures import RewardFailureError
from tests.support.in_process_fakes import FirstTokenScorer
from tests.support.in_process_runs import (
    assert_same_metrics,
    break_rewards,
    make_config,
    start,
    wait,
)


async def test_parts_are_joined_in_prompt_order(tmp_path: Path) -> None:
    """The generator finishes the last prompts first."""
    run = await start(tmp_path, make_config(steps=2))
    await run.finish()
    assert [batch["group_ids"] for batch in run.batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]


async def test_rewards_are_computed_while_generation_continues(tmp_path: Path) -> None:
    """The last part is held back until the first one is being scored."""
    run = await start(tmp_path, make_config(steps=1))
    scoring = asyncio.Event()

    async def began() -> None:
        scoring.set()

    run.stage.hooks = {"scoring": began, "part:last": lambda: wait(scoring)}
    assert await run.finish() == "finished"


async def test_sampling_seed_depends_on_run_and_batch_alone(tmp_path: Path) -> None:
    """The seed is the first word of SeedSequence([seed, batch_id]), which NumPy keeps stable."""
    run = await start(tmp_path, make_config(steps=2, seed=3))
    await run.finish()
    assert [request.seed for request in run.generator.requests] == [
        np.random.SeedSequence([3, 0]).generate_state(1)[0],
        np.random.SeedSequence([3, 1]).generate_state(1)[0],
    ]
    # Recorded with NumPy 2.3: another value would change every resumed run.
    assert run.generator.requests[0].seed == 1576890651
    assert all(request.stop == ("</answer>",) for request in run.generator.requests)


async def test_the_prompt_template_is_read_once(tmp_path: Path) -> None:
    """Not for each call of a worker; and a run does not notice that the file is gone."""
    template = tmp_path / "mine.jinja"
    template.write_text("---\nstop: END\n---\n{{ problem }}")
    config = make_config(steps=2, evaluate=1)
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={"template": str(template)}),
            "generation": config.generation.model_copy(update={"stop": ()}),
        }
    )
    run = await start(tmp_path / "run", config)
    template.unlink()
    assert await run.finish() == "finished"
    assert len(run.recorder.evaluations) == 3
    assert {request.stop for request in run.generator.requests} == {("END",)}


async def test_a_generator_that_loses_a_prompt_is_detected(tmp_path: Path) -> None:
    run = await start(tmp_path, make_config())
    generate = run.generator.generate

    async def lossy(prompts, sampling):
        async for part in generate(prompts, sampling):
            if part.prompt_index:
                yield part

    run.generator.generate = lossy
    with pytest.raises(AssertionError, match="must answer each prompt once"):
        await run.finish()


async def test_dynamic_sampling_replaces_groups_of_equal_rewards(tmp_path: Path) -> None:
    """Trained groups have different rewards as long as the rounds suffice.

    Other groups fill the rest of the batch, and everything is counted.
    """
    plain = await start(tmp_path / "plain", make_config(steps=3))
    await plain.finish()
    run = await start(tmp_path / "dynamic", make_config(steps=3, sampling_rounds=4))
    await run.finish()
    for _, step in run.recorder.steps:
        missing = step["sampling/missing_groups"]
        assert step["trained/frac_reward_zero_std"] * 4 == missing
        assert 1 <= step["sampling/rounds"] <= 4
        assert step["sampling/rounds"] == 4 or not missing
    assert sum(step["sampling/replaced_groups"] for _, step in run.recorder.steps) > 0
    assert sum(step["trained/frac_reward_zero_std"] for _, step in plain.recorder.steps) > sum(
        step["trained/frac_reward_zero_std"] for _, step in run.recorder.steps
    )
    seeds = [request.seed for request in run.generator.requests]
    assert len(set(seeds)) == len(seeds)  # a further round is sampled anew
    assert all(len(set(batch["group_ids"])) == 4 for batch in run.batches)


@pytest.mark.parametrize("by", ["accuracy", "reward"])
async def test_dynamic_sampling_compares_correctness_unless_configured_otherwise(
    tmp_path: Path, by: GroupFilter
) -> None:
    """With a penalty that differs within every group, no group has equal rewards.

    Only correctness shows which groups have a learning signal.
    """
    run = await start(tmp_path, make_config(steps=2, sampling_rounds=3, by=by))
    scorer = run.workers.scorer
    assert isinstance(scorer, FirstTokenScorer)
    score = scorer._score

    async def penalizing(rollouts: Handle[RolloutBatch]) -> RewardBatch:
        scored = await score(rollouts)
        penalized = scored.rewards - np.linspace(0, 0.4, len(scored), dtype=np.float32)
        return replace(scored, rewards=penalized)

    scorer._score = penalizing
    await run.finish()
    for _, step in run.recorder.steps:
        if by == "reward":
            assert (step["sampling/rounds"], step["sampling/missing_groups"]) == (1, 0)
            assert step["trained/responses"] == 4 * 8
        else:
            assert step["sampling/rounds"] > 1
            assert step["trained/responses"] == (4 - step["sampling/missing_groups"]) * 8


async def test_with_dynamic_sampling_metrics_and_files_cover_everything_that_was_sampled(
    tmp_path: Path,
) -> None:
    """Dropped groups count in reward, accuracy, tokens and throughput, and are not trained on.

    The metrics are compared with the files, which hold every response.
    """
    run = await start(tmp_path, make_config(steps=3, sampling_rounds=4))
    await run.finish()
    differed = 0
    for number, step in run.recorder.steps:
        rows = read_rollouts(run.directory.rollouts / f"step_{number:06d}.parquet")
        trained = [row for row in rows if row["trained"]]
        differed += step["reward/mean"] != step["trained/reward_mean"]
        assert step["rollout/responses"] == len(rows)
        assert step["rollout/tokens"] == 2 * len(rows)
        assert step["throughput/generate"] == pytest.approx(2 * len(rows) / step["time/generate"])
        assert step["reward/mean"] == pytest.approx(np.mean([row["reward"] for row in rows]))
        assert step["reward/accuracy"] == pytest.approx(np.mean([row["correct"] for row in rows]))
        assert step["trained/responses"] == len(trained) == 4 * 8
        assert step["trained/reward_mean"] == pytest.approx(
            np.mean([row["reward"] for row in trained])
        )
        dropped = step["sampling/replaced_groups"] + step["sampling/surplus_groups"]
        assert len(rows) - len(trained) == 8 * dropped
        for row in rows:
            assert (row["advantages"] is None) == (not row["trained"])
        assert {row["group_id"] for row in trained} == set(run.batches[number - 1]["group_ids"])
    assert differed > 0


async def test_greedy_responses_count_in_the_throughput(tmp_path: Path) -> None:
    """Each of four prompts has a greedy response of two tokens."""
    run = await start(tmp_path, make_config(steps=1, estimator="remax"))
    await run.finish()
    ((_, step),) = run.recorder.steps
    assert (step["rollout/tokens"], step["rollout/greedy_tokens"]) == (64, 8)
    assert step["throughput/generate"] == pytest.approx(72 / step["time/generate"])


@pytest.mark.parametrize(("evaluate", "occasion"), [(0, "training"), (2, "evaluation")])
@pytest.mark.parametrize("rounds", [1, 3])
async def test_rewards_that_fail_from_the_start_end_the_run(
    tmp_path: Path, evaluate: int, occasion: str, rounds: int
) -> None:
    run = await start(tmp_path, make_config(steps=3, evaluate=evaluate, sampling_rounds=rounds))
    break_rewards(run, lambda row: row != 7)
    with pytest.raises(RewardFailureError, match=f"of the first {occasion} batch"):
        await run.finish()
    assert run.recorder.ends[0][0] == "failed"
    assert "update" not in run.stage.journal
    requests = [request for request in run.generator.requests if request.temperature]
    assert len(requests) == (1 if occasion == "training" else 0)  # no further round of sampling


async def test_dropped_responses_make_no_difference_to_a_group_of_equal_rewards(
    tmp_path: Path,
) -> None:
    """Dynamic sampling requires two different rewards among the responses that have one."""
    run = await start(tmp_path, make_config(steps=2, sampling_rounds=3))
    break_rewards(run, lambda row: row == 0, drop=True)
    await run.finish()
    for _, step in run.recorder.steps:
        assert step["reward/dropped"] == 4  # one of each group
        assert step["reward/failed/first_token"] == step["rollout/responses"] / 8
        assert step["trained/frac_reward_zero_std"] * 4 == step["sampling/missing_groups"]


async def test_dynamic_sampling_resumes_to_the_same_result(tmp_path: Path) -> None:
    config = make_config(steps=4, sampling_rounds=3, save=2)
    await (await start(tmp_path / "whole", config)).finish()
    stopped = await start(tmp_path / "stopped", config)
    stopped.recorder.react = lambda step, at: (
        stopped.session.request_stop() if (step, at) == (2, "update") else None
    )
    await stopped.finish()
    await (await start(tmp_path / "stopped", config, resume=True)).finish()
    assert_same_metrics(tmp_path / "whole", tmp_path / "stopped")


async def test_a_greedy_response_per_prompt_is_sampled_where_the_estimator_reads_it(
    tmp_path: Path,
) -> None:
    run = await start(tmp_path, make_config(steps=2, estimator="remax"))
    await run.finish()
    assert [
        (request.samples_per_prompt, request.temperature) for request in run.generator.requests
    ] == [(8, 1.0), (1, 0.0)] * 2
    assert all(step["advantage/mean_abs"] > 0 for _, step in run.recorder.steps)
