"""Expert iteration's policy on real Ray and gloo: one rank or two, the updates are the same."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from rlsys.config.expert_iteration import ExpertIterationRunConfig
from rlsys.data.example_stream import ExampleBatch
from rlsys.metrics import values
from rlsys.models import resolve_model
from tests.support.rollout_examples import random_rollouts
from tests.support.saved_weights import saved_weights
from workers.training.expert_iteration import ExpertIterationWorker
from workers.training.rank_group import OfflineGroup

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def config(ranks: int, size: int) -> ExpertIterationRunConfig:
    return ExpertIterationRunConfig.model_validate(
        {
            "model": {"path": "tiny"},
            "data": {"max_prompt_tokens": 16},
            "generation": {"max_tokens": 16, "engine": "transformers", "dtype": "float32"},
            "expert": {"epochs": 2, "examples_per_update": size},
            "policy": {
                "ranks": ranks,
                "compute_dtype": "float32",
                "microbatch_tokens": 40,
                "optimizer": {"learning_rate": 1e-3, "schedule": "linear", "eps": 1e-4},
            },
            "trainer": {"steps": 4},
        }
    )


def first_rows(count: int) -> ExampleBatch:
    sequences = random_rollouts(0).sequences.take(np.arange(count))
    return ExampleBatch(batch_id=0, sequences=sequences, ranks=np.zeros(count, dtype=np.int64))


@asynccontextmanager
async def started(settings: ExpertIterationRunConfig) -> AsyncIterator[OfflineGroup]:
    """Start the ranks in processes of their own, and kill them at the end."""
    remote_class: Any = ray.remote(ExpertIterationWorker)
    count, model = settings.policy.ranks, str(resolve_model("tiny"))
    actors = [
        remote_class.options(num_cpus=0).remote(settings, model, rank, count)
        for rank in range(count)
    ]
    try:
        group = OfflineGroup(actors)
        await group.setup()
        yield group
    finally:
        for actor in actors:
            ray.kill(actor)


async def updated(
    settings: ExpertIterationRunConfig, batches: list[ExampleBatch], directory: Path
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Return weights and metrics after an update on each batch by new ranks."""
    directory.mkdir()
    async with started(settings) as group:
        reports = [values(await group.update(ray.put(batch))) for batch in batches]
        await group.save(directory)
        return saved_weights(directory), reports


async def test_updates_do_not_depend_on_the_number_of_ranks(tmp_path: Path):
    """Also where an update has one response for two ranks, and where a step has none."""
    batches = [first_rows(12), first_rows(0), first_rows(3)]
    expected, reports = await updated(config(1, 2), batches, tmp_path / "one")
    found, others = await updated(config(2, 2), batches, tmp_path / "two")

    assert [report["policy/updates"] for report in reports] == [12, 0, 4]
    for report, other in zip(reports, others, strict=True):
        names = [name for name in report if not name.startswith("memory/")]
        assert {name: other[name] for name in names} == pytest.approx(
            {name: report[name] for name in names}, rel=1e-4, abs=1e-5
        )
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4)
