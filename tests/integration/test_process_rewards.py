"""Rewards of steps in whole runs: from a function of the text to the advantages of tokens."""

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import pytest
import ray

from docs.generate.metrics import documented
from rlsys.config import RunConfig
from rlsys.data.batches import RewardBatch, RolloutBatch
from rlsys.data.rollout_files import read_rollouts
from rlsys.models import resolve_model
from rlsys.models.loading import load_tokenizer
from rlsys.rewards import split_steps
from rlsys.run.observers.metrics_log import read_metrics
from tests.support.reward_models import build_process_reward_model, plain_step_scores
from tests.support.rollout_examples import rollouts
from workers.reward_worker import RewardWorker, RewardWorkerClient
from workers.training.rank_group import ScoringGroup
from workers.training.reward_scoring import StepScoringWorker

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "tests" / "plugin_package"
TOKENIZER: Any = load_tokenizer(resolve_model("tiny"))
WEIGHT = 0.5

SMALL = [
    *("--model.path", "tiny", "--generation.engine", "transformers"),
    *("--generation.dtype", "float32", "--policy.compute_dtype", "float32"),
    *("--generation.max_tokens", "12", "--generation.samples_per_prompt", "3"),
    *("--generation.cpus_per_worker", "0"),
    *("--trainer.prompts_per_step", "4", "--trainer.steps", "2"),
    *("--data.synthetic.train_size", "40", "--data.synthetic.eval_size", "4"),
    *("--plugins", "rlsys_example_plugin"),
    *("--reward.functions", f"[example_digits, {{name: example_steps, weight: {WEIGHT}}}]"),
    *("--trainer.checkpoints.every", "0", "--trainer.evaluation.every", "0"),
]


def run(recipe: str, directory: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", recipe, "--run.directory", str(directory), *SMALL, *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(PLUGINS), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def rows_of(directory: Path) -> list[dict]:
    """Return the responses of the second step."""
    return read_rollouts(directory / "rollouts" / "step_000002.parquet")


def response_ids(row: dict) -> list[int]:
    return row["token_ids"][row["prompt_length"] :]


def step_rewards(row: dict, name: str = "example_steps") -> list[float]:
    """Return the weighted rewards of steps at each token, the outcome at the last one added."""
    rewards = [0.0] * len(response_ids(row))
    steps = (row[f"step_ends_{name}"], row[f"step_rewards_{name}"])
    for end, reward in zip(*steps, strict=True):
        rewards[end] += WEIGHT * reward
    rewards[-1] += row["reward"]
    return rewards


def check_places(row: dict) -> None:
    """Check that each step ends at the token with which its last character is complete."""
    ids = response_ids(row)
    ends = row["step_ends_example_steps"]
    texts = [TOKENIZER.decode(ids[:n], skip_special_tokens=True) for n in range(len(ids) + 1)]
    characters = len(row["response"])
    wanted = [*range(4, characters, 4), characters] if characters else []
    assert len(ends) == len(wanted)
    for end, character in zip(ends, wanted, strict=True):
        before = texts[end].rstrip("\ufffd")
        assert len(before) < character <= len(texts[end + 1])


def slow_grpo_process(group: list[dict], name: str = "example_steps") -> list[list[float]]:
    """Return the advantages of each response of a group, one step and token at a time."""
    steps = []
    for row in group:
        ends = sorted(set(row[f"step_ends_{name}"]))
        rewards = step_rewards(row, name)
        last = len(rewards) - 1
        own = {end: rewards[end] for end in ends}
        final = max(ends, default=last)
        if final != last:  # the last step ends with the response, and has the outcome
            own[last] = own.pop(final, 0.0) + rewards[last]
        steps.append(own)

    everything = [reward for own in steps for reward in own.values()]
    mean, std = fmean(everything), pstdev(everything)
    return [
        [
            sum((reward - mean) / (std + 1e-6) for end, reward in own.items() if end >= t)
            for t in range(len(response_ids(row)))
        ]
        for row, own in zip(group, steps, strict=True)
    ]


def test_grpo_process_compares_the_steps_of_a_group(tmp_path: Path):
    directory = tmp_path / "run"
    done = run(
        "recipes.grpo_math",
        directory,
        *("--algorithm.advantage.name", "grpo_process", "--algorithm.advantage.parameters", "{}"),
    )
    assert done.returncode == 0, done.stdout + done.stderr

    rows = rows_of(directory)
    assert len(rows) == 12
    for row in rows:
        check_places(row)
    for group_id in {row["group_id"] for row in rows}:
        group = [row for row in rows if row["group_id"] == group_id]
        for row, expected in zip(group, slow_grpo_process(group), strict=True):
            found = row["advantages"][row["prompt_length"] :]
            assert found == pytest.approx(expected, abs=1e-4)

    (_, second) = [r for r in read_metrics(directory / "metrics.jsonl") if r.kind == "train"]
    steps = [row["step_rewards_example_steps"] for row in rows]
    everything = [reward for own in steps for reward in own]
    assert second.values["reward/steps/example_steps"] == pytest.approx(fmean(map(len, steps)))
    assert second.values["reward/step_mean/example_steps"] == pytest.approx(fmean(everything))
    assert all(documented(name) for name in second.values)


@pytest.mark.long
def test_gae_learns_from_the_rewards_of_steps(tmp_path: Path):
    directory = tmp_path / "run"
    done = run(
        "recipes.ppo_math",
        directory,
        *("--algorithm.advantage.parameters", "{gamma: 1.0, lam: 1.0}"),
        *("--algorithm.kl.coefficient", "0", "--critic.warmup_steps", "1"),
    )
    assert done.returncode == 0, done.stdout + done.stderr

    rows = rows_of(directory)
    assert any(any(row["step_rewards_example_steps"]) for row in rows)
    for row in rows:
        check_places(row)
        rewards = step_rewards(row)
        returns = [sum(rewards[t:]) for t in range(len(rewards))]
        assert row["returns"][row["prompt_length"] :] == pytest.approx(returns, abs=1e-5)


def test_a_process_reward_model_rewards_the_steps(tmp_path: Path):
    """As transformers scores them on single sequences, to the advantages of grpo_process."""
    model = build_process_reward_model(tmp_path / "model")
    parameters = f"{{path: {model}, split: delimiter, delimiter: e}}"
    judge = f"{{name: process_model, weight: {WEIGHT}, parameters: {parameters}}}"
    directory = tmp_path / "run"
    done = run(
        "recipes.grpo_math",
        directory,
        *("--algorithm.advantage.name", "grpo_process", "--algorithm.advantage.parameters", "{}"),
        *("--reward.functions", f"[example_digits, {judge}]", "--trainer.evaluation.every", "2"),
    )
    assert done.returncode == 0, done.stdout + done.stderr

    rows = rows_of(directory)
    places = []
    for row in rows:
        ids, text = response_ids(row), row["response"]
        texts = [TOKENIZER.decode(ids[: n + 1], skip_special_tokens=True) for n in range(len(ids))]
        ends = [step.end for step in split_steps(text, delimiter="e")]
        tokens = [next(n for n, t in enumerate(texts) if len(t) >= end) for end in ends]
        assert row["step_ends_process_model"] == sorted(set(tokens))
        assert row["reward_process_model"] == 0
        places.append([row["prompt_length"] + n for n in row["step_ends_process_model"]])
    assert max(map(len, places)) > 1

    expected = plain_step_scores(model, [row["token_ids"] for row in rows], places)
    for row, scores in zip(rows, expected, strict=True):
        assert row["step_rewards_process_model"] == pytest.approx(scores, abs=1e-4)
    for group_id in {row["group_id"] for row in rows}:
        group = [row for row in rows if row["group_id"] == group_id]
        slow = slow_grpo_process(group, "process_model")
        for row, advantages in zip(group, slow, strict=True):
            found = row["advantages"][row["prompt_length"] :]
            assert found == pytest.approx(advantages, abs=1e-4)

    records = list(read_metrics(directory / "metrics.jsonl"))
    second = next(r.values for r in records if r.kind == "train" and r.step == 2)
    assert second["reward/steps/process_model"] == pytest.approx(fmean(map(len, places)))
    everything = [score for scores in expected for score in scores]
    mean = second["reward/step_mean/process_model"]
    assert mean == pytest.approx(fmean(everything), abs=1e-4)
    evaluation = next(r.values for r in records if r.kind == "eval")
    assert 0 < evaluation["eval/step_mean/process_model"] < 1
    assert all(documented(name) for record in records for name in record.values)


@pytest.mark.usefixtures("ray_cluster")
async def test_ranks_of_a_process_reward_model_share_the_steps(tmp_path: Path):
    """Two ranks and small packs; in the second part only one response has steps."""
    model = build_process_reward_model(tmp_path / "model")
    judge = {"name": "process_model", "parameters": {"path": str(model), "delimiter": "."}}
    config = RunConfig.model_validate(
        {
            "model": {"path": "tiny"},
            "data": {"max_prompt_tokens": 64},
            "generation": {"max_tokens": 64},
            "policy": {"compute_dtype": "float32", "ranks": 2, "microbatch_tokens": 20},
            "reward": {"functions": ["math", judge]},
        }
    )
    parts = [part_of(0, ["a.b", "no end", "", "1.2.3.4"]), part_of(1, ["", "x. y", "\n"])]
    worker: Any = ray.remote(RewardWorker)
    rank_class: Any = ray.remote(StepScoringWorker)
    tiny = str(resolve_model("tiny"))
    actor = worker.options(num_cpus=0, max_concurrency=100).remote(config, tiny)
    ranks = [
        rank_class.options(num_cpus=0).remote(config, str(model), rank, 2) for rank in range(2)
    ]
    try:
        group = ScoringGroup(ranks)
        await group.setup()
        client = RewardWorkerClient([actor], group)
        handles = [client.score(ray.put(part)) for part in parts]
        rewards = RewardBatch.concatenate(await asyncio.gather(*handles))
    finally:
        for started in (actor, *ranks):
            ray.kill(started)

    steps = rewards.step_rewards["process_model"]
    assert np.diff(steps.offsets).tolist() == [2, 1, 0, 4, 0, 2, 0]
    whole = RolloutBatch.concatenate(parts)
    tokens = [row.tolist() for row in np.split(whole.token_ids, whole.sequence_offsets[1:-1])]
    places = [
        [length + end for end in ends.tolist()]
        for length, ends in zip(
            whole.prompt_lengths, np.split(steps.ends, steps.offsets[1:-1]), strict=True
        )
    ]
    expected = [score for own in plain_step_scores(model, tokens, places) for score in own]
    np.testing.assert_allclose(steps.rewards, expected, atol=1e-4)
    assert not rewards.failures


def part_of(group: int, texts: list[str]) -> RolloutBatch:
    """Return responses to one prompt."""
    ids = [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in texts]
    made = rollouts([([5, 6, 7 + group], ids)], first_group=group)
    return replace(made, response_texts=tuple(texts))


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (
            ("--algorithm.advantage.name", "grpo_process", "--reward.functions", "math"),
            ("'grpo_process' compares the rewards of steps", "(math)", "arithmetic_steps"),
        ),
        (
            ("--algorithm.advantage.name", "maxrl"),
            ("'example_steps' rewards steps", "'maxrl' is defined for rewards of whole responses"),
        ),
    ],
)
def test_what_would_lose_steps_is_refused(tmp_path: Path, flags: tuple, parts: tuple):
    done = run(
        "recipes.grpo_math",
        tmp_path / "run",
        *("--algorithm.advantage.parameters", "{}"),
        *flags,
        "--dry-run",
    )
    assert done.returncode != 0
    output = " ".join((done.stdout + done.stderr).split())
    for part in parts:
        assert part in output
