"""The critic on real Ray and gloo: one rank or two, packed or padded, the update is the same."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from rlsys.config import RunConfig
from rlsys.data.batches import TrainBatch, ValueBatch
from rlsys.metrics import values
from rlsys.models import resolve_model
from tests.support.critic_examples import critic_config, example
from tests.support.saved_weights import saved_weights
from workers.training.critic import CriticWorker
from workers.training.rank_group import CriticGroup

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@asynccontextmanager
async def critic_group(config: RunConfig) -> AsyncIterator[CriticGroup]:
    """Start the critic's ranks in processes of their own, and kill them at the end."""
    remote_class: Any = ray.remote(CriticWorker)
    count = config.critic_role().ranks
    model = str(resolve_model("tiny"))
    actors = [
        remote_class.options(num_cpus=0).remote(config, model, rank, count) for rank in range(count)
    ]
    try:
        group = CriticGroup(actors)
        await group.setup()
        yield group
    finally:
        for actor in actors:
            ray.kill(actor)


async def values_of(group: CriticGroup, batch: TrainBatch) -> np.ndarray:
    parts = await group.values([ray.put(batch.rollouts)])
    return ValueBatch.scatter([await part for part in parts], batch.rollouts.sequence_offsets)


async def updated(
    config: RunConfig, batch: TrainBatch, directory: Path
) -> tuple[dict[str, torch.Tensor], np.ndarray, dict[str, float]]:
    """Return weights, values and metrics after an update by new ranks."""
    directory.mkdir()
    async with critic_group(config) as group:
        report = values(await group.update(ray.put(batch)))
        after = await values_of(group, batch)
        await group.save(directory)
        return saved_weights(directory), after, report


async def test_an_update_does_not_depend_on_ranks_or_packing(tmp_path: Path):
    """Losses and values agree to 1e-5; weights where Adam's sign of a gradient is no rounding."""
    batch = example(unscored=(2,))
    expected, after, report = await updated(critic_config(epochs=2), batch, tmp_path / "one")
    assert np.abs(after).max() > 0.01, "the update did something"

    padded = critic_config(ranks=2, epochs=2, microbatch_tokens=50, gradient_checkpointing=True)
    policy = padded.policy.model_copy(update={"packing": False})
    plans = {
        "two ranks": critic_config(ranks=2, epochs=2, microbatch_tokens=50),
        "two ranks, padded": padded.model_copy(update={"policy": policy}),
    }
    for name, plan in plans.items():
        weights, found, other = await updated(plan, batch, tmp_path / name)
        np.testing.assert_allclose(found, after, atol=1e-5, err_msg=name)
        for key, tensor in expected.items():
            agree = (weights[key] - tensor).abs() < 1e-5
            assert agree.float().mean() > 0.999, (name, key)
        for metric in ("critic/loss", "critic/grad_norm", "critic/clip_fraction"):
            assert other[metric] == pytest.approx(report[metric], rel=1e-4, abs=1e-5), metric
        assert other["critic/updates"] == report["critic/updates"] == 4


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 2)])
async def test_any_number_of_ranks_continues_where_it_was_saved(
    tmp_path: Path, before: int, after: int
):
    batch = example()
    async with critic_group(critic_config(ranks=before)) as group:
        await group.update(ray.put(batch))
        await group.save(tmp_path)
        uninterrupted = values(await group.update(ray.put(batch)))
        expected = await values_of(group, batch)

    async with critic_group(critic_config(ranks=after)) as group:
        await group.load(tmp_path)
        resumed = values(await group.update(ray.put(batch)))
        found = await values_of(group, batch)
    np.testing.assert_allclose(found, expected, atol=1e-6 if before == after else 1e-5)
    for metric in ("critic/loss", "critic/grad_norm", "critic/learning_rate"):
        assert resumed[metric] == pytest.approx(uninterrupted[metric], rel=1e-5, abs=1e-6), metric
