"""The contract of the training backends: each of them trains like one process without any.

The reference runs each sequence by itself through the model of transformers, differentiates with
autograd, clips with torch, and takes torch's AdamW.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlsys.models import resolve_model
from rlsys.models.loading import load_causal_lm
from tests.support.backend_ranks import (
    ENTROPY_BONUS,
    GRADIENT,
    OPTIMIZER,
    BackendRanks,
    Case,
    Trained,
    example,
    first_weights,
    one_gradient,
    refusal,
    saved_and_continued,
    trained,
    with_broken_step,
)
from tests.support.golden_runs import run_preset
from workers.training.weight_decay import parameter_groups

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

CASES = [
    Case(backend="fsdp2"),
    Case(zero_stage=1),
    Case(zero_stage=2),
    Case(zero_stage=3),
]
each_backend = pytest.mark.parametrize("case", CASES, ids=["fsdp2", "zero1", "zero2", "zero3"])
each_group = pytest.mark.parametrize("ranks", [1, 2])


@pytest.fixture(scope="module")
def groups(ray_cluster: None) -> Iterator[BackendRanks]:
    processes = BackendRanks()
    yield processes
    processes.kill()


class Reference:
    """The tiny model in float32, without a backend."""

    def __init__(self, *, clips: bool = True) -> None:
        self.model = load_causal_lm(resolve_model("tiny"), dtype=torch.float32, attention="eager")
        self.limit = OPTIMIZER["max_grad_norm"] if clips else torch.inf
        groups = parameter_groups(self.model.named_parameters(), OPTIMIZER["weight_decay"])
        self.optimizer = torch.optim.AdamW(
            groups, lr=OPTIMIZER["learning_rate"], betas=(0.9, 0.95), eps=OPTIMIZER["eps"]
        )

    def run(self) -> tuple[Tensor, Tensor]:
        """Return [N] the log-probabilities of the sampled tokens, and the loss."""
        batch, advantages = example()
        rows = []
        for row in np.split(batch.token_ids, batch.sequence_offsets[1:-1]):
            tokens = torch.from_numpy(row.astype(np.int64))
            logs = self.model(tokens[None]).logits[0, :-1].log_softmax(-1)
            chosen = logs.gather(1, tokens[1:, None])[:, 0]
            entropy = -(logs.exp() * logs).sum(-1)
            rows.append(nn.functional.pad(torch.stack([chosen, entropy]), (1, 0)))

        mask = torch.from_numpy(batch.response_mask)
        logprobs, entropies = torch.cat(rows, dim=1) * mask
        gains = logprobs * torch.from_numpy(advantages) + ENTROPY_BONUS * entropies
        return logprobs, -gains.sum() / mask.sum()

    def gradient(self) -> dict[str, Tensor]:
        """Return the gradient of the loss."""
        _, loss = self.run()
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))

    def trained(self, steps: int = 5) -> Trained:
        """Take a few steps."""
        first, losses, norms = None, [], []
        for _ in range(steps):
            self.optimizer.zero_grad()
            logprobs, loss = self.run()
            first = logprobs.detach() if first is None else first
            loss.backward()
            norms.append(float(nn.utils.clip_grad_norm_(self.model.parameters(), self.limit)))
            losses.append(float(loss.detach()))
            self.optimizer.step()

        assert first is not None
        weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        return Trained(first.numpy(), losses, norms, weights)


@pytest.fixture(scope="module")
def reference() -> Trained:
    return Reference().trained()


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert set(first) == set(second)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_the_reference_clips_and_moves(reference: Trained):
    """Show that the other tests would see a backend that does not clip, or does not step."""
    start = load_file(resolve_model("tiny") / "model.safetensors")
    assert min(reference.norms) > 1.5 * OPTIMIZER["max_grad_norm"]
    assert largest_difference(reference.weights, Reference(clips=False).trained().weights) > 1e-4
    assert largest_difference(reference.weights, start) > 1e-3


@each_group
@each_backend
def test_five_updates_equal_those_without_a_backend(
    case: Case, ranks: int, groups: BackendRanks, reference: Trained
):
    """Run one pack on one rank, and many small ones on two."""
    case = replace(case, budget=4096 if ranks == 1 else 50)
    result, *others = groups.run(ranks, trained, case)

    np.testing.assert_allclose(result.logprobs, reference.logprobs, atol=1e-5)
    np.testing.assert_allclose(result.losses, reference.losses, atol=1e-5)
    np.testing.assert_allclose(result.norms, reference.norms, rtol=1e-4)
    assert largest_difference(result.weights, reference.weights) < 1e-5
    for other in others:
        assert other.norms == result.norms
        assert other.weights == {}


@each_group
@each_backend
def test_gradients_equal_those_without_a_backend(case: Case, ranks: int, groups: BackendRanks):
    case = replace(case, budget=50, optimizer=GRADIENT)
    before, after = groups.run(ranks, one_gradient, case)[0]

    expected = Reference().gradient()
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-2
    for name, gradient in expected.items():
        step = (before[name] - after[name]).double()
        found = step / (1 - step.abs())
        assert float((found - gradient).abs().max()) < 1e-6, name


@each_backend
@pytest.mark.parametrize(
    "plan",
    [
        {"packing": False, "budget": 50},
        {"shared_prefix": False, "budget": 64},
        {"gradient_checkpointing": True, "budget": 50},
    ],
    ids=["padded", "prompts not shared", "recomputed"],
)
def test_packing_and_recomputation_change_nothing(
    case: Case, plan: dict[str, object], groups: BackendRanks
):
    changed = groups.run(2, trained, replace(case, **plan), 2)[0]
    expected = Reference().trained(2)
    np.testing.assert_allclose(changed.losses, expected.losses, atol=1e-5)
    assert largest_difference(changed.weights, expected.weights) < 1e-5


@each_backend
def test_a_gradient_that_is_not_finite_is_skipped_on_all_ranks(case: Case, groups: BackendRanks):
    """Break the gradient of one rank: no rank steps, and the next step is as if nothing was."""
    results = groups.run(2, with_broken_step, replace(case, budget=50))
    for norms, _ in results:
        assert np.isfinite(norms[0])
        assert not np.isfinite(norms[1])
        assert np.isfinite(norms[2])

    _, (first, second, third) = results[0]
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    assert largest_difference(third, Reference().trained(2).weights) < 1e-5


@each_group
@each_backend
def test_a_checkpoint_continues_exactly(
    case: Case, ranks: int, groups: BackendRanks, tmp_path: Path
):
    straight, resumed = groups.run(ranks, saved_and_continued, replace(case, budget=50), tmp_path)[
        0
    ]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())

    # The checkpoint is a Hugging Face directory with the weights after the third step.
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = Reference().trained(3).weights
    assert largest_difference(dict(model.named_parameters()), expected) < 1e-5


def test_a_checkpoint_of_another_stage_or_backend_is_refused(groups: BackendRanks, tmp_path: Path):
    for name, case in (("second", Case(zero_stage=2)), ("other", Case(backend="fsdp2"))):
        (tmp_path / name).mkdir()
        groups.run(1, saved_and_continued, case, tmp_path / name)
    (stage,) = groups.run(1, refusal, Case(zero_stage=3), tmp_path / "second")
    (other,) = groups.run(1, refusal, Case(zero_stage=3), tmp_path / "other")
    assert "was saved with zero_stage 2, now it is 3" in stage
    assert "was saved with another backend" in other


@each_backend
def test_frozen_models_and_bfloat16_start_with_the_weights_of_the_file(
    case: Case, groups: BackendRanks, reference: Trained
):
    """Masters are float32 whatever the compute dtype; a frozen model is stored in that dtype.

    Its log-probabilities differ by less than 0.01 from those in float32.
    """
    file = load_file(resolve_model("tiny") / "model.safetensors")
    (logprobs, weights), (same, nothing) = groups.run(2, first_weights, case, True)
    np.testing.assert_allclose(logprobs, reference.logprobs, atol=1e-5)
    np.testing.assert_array_equal(same, logprobs)
    assert largest_difference(weights, file) == 0
    assert nothing == {}

    low = replace(case, compute_dtype="bfloat16")
    for frozen in (True, False):
        logprobs, weights = groups.run(2, first_weights, low, frozen)[0]
        np.testing.assert_allclose(logprobs, reference.logprobs, atol=0.01)
        assert np.abs(logprobs - reference.logprobs).max() > 1e-4
        stored = {name: t.bfloat16() if frozen else t for name, t in file.items()}
        assert largest_difference(weights, stored) == 0


@each_group
@each_backend
def test_updates_in_bfloat16_are_near_those_in_float32(
    case: Case, ranks: int, groups: BackendRanks, reference: Trained
):
    """Bounds: 1 % of the norm, and a tenth of the way that the weights moved, in root mean square.

    Masters that were rounded to bfloat16 would be off by more than the way.
    """
    low = replace(case, compute_dtype="bfloat16", budget=50)
    result = groups.run(ranks, trained, low)[0]
    start = load_file(resolve_model("tiny") / "model.safetensors")

    np.testing.assert_allclose(result.norms, reference.norms, rtol=0.01)
    np.testing.assert_allclose(result.losses, reference.losses, atol=2e-3)
    way = error = 0.0
    for name, expected in reference.weights.items():
        way += float((expected - start[name]).square().sum())
        error += float((result.weights[name] - expected).square().sum())
    assert error**0.5 < 0.1 * way**0.5


@pytest.fixture
def own_logging() -> Iterator[None]:
    """Restore pytest's log handlers, which a run replaces by those of its directory."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("own_logging")
def test_ppo_with_a_reference_trains_to_the_numbers_on_record(tmp_path: Path):
    """Train policy and critic with ZeRO 3, beside a reference; the numbers are those of FSDP2."""
    changes = {"policy.backend": "deepspeed", "policy.deepspeed.zero_stage": 3}
    found = run_preset("ppo_kl_penalty", tmp_path / "run", changes)

    expected = json.loads((GOLDEN / "ppo_kl_penalty.json").read_text())
    assert sorted(found) == sorted(expected)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-3, abs=1e-4), name
