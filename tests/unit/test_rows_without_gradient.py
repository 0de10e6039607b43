"""Rows whose gradient is exactly 0 are left out of the backward pass, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from rlsys.algorithms.policy_objectives import (
    PolicyObjectiveInputs,
    available_ratios,
    available_weights,
    is_zero_at_zero_advantage,
    levels_of,
    policy_objective,
)
from rlsys.config import RunConfig
from rlsys.data.batches import TrainBatch
from rlsys.models import resolve_model
from tests.support.rollout_examples import random_rollouts, rewards_of
from workers.training.policy import PolicyWorker, measured_sample
from workers.training.policy_loss import PolicyLoss

GROUPS, SAMPLES = 6, 3
EQUAL = (1, 2, 4)  # groups whose advantages are all 0


def example(equal: tuple[int, ...] = EQUAL) -> TrainBatch:
    """Return random responses; one response of a trained group has advantage 0 as well."""
    batch = random_rollouts(3, groups=GROUPS, samples=SAMPLES)
    of_response = np.random.default_rng(1).normal(size=len(batch)).astype(np.float32)
    of_response[np.isin(batch.group_ids, equal)] = 0.0
    of_response[0] = 0.0
    advantages = np.repeat(of_response, batch.sequence_lengths) * batch.response_mask
    rng = np.random.default_rng(2)
    old = -rng.random(len(batch.token_ids)).astype(np.float32) - 4.0
    return TrainBatch(
        rollouts=batch,
        rewards=rewards_of(batch),
        advantages=advantages,
        old_logprobs=old,
    )


def settings(**algorithm: Any) -> RunConfig:
    """Return a run on the tiny model with two kinds of state that a step must not skip.

    With the default `eps` Adam would turn rounding of gradients near 0 into whole steps.
    """
    return RunConfig.model_validate(
        {
            "model": {"path": "tiny"},
            "generation": {"dtype": "float32"},
            "policy": {
                "compute_dtype": "float32",
                "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1, "eps": 1e-2},
            },
            "algorithm": algorithm,
        }
    )


@pytest.fixture
def worker() -> Iterator[PolicyWorker]:
    """A policy of one rank in this process."""
    made = PolicyWorker(settings(), str(resolve_model("tiny")), 0, 1)
    made.setup(made.rendezvous())
    yield made
    made.shutdown()
    assert not dist.is_initialized()


def weights_after(worker: PolicyWorker, batches: list[TrainBatch]) -> dict[str, torch.Tensor]:
    """Return the weights after an update on each batch."""
    for batch in batches:
        worker.update(batch)
    return {name: tensor.clone() for name, tensor in worker.backend.weights()}


def every_row(self: PolicyLoss, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return all rows, as if each had a gradient."""
    return rows


@pytest.mark.parametrize(
    "equal", [(), EQUAL, tuple(range(GROUPS))], ids=["no group", "some groups", "every group"]
)
def test_the_weights_are_those_of_a_backward_pass_over_all_rows(
    worker: PolicyWorker, equal: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    """Three updates; moments and weight decay go on where no row has a gradient."""
    batches = [example(()), example(equal), example(equal)]
    skipped = weights_after(worker, batches)

    worker.shutdown()
    monkeypatch.setattr(PolicyLoss, "rows_with_gradient", every_row)
    whole = PolicyWorker(settings(), str(resolve_model("tiny")), 0, 1)
    whole.setup(whole.rendezvous())
    expected = weights_after(whole, batches)
    for name, tensor in expected.items():
        assert torch.allclose(skipped[name], tensor, atol=1e-6, rtol=1e-5), name


def test_metrics_of_skipped_rows_come_from_a_sample(worker: PolicyWorker):
    """The tokens of all rows count; the fraction that was skipped is reported."""
    batch = example()
    report = worker.update(batch)
    skipped = len(EQUAL) * SAMPLES + 1
    assert report["policy/skipped_fraction"].value == pytest.approx(skipped / (GROUPS * SAMPLES))
    tokens = int(batch.rollouts.response_lengths.sum())
    assert report["policy/tokens"].value == pytest.approx(tokens)
    assert report["policy/entropy"].count == pytest.approx(tokens)


def test_where_every_group_is_equal_the_norm_of_the_gradient_is_zero(worker: PolicyWorker):
    report = worker.update(example(tuple(range(GROUPS))))
    assert report["policy/grad_norm"].value == 0.0
    assert report["policy/loss"].value == 0.0
    assert report["policy/skipped_fraction"].value == 1.0
    assert report["policy/entropy"].value > 0.0


def test_every_fourth_group_is_measured():
    group_ids = np.repeat(np.arange(10), 2)
    rows = np.flatnonzero(group_ids != 3)
    assert np.unique(group_ids[measured_sample(rows, group_ids)]).tolist() == [0, 5, 9]
    assert not len(measured_sample(np.zeros(0, dtype=np.int64), group_ids))


def loss_of(batch: TrainBatch, config: RunConfig, **further: Any) -> PolicyLoss:
    """Return the loss of a configuration."""
    return PolicyLoss(batch=batch, algorithm=config.algorithm, **further)


def test_a_kl_or_entropy_term_keeps_every_row():
    batch, rows = example(), np.arange(GROUPS * SAMPLES)
    assert len(loss_of(batch, settings()).rows_with_gradient(rows)) == 8
    kept = [
        loss_of(batch, settings(entropy={"bonus": 0.1})),
        loss_of(batch, settings(), old_kl_coefficient=0.1),
        loss_of(
            replace(batch, ref_logprobs=batch.old_logprobs, kl_coefficient=0.1),
            settings(kl={"coefficient": 0.1}),
        ),
    ]
    for loss in kept:
        assert loss.rows_with_gradient(rows).tolist() == rows.tolist()


def test_rows_that_are_not_finite_are_kept():
    """A NaN must reach the gradient, so that the update is refused and reported."""
    batch, rows = example(), np.arange(GROUPS * SAMPLES)
    advantages = batch.advantages.copy()
    first_token = batch.rollouts.sequence_offsets[SAMPLES] + batch.rollouts.prompt_lengths[SAMPLES]
    advantages[first_token] = np.nan
    kept = loss_of(replace(batch, advantages=advantages), settings()).rows_with_gradient(rows)
    assert SAMPLES in kept


@pytest.mark.parametrize("weight", available_weights())
@pytest.mark.parametrize("ratio", available_ratios())
def test_what_weights_declare_holds(weight: str, ratio: str):
    """No token of a response with advantages 0 has a gradient, at ratios far from 1.

    Weights without the declaration pull such tokens back to the old policy.
    """

    levels = levels_of(weight)
    if levels is not None and ratio not in levels:
        return

    generator = torch.Generator().manual_seed(0)
    logprobs = (-3 * torch.rand(3, 5, generator=generator)).requires_grad_()
    advantages = torch.randn(3, 5, generator=generator)
    advantages[1] = 0.0
    given: dict[str, dict[str, Any]] = {
        "adaptive_power": {"q": 0.5},
        "kl_cov": {"fraction": 1.0},
    }
    parameters = given.get(weight, {})
    output = policy_objective(
        PolicyObjectiveInputs(
            logprobs=logprobs,
            old_logprobs=-3 * torch.rand(3, 5, generator=generator),
            advantages=advantages,
            response_mask=torch.ones(3, 5, dtype=torch.bool),
        ),
        ratio=ratio,
        weight=weight,
        **parameters,
    )
    output.token_losses.sum().backward()
    assert logprobs.grad is not None
    declared = is_zero_at_zero_advantage(weight)
    assert declared == (weight not in ("dro", "kl_cov"))
    assert declared == (not logprobs.grad[1].any())
    assert declared == (not output.token_losses[1].any())
    assert output.token_losses[[0, 2]].any()
