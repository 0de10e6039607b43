"""A rank that learns its own correct responses: passes, schedule, empty steps, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from rlsys.config.expert_iteration import ExpertIterationRunConfig
from rlsys.data.epoch_order import mini_batches
from rlsys.data.example_stream import ExampleBatch
from rlsys.metrics import values
from rlsys.models import resolve_model
from tests.support.rollout_examples import random_rollouts
from workers.training.expert_iteration import ExpertIterationWorker

SEED = 5


def config(**expert: Any) -> ExpertIterationRunConfig:
    optimizer = {"learning_rate": 3e-3, "schedule": "linear", "max_grad_norm": 0}
    return ExpertIterationRunConfig.model_validate(
        {
            "model": {"path": "tiny"},
            "data": {"max_prompt_tokens": 16},
            "generation": {"max_tokens": 16, "engine": "transformers", "dtype": "float32"},
            "expert": expert,
            "policy": {"compute_dtype": "float32", "optimizer": optimizer},
            "trainer": {"steps": 4, "seed": SEED},
        }
    )


@contextmanager
def started(settings: ExpertIterationRunConfig) -> Iterator[ExpertIterationWorker]:
    """Start a rank that is alone, in this process."""
    worker = ExpertIterationWorker(settings, str(resolve_model("tiny")), 0, 1)
    worker.setup(worker.rendezvous())
    yield worker
    worker.shutdown()


def kept(seed: int = 0, batch_id: int = 0) -> ExampleBatch:
    """Return 12 responses to 4 problems."""
    sequences = random_rollouts(seed).sequences
    ranks = np.zeros(len(sequences), dtype=np.int64)
    return ExampleBatch(batch_id=batch_id, sequences=sequences, ranks=ranks)


def nothing() -> ExampleBatch:
    batch = kept()
    none = np.zeros(0, dtype=np.int64)
    return ExampleBatch(batch_id=0, sequences=batch.sequences.take(none), ranks=none)


def numbers(report: Any) -> dict[str, float]:
    """Return what does not depend on the process."""
    plain = values(report)
    return {name: value for name, value in plain.items() if not name.startswith("memory/")}


def slow_losses(model: Any, batch: ExampleBatch, rows: NDArray[np.int64]) -> torch.Tensor:
    """Return the negative log-likelihoods of all response tokens, one sequence at a time."""
    losses = []
    for row in rows:
        start, end = batch.sequences.offsets[row : row + 2]
        tokens = torch.from_numpy(batch.sequences.token_ids[start:end].astype(np.int64))
        logits = model(input_ids=tokens[None]).logits[0, :-1].float()
        own = logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
        losses.append(-own[int(batch.sequences.prompt_lengths[row]) - 1 :])
    return torch.cat(losses)


def test_the_updates_are_those_of_a_plain_training_loop():
    """AdamW on an unpacked transformers model, over the same mini-batches, in float32."""
    batch, settings = kept(), config(epochs=2, examples_per_update=5)
    model = AutoModelForCausalLM.from_pretrained(resolve_model("tiny"), dtype=torch.float32).eval()
    twin = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0)

    updates = list(mini_batches(12, size=5, epochs=2, seed=(SEED, 0)))
    assert len(updates) == 6
    expected = []
    for number, rows in enumerate(updates):
        # Linear over 4 steps, of which this is the first: x = number / 6 / 4.
        twin.param_groups[0]["lr"] = 3e-3 * (1 - number / 24)
        loss = slow_losses(model, batch, rows).mean()
        twin.zero_grad()
        loss.backward()
        twin.step()
        expected.append(float(loss))

    with started(settings) as worker:
        report = numbers(worker.update(batch))
        after = numbers(worker.evaluate(batch))
    assert report["policy/loss"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert report["policy/updates"] == 6
    assert report["policy/tokens"] == 2 * batch.sequences.num_loss_tokens
    assert report["policy/learning_rate"] == pytest.approx(3e-3 * (1 - 5 / 24))
    with torch.no_grad():
        final = float(slow_losses(model, batch, np.arange(12)).mean())
    assert final < expected[0] - 0.5
    assert after["eval/loss"] == pytest.approx(final, abs=1e-3)


def test_an_empty_step_changes_nothing_and_counts():
    with started(config()) as worker:
        before = numbers(worker.evaluate(kept()))
        report = numbers(worker.update(nothing()))
        after = numbers(worker.evaluate(kept()))
        assert worker.steps.completed == 1
    assert before == after
    assert report == {
        "policy/learning_rate": pytest.approx(3e-3),
        "policy/updates": 0,
        "policy/skipped_updates": 1,
        "policy/nonfinite_gradients": 0,
    }


def test_a_resumed_rank_continues_to_the_same_numbers(tmp_path: Path):
    settings = config(epochs=2, examples_per_update=4)
    batches = [kept(seed, batch_id=seed) for seed in range(3)]
    with started(settings) as worker:
        whole = [numbers(worker.update(batch)) for batch in batches]
    with started(settings) as worker:
        worker.update(batches[0])
        worker.save(str(tmp_path))
    with started(settings) as worker:
        worker.load(str(tmp_path))
        rest = [numbers(worker.update(batch)) for batch in batches[1:]]
    assert rest == [pytest.approx(values, abs=1e-6) for values in whole[1:]]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_the_loss_does_not_depend_on_packing(aggregation: str):
    losses = []
    for policy in ({"microbatch_tokens": 4096}, {"microbatch_tokens": 24}, {"packing": False}):
        tree = config(examples_per_update=12).model_dump()
        tree["policy"] |= policy
        tree["objective"]["aggregation"] = aggregation
        with started(ExpertIterationRunConfig.model_validate(tree)) as worker:
            report = numbers(worker.update(kept()))
            losses.append((report["policy/loss"], report["policy/grad_norm"]))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5, rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5, rel=1e-4)


def test_a_mean_over_sequences_counts_each_response_once():
    batch, tree = kept(), config(examples_per_update=12).model_dump()
    tree["objective"]["aggregation"] = "sequence_mean"
    model = AutoModelForCausalLM.from_pretrained(resolve_model("tiny"), dtype=torch.float32).eval()
    with torch.no_grad():
        means = [float(slow_losses(model, batch, np.array([row])).mean()) for row in range(12)]
    with started(ExpertIterationRunConfig.model_validate(tree)) as worker:
        report = numbers(worker.update(batch))
    assert report["policy/loss"] == pytest.approx(np.mean(means), abs=1e-4)
