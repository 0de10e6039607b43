"""A batch for critics, and an update of a critic that is written as plainly as possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlsys.config import RunConfig
from rlsys.data.batches import TrainBatch
from rlsys.data.packing import mini_batch_rows
from rlsys.models.value_models import load_value_model
from tests.support.rollout_examples import random_rollouts, train_batch


def critic_config(*, ranks: int = 1, **critic: Any) -> RunConfig:
    """Return a run of the tiny model with a critic; `critic` are fields of that section."""
    return RunConfig.model_validate(
        {
            "model": {"path": "tiny"},
            "data": {"max_prompt_tokens": 64},
            "generation": {"dtype": "float32", "max_tokens": 9},
            "policy": {"ranks": ranks, "compute_dtype": "float32", "num_mini_batches": 2},
            "critic": {
                "enabled": True,
                "optimizer": {"learning_rate": 1e-3, "max_grad_norm": 0.5},
                "value_clip": 0.3,
                **critic,
            },
            "algorithm": {"advantage": {"name": "gae"}},
            "trainer": {"steps": 10, "prompts_per_step": 6},
        }
    )


def example(*, unscored: tuple[int, ...] = ()) -> TrainBatch:
    """Return 24 responses with targets, and old values near the 0 of a new head."""
    rollouts = random_rollouts(0, groups=6, samples=4)
    batch = train_batch(rollouts)
    rewards = batch.rewards.rewards.copy()
    rewards[list(unscored)] = np.nan
    noise = np.random.default_rng(3).normal(scale=0.2, size=(2, len(rollouts.token_ids)))
    old, returns = np.where(rollouts.response_mask, noise, 0).astype(np.float32)
    scored = np.repeat(~np.isnan(rewards), rollouts.sequence_lengths)
    return replace(
        batch,
        rewards=replace(batch.rewards, rewards=rewards),
        values=old,
        returns=np.where(scored & rollouts.response_mask, returns + 0.5, 0).astype(np.float32),
    )


def plainly_updated(
    config: RunConfig, directory: Path, batch: TrainBatch
) -> tuple[Mapping[str, Tensor], list[float]]:
    """Return the weights and the mini-batches' losses of one update, without packing or masks.

    One sequence at a time through transformers' own class, the loss written out token by token.
    """
    model: Any = load_value_model(directory, dtype=torch.float32, attention="eager")
    settings, clip = config.critic.optimizer, config.critic.value_clip
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=0.0,
    )
    assert batch.returns is not None
    assert batch.values is not None
    epochs, num_mini_batches = config.critic_passes()
    losses = []
    for rows in mini_batch_rows(
        batch.rollouts.sequences,
        num_mini_batches=num_mini_batches,
        epochs=epochs,
        seed=config.trainer.seed,
        batch_id=batch.batch_id,
    ):
        terms: list[Tensor] = []
        for row in rows:
            if np.isnan(batch.rewards.rewards[row]):
                continue
            start, end = batch.rollouts.sequence_offsets[row : row + 2]
            tokens = torch.from_numpy(batch.rollouts.token_ids[start:end].astype(np.int64))
            before = model(input_ids=tokens[None]).logits[0, :-1, 0]
            for place in range(int(batch.rollouts.prompt_lengths[row]), len(tokens)):
                value, target = before[place - 1], float(batch.returns[start + place])
                error = (value - target) ** 2
                if clip is not None:
                    old = float(batch.values[start + place])
                    error = torch.max(error, (value.clamp(old - clip, old + clip) - target) ** 2)
                terms.append(error / 2)

        loss = torch.stack(terms).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}, losses
