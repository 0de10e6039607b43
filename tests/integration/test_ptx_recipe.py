"""Pretraining text in a run: one command, held-out loss, checkpoints, resume, report; and ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from docs.generate.metrics import documented
from rlsys.config import (
    GenerationConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    PtxConfig,
    RunConfig,
    TrainerConfig,
)
from rlsys.metrics import values
from rlsys.models.weights import unpack_weights
from rlsys.run.observers.metrics_log import read_metrics
from tests.support.rank_processes import RankProcesses
from tests.support.rollout_examples import random_rollouts, train_batch
from tests.support.text_examples import random_texts
from workers.training.rank_group import PolicyGroup

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "tests" / "plugin_package"

SMALL = [
    *("--model.path", "tiny", "--generation.engine", "transformers"),
    *("--generation.dtype", "float32", "--policy.compute_dtype", "float32"),
    *("--generation.max_tokens", "8", "--generation.samples_per_prompt", "4"),
    *("--generation.cpus_per_worker", "0"),
    *("--trainer.prompts_per_step", "4", "--trainer.steps", "4"),
    *("--data.synthetic.train_size", "40", "--data.synthetic.eval_size", "4"),
    *("--plugins", "rlsys_example_plugin", "--reward.functions", "[{name: example_digits}]"),
    *("--trainer.checkpoints.every", "2", "--trainer.evaluation.every", "2"),
    *("--policy.optimizer.learning_rate", "1e-3", "--policy.num_mini_batches", "2"),
]
TEXTS = [
    *("--ptx.coefficient", "1", "--ptx.train", "synthetic"),
    *("--ptx.max_tokens", "32", "--ptx.examples_per_step", "11"),
]


def run(directory: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "recipes.grpo_math", "--run.directory", str(directory), *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(PLUGINS), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def computed(directory: Path) -> dict[tuple[str, int], dict[str, float]]:
    """Return the numbers of each record that do not depend on the clock or the process."""
    measured = ("time/", "throughput/", "memory/")
    return {
        (record.kind, record.step): {
            name: value for name, value in record.values.items() if not name.startswith(measured)
        }
        for record in read_metrics(directory / "metrics.jsonl")
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ptx") / "whole"
    done = run(directory, *SMALL, *TEXTS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held-out text loss" in done.stdout
    return directory


def test_a_run_measures_and_lowers_the_loss_of_text(whole: Path):
    records = computed(whole)
    assert [key for key in records if key[0] == "eval"] == [("eval", 0), ("eval", 2), ("eval", 4)]
    losses = [records["eval", step]["eval/text_loss"] for step in (0, 2, 4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[2] > 0.1
    for record in records.values():
        assert [name for name in record if documented(name) is None] == []
    for step in range(1, 5):
        assert records["train", step]["policy/updates"] == 2
        assert 0 < records["train", step]["policy/ptx_loss"] < 7
    assert "Loss of pretraining text" in (whole / "report.html").read_text()


def test_a_resumed_run_has_the_numbers_of_an_uninterrupted_one(whole: Path, tmp_path: Path):
    """As if the run had been killed after its second step."""
    directory = tmp_path / "part"
    shutil.copytree(whole, directory)
    shutil.rmtree(directory / "checkpoints" / "step_000004")
    state = directory / "checkpoints" / "step_000002" / "trainer_state.json"
    assert json.loads(state.read_text())["texts"]["taken"] == 22
    refused = run(directory, "--resume", "--ptx.max_tokens", "16")
    assert refused.returncode == 2
    assert "ptx.train: the " in refused.stderr

    resumed = run(directory, "--resume")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    expected, found = computed(whole), computed(directory)
    assert sorted(found) == sorted(expected)
    for key, numbers in expected.items():
        assert found[key] == pytest.approx(numbers, abs=1e-6), key


@pytest.fixture(scope="module")
def ranks(ray_cluster: None) -> Iterator[RankProcesses]:
    processes = RankProcesses()
    yield processes
    processes.kill()


def config(ranks: int, **policy: object) -> RunConfig:
    settings = {
        "ranks": ranks,
        "compute_dtype": "float32",
        "num_mini_batches": 2,
        # With the default eps Adam turns rounding of gradients near 0 into whole steps.
        "optimizer": OptimizerConfig(learning_rate=1e-2, max_grad_norm=0.5, eps=1e-2),
        **policy,
    }
    return RunConfig(
        model=ModelConfig(path="tiny"),
        generation=GenerationConfig(dtype="float32"),
        policy=PolicyConfig.model_validate(settings),
        ptx=PtxConfig(coefficient=0.7, train="synthetic"),
        trainer=TrainerConfig(steps=10, prompts_per_step=12),
    )


async def updated(
    ranks: RankProcesses, settings: RunConfig
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Return weights and metrics after one update with texts by new ranks."""
    batch, texts = train_batch(random_rollouts(0, groups=6, samples=4)), random_texts(7)
    async with ranks.group(settings) as group:
        report = values(await group.update(ray.put(batch), (), ray.put(texts)))
        report |= values(await group.text_loss(ray.put(random_texts(5, seed=2))))
        return await weights_of(group), report


async def weights_of(group: PolicyGroup) -> dict[str, torch.Tensor]:
    manifest, refs = await group.export_weights(1)
    shards = [await ref for ref in refs]
    return {name: tensor.clone() for name, tensor in unpack_weights(manifest, shards)}


@pytest.mark.usefixtures("ray_cluster")
async def test_an_update_with_texts_does_not_depend_on_ranks_or_packing(ranks: RankProcesses):
    reference, report = await updated(ranks, config(1))
    plans = [
        config(1, shared_prefix_packing=False, microbatch_tokens=24, logit_chunk_tokens=3),
        config(2, microbatch_tokens=24, gradient_checkpointing=True),
        config(2, microbatch_tokens=50, packing=False),
    ]
    for plan in plans:
        weights, other = await updated(ranks, plan)
        for name, tensor in reference.items():
            assert torch.allclose(weights[name], tensor, atol=1e-5), name
        for metric in ("policy/ptx_loss", "policy/grad_norm", "policy/loss", "eval/text_loss"):
            assert other[metric] == pytest.approx(report[metric], rel=1e-4, abs=1e-6), metric
        assert other["policy/ptx_tokens"] == report["policy/ptx_tokens"]
