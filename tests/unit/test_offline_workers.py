"""Ranks that learn from examples: they learn, save, and continue as if uninterrupted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from rlsys.config.offline import (
    OfflineRunConfig,
    PreferenceRunConfig,
    ProcessRewardModelRunConfig,
    RewardModelRunConfig,
    SupervisedRunConfig,
)
from rlsys.data.example_stream import ExampleBatch, ReferenceLogprobs
from rlsys.metrics import Metric, values
from rlsys.models import resolve_model
from rlsys.models.value_models import check_reward_head
from tests.support.example_batches import random_examples, random_steps
from workers.training.offline import (
    ExampleReferenceWorker,
    OfflineWorker,
    PreferenceWorker,
    ProcessRewardModelWorker,
    RewardModelWorker,
    SupervisedWorker,
)

OPTIMIZER = {"learning_rate": 3e-3, "schedule": "cosine", "max_grad_norm": 0.5}
ROLE = {"compute_dtype": "float32", "optimizer": OPTIMIZER}
COMMON: dict[str, Any] = {
    "model": {"path": "tiny"},
    "data": {"max_prompt_tokens": 16, "max_response_tokens": 16},
    "trainer": {"steps": 12},
}


def supervised() -> SupervisedRunConfig:
    return SupervisedRunConfig.model_validate({**COMMON, "policy": ROLE})


def preferences(**objective: Any) -> PreferenceRunConfig:
    return PreferenceRunConfig.model_validate({**COMMON, "policy": ROLE, "objective": objective})


def reward_model(**objective: Any) -> RewardModelRunConfig:
    return RewardModelRunConfig.model_validate(
        {**COMMON, "reward_model": ROLE, "objective": objective}
    )


def process_reward_model(**role: Any) -> ProcessRewardModelRunConfig:
    return ProcessRewardModelRunConfig.model_validate({**COMMON, "reward_model": ROLE | role})


@contextmanager
def started(kind: Any, config: OfflineRunConfig, directory: str = "tiny") -> Iterator[Any]:
    """Start a rank that is alone, in this process."""
    worker = kind(config, str(resolve_model(directory)), 0, 1)
    worker.setup(worker.rendezvous())
    yield worker
    worker.shutdown()


def update(
    worker: OfflineWorker, batch: ExampleBatch, *reference: ReferenceLogprobs
) -> dict[str, float]:
    return values(worker.update(batch, *reference))


def numbers(report: dict[str, Metric] | dict[str, float]) -> dict[str, float]:
    """Return what does not depend on the process."""
    plain = {
        name: value.value if isinstance(value, Metric) else value for name, value in report.items()
    }
    return {name: value for name, value in plain.items() if not name.startswith("memory/")}


def test_demonstrations_are_learned_and_the_checkpoint_is_a_hugging_face_model(tmp_path: Path):
    batch = random_examples((1,) * 6)
    with started(SupervisedWorker, supervised()) as worker:
        before = values(worker.evaluate(batch))["eval/loss"]
        steps = [update(worker, batch) for _ in range(8)]
        after = values(worker.evaluate(batch))["eval/loss"]
        worker.save(str(tmp_path))

    assert steps[0]["policy/loss"] == pytest.approx(before, abs=1e-5)
    assert after < before - 1
    assert steps[0]["policy/tokens"] == batch.sequences.num_loss_tokens
    # Cosine over 12 steps: the first has the peak.
    assert steps[0]["policy/learning_rate"] == pytest.approx(3e-3)
    assert steps[7]["policy/learning_rate"] < steps[6]["policy/learning_rate"]

    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    sequences, losses = batch.sequences, []
    for row in range(len(batch)):
        start, stop = sequences.offsets[row : row + 2]
        tokens = torch.from_numpy(sequences.token_ids[start:stop].astype(np.int64))
        with torch.no_grad():
            logprobs = model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
        own = logprobs.gather(-1, tokens[1:, None])[:, 0]
        losses.append(-own[torch.from_numpy(sequences.loss_mask[start + 1 : stop])])
    assert float(torch.cat(losses).mean()) == pytest.approx(after, abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "config", "counts"),
    [
        (SupervisedWorker, supervised(), (1,) * 4),
        (RewardModelWorker, reward_model(), (2, 3, 2, 4)),
    ],
)
def test_a_resumed_rank_continues_to_the_same_numbers(
    kind: Any, config: OfflineRunConfig, counts: tuple[int, ...], tmp_path: Path
):
    batches = [random_examples(counts, seed) for seed in range(4)]
    with started(kind, config) as worker:
        whole = [numbers(update(worker, batch)) for batch in batches]

    with started(kind, config) as worker:
        for batch in batches[:2]:
            worker.update(batch)
        worker.save(str(tmp_path))
    with started(kind, config) as worker:
        worker.load(str(tmp_path))
        continued = [numbers(update(worker, batch)) for batch in batches[2:]]
    assert continued == whole[2:]


def reference_of(batch: ExampleBatch) -> ReferenceLogprobs:
    with started(ExampleReferenceWorker, preferences()) as reference:
        return reference.example_logprobs(batch)


@pytest.mark.parametrize("objective", [{}, {"kind": "ipo"}, {"length_normalized": True}])
def test_preferences_are_learned_from_the_reference_on(objective: dict[str, Any]):
    batch = random_examples((2,) * 6)
    reference = reference_of(batch)
    assert sorted(reference.rows.tolist()) == list(range(12))
    assert (reference.logprobs < 0).all()

    with started(PreferenceWorker, preferences(**objective)) as worker:
        first = values(worker.evaluate(batch, reference))
        for _ in range(6):
            worker.update(batch, reference)
        last = values(worker.evaluate(batch, reference))

    # The policy is still the reference: no margin, and log 2 or (1 / (2 beta))^2.
    start = 25.0 if objective.get("kind") == "ipo" else float(np.log(2))
    assert first["eval/loss"] == pytest.approx(start, rel=1e-4)
    assert first["eval/preference_margin"] == pytest.approx(0, abs=1e-4)
    assert last["eval/loss"] < first["eval/loss"]
    assert last["eval/preference_margin"] > 0.01
    assert last["eval/preference_accuracy"] == 1
    rewards = last["eval/preference_chosen_reward"] - last["eval/preference_rejected_reward"]
    assert rewards == pytest.approx(last["eval/preference_margin"], abs=1e-5)


@pytest.mark.parametrize("kind", ["pairwise", "plackett_luce"])
def test_a_reward_model_learns_rankings_and_loads_in_transformers(kind: str, tmp_path: Path):
    batch = random_examples((2, 4, 3, 2, 4))
    with started(RewardModelWorker, reward_model(kind=kind)) as worker:
        first = values(worker.evaluate(batch))
        for _ in range(10):
            worker.update(batch)
        last = values(worker.evaluate(batch))
        worker.keep_reward_mean(last["eval/reward_mean"])
        worker.save(str(tmp_path))

    assert last["eval/calibration/observed_at_95"] > 0.9
    assert last["eval/ranking_accuracy"] > 0.9
    assert last["eval/loss"] < first["eval/loss"]

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.config.num_labels == 1
    sequences, rewards = batch.sequences, []
    for row in range(len(batch)):
        start, stop = sequences.offsets[row : row + 2]
        tokens = torch.from_numpy(sequences.token_ids[start:stop].astype(np.int64))
        with torch.no_grad():
            rewards.append(float(model(input_ids=tokens[None]).logits[0, 0]))
    facts = json.loads((tmp_path / "config.json").read_text())
    assert float(np.mean(rewards)) == pytest.approx(last["eval/reward_mean"], abs=1e-4)
    assert facts["reward_mean"] == pytest.approx(last["eval/reward_mean"])


def test_a_checkpoint_tells_what_its_values_are_and_inherits_no_mean_reward(tmp_path: Path):
    def facts(name: str) -> dict[str, Any]:
        return json.loads((tmp_path / name / "config.json").read_text())

    with started(RewardModelWorker, reward_model()) as worker:
        worker.keep_reward_mean(0.5)
        worker.save(str(tmp_path / "first"))
    assert facts("first")["reward_mean"] == 0.5
    assert facts("first")["value_role"] == "reward_model"
    check_reward_head(tmp_path / "first")

    # The mean of the first model is not that of one that starts from it and was not evaluated.
    first = str(tmp_path / "first")
    with started(RewardModelWorker, reward_model(), first) as worker:
        worker.save(str(tmp_path / "second"))
    assert facts("second")["reward_mean"] is None

    # A model keeps the layout of the head that it starts with.
    with started(ProcessRewardModelWorker, process_reward_model(), first) as worker:
        worker.save(str(tmp_path / "steps"))
    assert facts("steps")["architectures"] == ["LlamaForSequenceClassification"]
    with pytest.raises(ValueError, match="it is a process reward model"):
        check_reward_head(tmp_path / "steps")


def test_a_process_reward_model_learns_steps_and_loads_in_transformers(tmp_path: Path):
    batch = random_steps(6)
    with started(ProcessRewardModelWorker, process_reward_model()) as worker:
        first = values(worker.evaluate(batch))
        steps = [update(worker, batch) for _ in range(10)]
        last = values(worker.evaluate(batch))
        worker.save(str(tmp_path))

    labels = batch.step_labels
    assert labels is not None
    assert first["eval/right_step_fraction"] == pytest.approx((labels[labels >= 0] == 1).mean())
    assert steps[0]["reward_model/loss"] == pytest.approx(first["eval/loss"], abs=1e-6)
    assert last["eval/step_accuracy"] > 0.9

    # The logit of transformers at the last token of a step, one response at a time.
    model = AutoModelForTokenClassification.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.config.num_labels == 1
    losses = []
    for row in range(len(batch)):
        start, stop = batch.sequences.offsets[row : row + 2]
        tokens = torch.from_numpy(batch.sequences.token_ids[start:stop].astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0, :, 0].double().numpy()
        for logit, label in zip(logits, labels[start:stop], strict=True):
            if label >= 0:
                losses.append(np.log1p(np.exp(-logit if label else logit)))
    assert float(np.mean(losses)) == pytest.approx(last["eval/loss"], abs=1e-4)


def test_the_loss_of_steps_does_not_depend_on_the_packs():
    batch = random_steps(7, seed=2)
    found = []
    for role in ({}, {"microbatch_tokens": 24}, {"packing": False}):
        with started(ProcessRewardModelWorker, process_reward_model(**role)) as worker:
            found.append([update(worker, batch)["reward_model/loss"] for _ in range(4)])
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-5)
