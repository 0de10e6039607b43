"""A reward model beside the verifier, on real Ray: scores, ranks, and a run as a user starts it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from docs.generate.metrics import documented
from rlsys.config import RunConfig
from rlsys.data.batches import RewardBatch, RolloutBatch
from rlsys.data.rollout_files import read_rollouts
from rlsys.metrics import values
from rlsys.run.observers.metrics_log import read_metrics
from tests.support.reward_models import build_reward_model, plain_scores
from tests.support.rollout_examples import rollouts
from workers.reward_worker import RewardWorker, RewardWorkerClient
from workers.training.rank_group import ScoringGroup
from workers.training.reward_scoring import ScoringWorker

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4
END = 2  # of the tiny model's tokenizer

SMALL = [
    *("--model.path", "tiny", "--generation.engine", "transformers"),
    *("--generation.dtype", "float32", "--policy.compute_dtype", "float32"),
    *("--generation.max_tokens", "8", "--generation.samples_per_prompt", "4"),
    *("--generation.cpus_per_worker", "0"),
    *("--trainer.prompts_per_step", "4", "--trainer.steps", "2"),
    *("--data.synthetic.train_size", "40", "--data.synthetic.eval_size", "4"),
    *("--trainer.evaluation.every", "2", "--trainer.checkpoints.every", "1"),
]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_reward_model(tmp_path_factory.mktemp("models") / "reward_model", mean=0.25)


def functions(path: Path, **parameters: Any) -> list[dict[str, Any]]:
    """Return the verifier, and half the score of a model."""
    model = {"name": "model", "weight": 0.5, "parameters": {"path": str(path), **parameters}}
    return [{"name": "math"}, model]


# --- ranks ----------------------------------------------------------------------------------------


def parts() -> list[RolloutBatch]:
    """Return groups of 1 to 5 responses: with an end token, cut off, and empty."""
    rng = np.random.default_rng(0)
    made = []
    for number, samples in enumerate((4, 1, 5, 2)):
        prompt = rng.integers(5, 300, int(rng.integers(3, 12))).tolist()
        responses = [rng.integers(5, 300, int(rng.integers(0, 8))).tolist() for _ in range(samples)]
        responses = [tokens + [END] * (row % 2) for row, tokens in enumerate(responses)]
        made.append(rollouts([(prompt, responses)], batch_id=3, first_group=number))
    return made


def sequences_of(part: RolloutBatch) -> list[list[int]]:
    """Return prompt and response of each row."""
    return [tokens.tolist() for tokens in np.split(part.token_ids, part.sequence_offsets[1:-1])]


@asynccontextmanager
async def scorer(path: Path, policy: dict[str, Any]) -> AsyncIterator[RewardWorkerClient]:
    """Start the reward worker and the ranks of the model, and kill them at the end."""
    config = RunConfig.model_validate(
        {
            "model": {"path": "tiny"},
            "data": {"max_prompt_tokens": 64},
            "generation": {"dtype": "float32", "max_tokens": 9},
            "policy": {"compute_dtype": "float32", **policy},
            "reward": {"functions": functions(path)},
        }
    )
    ranks = config.policy.ranks
    worker: Any = ray.remote(RewardWorker)
    rank_class: Any = ray.remote(ScoringWorker)
    actor = worker.options(num_cpus=0, max_concurrency=100).remote(config)
    actors = [
        rank_class.options(num_cpus=0).remote(config, str(path), rank, ranks)
        for rank in range(ranks)
    ]
    try:
        group = ScoringGroup(actors)
        await group.setup()
        yield RewardWorkerClient([actor], group)
        assert values(await group.metrics())["memory/reward_model"] > 0
    finally:
        for started in (actor, *actors):
            ray.kill(started)


async def scored(path: Path, **policy: Any) -> RewardBatch:
    """Return the rewards of all parts, which are on their way at the same time."""
    async with scorer(path, policy) as client:
        handles = [client.score(ray.put(part)) for part in parts()]
        return RewardBatch.concatenate(await asyncio.gather(*handles))


@pytest.mark.usefixtures("ray_cluster")
async def test_scores_do_not_depend_on_ranks_or_packing(reward_model: Path):
    """They are those of transformers' own class on single sequences, minus the mean."""
    tokens = [row for part in parts() for row in sequences_of(part)]
    expected = plain_scores(reward_model, tokens)
    assert np.std(expected) > 0.1, "the model tells responses apart"

    plans: dict[str, dict[str, Any]] = {
        "one rank": {},
        "two ranks, small packs": {"ranks": 2, "microbatch_tokens": 20},
        "two ranks, padded, prompts repeated": {"ranks": 2, "packing": False},
    }
    for name, plan in plans.items():
        batch = await scored(reward_model, **plan)
        found = batch.components["model"]
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, err_msg=name)
        np.testing.assert_allclose(batch.rewards, 0.5 * found, atol=1e-6, err_msg=name)
        assert set(batch.reasons) == {"no_answer"}, "the verifier decides the reason"
        assert batch.has_accuracy


@pytest.mark.usefixtures("ray_cluster")
async def test_bfloat16_scores_are_close(reward_model: Path):
    tokens = [row for part in parts() for row in sequences_of(part)]
    batch = await scored(reward_model, compute_dtype="bfloat16")
    found = batch.components["model"]
    expected = plain_scores(reward_model, tokens)
    assert 1e-4 < np.abs(found - expected).max() < 0.2


# --- runs -----------------------------------------------------------------------------------------


def grpo(directory: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "recipes.grpo_math", "--run.directory", str(directory), *flags],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, reward_model: Path) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "whole"
    chosen = json.dumps(functions(reward_model))
    done = grpo(directory, *SMALL, "--reward.functions", chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held-out reward" in done.stdout
    return directory


def test_a_run_scores_as_transformers_does(whole: Path, reward_model: Path):
    for step in (1, 2):
        rows = read_rollouts(whole / "rollouts" / f"step_{step:06d}.parquet")
        assert len(rows) == 16
        expected = plain_scores(reward_model, [row["token_ids"] for row in rows])
        for row, score in zip(rows, expected, strict=True):
            assert row["reward_model"] == pytest.approx(score, abs=TOLERANCE)
            total = row["reward_math"] + 0.5 * row["reward_model"]
            assert row["reward"] == pytest.approx(total, abs=1e-5)


def test_rule_and_model_are_shown_side_by_side(whole: Path):
    records = list(read_metrics(whole / "metrics.jsonl"))
    for record in records:
        kind = "eval" if record.kind == "eval" else "reward"
        assert {f"{kind}/component/math", f"{kind}/component/model"} <= {*record.values}
        assert [name for name in record.values if documented(name) is None] == []
    evaluation = next(record.values for record in records if record.kind == "eval")
    components = (evaluation["eval/component/math"], evaluation["eval/component/model"])
    assert evaluation["eval/reward"] == pytest.approx(components[0] + 0.5 * components[1])
    assert "Reward by function (unweighted mean)" in (whole / "report.html").read_text()


@pytest.mark.long
def test_a_run_continues_with_the_same_model_only(whole: Path, tmp_path: Path):
    other = build_reward_model(tmp_path / "other", mean=0.25, seed=1)
    flags = ("--resume", "--trainer.steps", "3", "--reward.functions")
    refused = grpo(whole, *flags, json.dumps(functions(other)))
    assert refused.returncode == 2
    assert "holds another model than the one whose rewards checkpoint" in refused.stderr

    resumed = grpo(whole, "--resume", "--trainer.steps", "3")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    steps = [r.step for r in read_metrics(whole / "metrics.jsonl") if r.kind == "train"]
    assert steps == [1, 2, 3]


def test_a_run_on_a_model_alone_has_no_accuracy(reward_model: Path, tmp_path: Path):
    """With two policy ranks and one of the model, and without a process of the reward pool."""
    chosen = json.dumps(functions(reward_model, ranks=1)[1:])
    flags = ("--policy.ranks", "2", "--reward.functions", chosen)
    done = grpo(tmp_path / "alone", *SMALL, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held-out accuracy" not in done.stdout
    assert "held-out reward" in done.stdout
    for record in read_metrics(tmp_path / "alone" / "metrics.jsonl"):
        assert not {"reward/accuracy", "eval/accuracy"} & {*record.values}
    (row, *_) = read_rollouts(tmp_path / "alone" / "rollouts" / "step_000002.parquet")
    assert row["correct"] is None
    assert (tmp_path / "alone" / "report.html").exists()
