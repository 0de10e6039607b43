"""Pretraining text in the update: its gradient against autograd of whole logits, and what it adds.

The worker is a policy of one rank in this process. `Gradients` keeps the gradient of each optimizer
step before it is clipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from rlsys.config import RunConfig
from rlsys.data.batches import ScoredBatch, TrainBatch
from rlsys.data.example_stream import ExampleBatch
from rlsys.data.hidden_states import HiddenStates, JoinedStates
from rlsys.models import resolve_model
from rlsys.models.loading import load_causal_lm
from tests.support.rollout_examples import random_rollouts, rewards_of
from tests.support.text_examples import random_texts
from workers.training.policy import PolicyWorker, with_room_for_texts
from workers.training.pretraining_text import text_parts

COEFFICIENT = 0.7
Gradient = dict[str, torch.Tensor]


def settings(
    coefficient: float = COEFFICIENT, algorithm: dict[str, Any] | None = None, **policy: Any
) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "tiny"},
            "generation": {"dtype": "float32"},
            "policy": {
                "compute_dtype": "float32",
                "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1, "eps": 1e-2},
                **policy,
            },
            "algorithm": algorithm or {},
            "ptx": {"coefficient": coefficient, "train": "synthetic"},
        }
    )


@pytest.fixture
def workers() -> Iterator[list[PolicyWorker]]:
    """The worker of the test, which `made` adds; it leaves its group at the end."""
    found: list[PolicyWorker] = []
    yield found
    for worker in found:
        worker.shutdown()
    assert not dist.is_initialized()


def made(workers: list[PolicyWorker], config: RunConfig) -> PolicyWorker:
    for old in workers:
        old.shutdown()
    worker = PolicyWorker(config, str(resolve_model("tiny")), 0, 1)
    worker.setup(worker.rendezvous())
    workers[:] = [worker]
    return worker


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


class Gradients:
    """The gradients of all optimizer steps of a worker, and no step."""

    def __init__(self, worker: PolicyWorker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[Gradient] = []
        backend: Any = worker.backend

        def step(learning_rate: float) -> float:
            gradient = {
                name: whole(gradient_of(parameter))
                for name, parameter in backend.module.model.named_parameters()
            }
            self.found.append(gradient)
            backend.optimizer.zero_grad()
            return math.sqrt(sum(float((g**2).sum()) for g in gradient.values()))

        monkeypatch.setattr(backend, "step", step)


def assert_close(left: Gradient, right: Gradient, tolerance: float = 1e-5) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.allclose(tensor, right[name], atol=tolerance, rtol=1e-4), name


def plus(left: Gradient, right: Gradient) -> Gradient:
    return {name: tensor + right[name] for name, tensor in left.items()}


def batch(*, temperature: float = 1.0) -> TrainBatch:
    """Return 4 groups of 3 responses; all responses of a group have one advantage."""
    rollouts = replace(random_rollouts(3, groups=4, samples=3), temperature=temperature)
    of_response = np.random.default_rng(1).normal(size=len(rollouts)).astype(np.float32)
    advantages = np.repeat(of_response, rollouts.sequence_lengths) * rollouts.response_mask
    rng = np.random.default_rng(2)
    return TrainBatch(
        rollouts=rollouts,
        rewards=rewards_of(rollouts),
        advantages=advantages,
        old_logprobs=-rng.random(len(rollouts.token_ids)).astype(np.float32) - 5.0,
    )


def by_whole_logits(texts: ExampleBatch, rows: list[int]) -> tuple[float, Gradient]:
    """Return loss per token and gradient of the texts, one by one, from the model's own logits."""
    model = load_causal_lm(resolve_model("tiny"), dtype=torch.float32, attention="eager")
    model.requires_grad_(True)
    losses, count = [], 0
    sequences = texts.sequences
    for row in rows:
        start, stop = sequences.offsets[row], sequences.offsets[row + 1]
        tokens = torch.from_numpy(sequences.token_ids[start:stop].astype(np.int64))
        logits = model(tokens[None]).logits[0]
        losses.append(F.cross_entropy(logits[:-1], tokens[1:], reduction="sum"))
        count += len(tokens) - 1

    loss = torch.stack(losses).sum() / count
    loss.backward()
    gradient = {name: gradient_of(parameter) for name, parameter in model.named_parameters()}
    return float(loss.detach()), gradient


def scaled(gradient: Gradient, factor: float) -> Gradient:
    return {name: factor * tensor for name, tensor in gradient.items()}


@pytest.mark.parametrize("microbatch_tokens", [10_000, 25])
@pytest.mark.parametrize("packing", ["auto", False])
def test_the_gradient_is_that_of_the_responses_plus_that_of_the_texts(
    microbatch_tokens: int,
    packing: Any,
    workers: list[PolicyWorker],
    monkeypatch: pytest.MonkeyPatch,
):
    """The responses are sampled at another temperature, which must not change the texts."""
    config = settings(microbatch_tokens=microbatch_tokens, packing=packing)
    worker = made(workers, config)
    steps = Gradients(worker, monkeypatch)
    train, texts = batch(temperature=0.7), random_texts(9)

    without = worker.update(train)
    report = worker.update(train, (), texts)
    responses, both = steps.found
    expected_loss, of_texts = by_whole_logits(texts, list(range(9)))
    assert_close(both, plus(responses, scaled(of_texts, COEFFICIENT)))
    largest = max(float(tensor.abs().max()) for tensor in of_texts.values())
    assert largest > 1e-2, "the tolerance is far below the gradient"

    assert report["policy/ptx_loss"].value == pytest.approx(expected_loss, abs=1e-5)
    assert report["policy/ptx_tokens"].value == texts.sequences.num_loss_tokens
    assert report["policy/loss"] == without["policy/loss"]
    norm = math.sqrt(sum(float((tensor**2).sum()) for tensor in both.values()))
    assert report["policy/grad_norm"].value == pytest.approx(norm, rel=1e-6)
    assert not {"policy/ptx_loss", "policy/ptx_tokens"} & without.keys()


@pytest.mark.parametrize(
    "algorithm",
    [
        {"aggregation": "constant", "entropy": {"bonus": 0.1}},
        {"aggregation": "sequence_sum", "objective": {"ratio": "sequence", "weight": "cispo"}},
        {"kl": {"coefficient": 0.3}},
        {
            "advantage": {
                "name": "hierarchical",
                "recompute": True,
                "parameters": {"solver": "network"},
            },
            "objective": {"weight": "none"},
        },
    ],
    ids=["constant", "gspo", "kl", "recompute"],
)
def test_the_text_adds_the_same_gradient_to_every_objective(
    algorithm: dict[str, Any], workers: list[PolicyWorker], monkeypatch: pytest.MonkeyPatch
):
    train, texts = batch(), random_texts(6)
    data: Any = train
    if "kl" in algorithm:
        data = replace(train, ref_logprobs=train.old_logprobs, kl_coefficient=0.3)
    if "advantage" in algorithm:
        data = ScoredBatch(rollouts=train.rollouts, rewards=train.rewards)
    # A new worker for each: the baseline network of `recompute` learns in an update.
    worker = made(workers, settings(algorithm=algorithm))
    without = Gradients(worker, monkeypatch)
    worker.update(data)
    worker = made(workers, settings(algorithm=algorithm))
    both = Gradients(worker, monkeypatch)
    worker.update(data, (), texts)
    expected = scaled(by_whole_logits(texts, list(range(6)))[1], COEFFICIENT)
    assert_close(both.found[0], plus(without.found[0], expected))


def test_texts_have_no_kl_over_the_vocabulary(
    workers: list[PolicyWorker], monkeypatch: pytest.MonkeyPatch
):
    """The reference's hidden states belong to the responses. Here they are random."""
    algorithm = {"kl": {"coefficient": 0.3, "kind": "exact"}}
    worker = made(workers, settings(algorithm=algorithm))
    worker.load_reference_head(str(resolve_model("tiny")))
    steps = Gradients(worker, monkeypatch)
    train, texts = batch(), random_texts(6)
    train = replace(train, ref_logprobs=train.old_logprobs, kl_coefficient=0.3)
    positions = np.flatnonzero(train.rollouts.response_mask)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(len(positions), worker.backend.module.hidden_size, generator=generator)
    hidden = HiddenStates.of(train.batch_id, positions, states)

    reports = []
    for arguments in ((), (texts,)):
        worker.ref_hidden = JoinedStates([hidden], len(train.rollouts.token_ids))
        reports.append(worker.update(train, (), *arguments))
    expected = scaled(by_whole_logits(texts, list(range(6)))[1], COEFFICIENT)
    assert_close(steps.found[1], plus(steps.found[0], expected))
    first, second = (report["policy/kl_ref_exact"].value for report in reports)
    assert first == second > 0


def test_each_optimizer_step_gets_its_part_of_the_texts_with_its_own_denominator(
    workers: list[PolicyWorker], monkeypatch: pytest.MonkeyPatch
):
    """Two epochs of two mini-batches, 10 texts: 3, 3, 2 and 2 of them."""
    worker = made(workers, settings(num_mini_batches=2, epochs=2))
    steps = Gradients(worker, monkeypatch)
    train, texts = batch(), random_texts(10)
    worker.update(train)
    report = worker.update(train, (), texts)
    assert len(steps.found) == 8
    for step, rows in enumerate([[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]):
        expected = scaled(by_whole_logits(texts, rows)[1], COEFFICIENT)
        assert_close(steps.found[4 + step], plus(steps.found[step], expected))
    assert report["policy/ptx_tokens"].value == texts.sequences.num_loss_tokens
    loss, _ = by_whole_logits(texts, list(range(10)))
    assert report["policy/ptx_loss"].value == pytest.approx(loss, abs=1e-5)


def test_texts_are_learned_where_no_response_has_a_gradient(
    workers: list[PolicyWorker], monkeypatch: pytest.MonkeyPatch
):
    """All advantages are 0; or no response is trained, which without texts skips the step."""
    worker = made(workers, settings())
    steps = Gradients(worker, monkeypatch)
    train, texts = batch(), random_texts(5)
    zero = replace(train, advantages=np.zeros_like(train.advantages))
    untrained = replace(train, trained=np.zeros(len(train.rollouts), dtype=np.bool_))

    expected = scaled(by_whole_logits(texts, list(range(5)))[1], COEFFICIENT)
    worker.update(zero, (), texts)
    report = worker.update(untrained, (), texts)
    assert len(steps.found) == 2
    for found in steps.found:
        assert_close(found, expected)
    assert report["policy/updates"].value == 1
    assert report["policy/skipped_updates"].value == 0

    skipped = worker.update(untrained)
    assert len(steps.found) == 2
    assert skipped["policy/updates"].value == 0
    assert skipped["policy/skipped_updates"].value == 1


def weights_after(worker: PolicyWorker, *arguments: Any) -> Gradient:
    worker.update(*arguments)
    return {name: tensor.clone() for name, tensor in worker.backend.weights()}


def test_a_coefficient_of_zero_moves_the_weights_to_the_bit_as_no_text(
    workers: list[PolicyWorker],
):
    without = weights_after(made(workers, settings(0.0)), batch())
    zero = weights_after(made(workers, settings(0.0)), batch(), (), random_texts(6))
    with_texts = weights_after(made(workers, settings(1.0)), batch(), (), random_texts(6))
    assert all(torch.equal(tensor, zero[name]) for name, tensor in without.items())
    moved = max(float((with_texts[name] - without[name]).abs().max()) for name in without)
    assert moved > 1e-4


def test_a_step_of_texts_alone_is_a_step_of_the_optimizer(workers: list[PolicyWorker]):
    """Weights, schedule and the loss of the texts move."""
    worker = made(workers, settings(1.0))
    texts = random_texts(8)
    before = worker.text_loss(texts)["eval/text_loss"].value
    untrained = replace(batch(), trained=np.zeros(12, dtype=np.bool_))
    for _ in range(5):
        worker.update(untrained, (), texts)
    assert worker.steps.completed == 5
    assert worker.text_loss(texts)["eval/text_loss"].value < before - 0.01


def test_the_held_out_loss_is_the_mean_over_tokens(workers: list[PolicyWorker]):
    worker = made(workers, settings(microbatch_tokens=25))
    texts = random_texts(7, seed=4)
    metric = worker.text_loss(texts)["eval/text_loss"]
    expected, _ = by_whole_logits(texts, list(range(7)))
    assert metric.value == pytest.approx(expected, abs=1e-5)
    assert metric.count == texts.sequences.num_loss_tokens


@pytest.mark.parametrize(("count", "updates"), [(7, 3), (8, 4), (5, 5), (9, 1)])
def test_parts_hold_each_text_once_and_are_as_large(count: int, updates: int):
    texts = random_texts(count)
    parts = [part for part in text_parts(texts, updates) if part is not None]
    assert np.concatenate([part.rows for part in parts]).tolist() == list(range(count))
    sizes = [len(part.rows) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sum(part.sizes.num_tokens for part in parts) == texts.sequences.num_loss_tokens
    assert list(text_parts(None, updates)) == [None] * updates


def test_the_forward_pass_is_checked_at_the_length_of_the_texts():
    base = settings()
    longest = base.data.max_prompt_tokens + base.generation.max_tokens
    assert with_room_for_texts(base) is base
    longer = base.model_copy(update={"ptx": base.ptx.model_copy(update={"max_tokens": 4000})})
    assert longest < 4001
    room = with_room_for_texts(longer)
    assert room.data.max_prompt_tokens + room.generation.max_tokens == 4001
