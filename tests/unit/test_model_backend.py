"""A value model trains through the same backend, packs and passes as the policy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from rlsys.config import RunConfig
from rlsys.data.packing import pack_rows
from rlsys.models import resolve_model
from tests.support.rollout_examples import random_rollouts
from workers.training.backends import build_backend
from workers.training.losses import Denominators, PackColumns, PackLoss, backward_passes
from workers.training.model_setup import prepare, value_model
from workers.training.packed_value_model import ValueResult

CPU = torch.device("cpu")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """Start a process group of one rank in this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("budget", [24, 1000])
def test_a_value_model_learns_its_targets(budget: int):
    """Fit targets 0, 1, 2, 0, ... along the tokens.

    The squared error falls to less than a tenth in 30 steps.
    """
    config = RunConfig.model_validate(
        {"model": {"path": "tiny"}, "policy": {"compute_dtype": "float32"}}
    )
    directory = resolve_model("tiny")

    model, _ = prepare(value_model(), config, config.policy, directory, CPU)
    backend = build_backend(model, config.policy, CPU, directory)

    rollouts = random_rollouts(0)
    targets = np.arange(len(rollouts.token_ids), dtype=np.float32) % 3
    tokens = int(rollouts.response_mask.sum())

    def squared_error(result: ValueResult, columns: PackColumns, sizes: Denominators) -> PackLoss:
        errors = (result.values - columns.take(targets)).square()
        loss = columns.pad(errors).sum() / sizes.num_tokens
        return PackLoss(loss=loss, sums={"error": float(errors.detach().sum())}, maxima={})

    sizes = Denominators(num_tokens=tokens, num_sequences=len(rollouts), max_tokens=tokens)
    rows = np.arange(len(rollouts))
    packs = pack_rows(
        rollouts.sequences, rows, budget=budget, rank=0, ranks=1, shared_prefix_packing=False
    )

    history: list[float] = []
    for _ in range(30):
        passes = list(backward_passes(backend, packs, squared_error, sizes))
        history.append(sum(loss.sums["error"] for _, _, loss in passes) / tokens)
        assert np.isfinite(backend.step(learning_rate=3e-3))
    assert history[-1] < 0.1 * history[0]
