"""The critic's rank: its update is the plain one however it is packed, and it resumes exactly."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlsys.config import RunConfig
from rlsys.data.batches import ValueBatch
from rlsys.metrics import values
from rlsys.models import resolve_model
from rlsys.models.loading import UnsupportedModelError
from rlsys.models.value_models import load_value_model
from tests.support.architectures import ARCHITECTURES, save_tiny_model
from tests.support.critic_examples import critic_config, example, plainly_updated
from workers.training.critic import CriticWorker
from workers.training.losses import Denominators, PackColumns
from workers.training.packed_value_model import ValueResult
from workers.training.value_loss import ValueLoss


@contextmanager
def one_rank(config: RunConfig, directory: Path | None = None) -> Iterator[CriticWorker]:
    """Start a critic of one rank in this process."""
    worker = CriticWorker(config, str(directory or resolve_model("tiny")), 0, 1)
    try:
        worker.setup(worker.rendezvous())
        yield worker
    finally:
        worker.shutdown()


def weights_of(worker: CriticWorker) -> Mapping[str, Tensor]:
    return {name: tensor.clone() for name, tensor in worker.backend.weights()}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=atol, rtol=0, msg=name)


PLANS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "shared prompts": ({}, {}),
    "small packs": ({"microbatch_tokens": 24}, {}),
    "no shared prompts": ({}, {"shared_prefix_packing": False}),
    "padded": ({"microbatch_tokens": 60, "gradient_checkpointing": True}, {"packing": False}),
}


@pytest.mark.parametrize("plan", PLANS)
def test_an_update_is_the_plain_one(plan: str):
    """Two epochs of two mini-batches: values move, so that the clip is active in the later ones.

    Adam divides by the root of the second moment: where a gradient is about 0, rounding decides
    its sign. So weights agree to a fraction of the learning rate, 1e-3, and losses to 1e-5.
    """
    critic, policy = PLANS[plan]
    config = critic_config(epochs=2, **critic)
    config = config.model_copy(update={"policy": config.policy.model_copy(update=policy)})
    batch = example(unscored=(1, 7))
    expected, losses = plainly_updated(config, resolve_model("tiny"), batch)
    with one_rank(config) as worker:
        start = weights_of(worker)
        report = values(worker.update(batch))
        found = weights_of(worker)

    assert report["critic/loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert report["critic/updates"] == 4
    assert 0 < report["critic/clip_fraction"] < 1
    assert float((found["score.weight"] - start["score.weight"]).abs().max()) > 1e-3
    assert_same(found, expected, atol=5e-5)


def test_values_are_those_of_transformers_class():
    config = critic_config()
    batch = example()
    with one_rank(config) as worker:
        worker.update(batch)  # so that the head is not 0
        part = worker.values(batch.rollouts)
        found = ValueBatch.scatter([part], batch.rollouts.sequence_offsets)
        model: Any = worker.backend.module.model

    assert not found[~batch.rollouts.response_mask].any()
    for row in range(0, len(batch), 5):
        start, end = batch.rollouts.sequence_offsets[row : row + 2]
        tokens = torch.from_numpy(batch.rollouts.token_ids[start:end].astype(np.int64))
        own = load_value_model(resolve_model("tiny"), dtype=torch.float32, attention="sdpa")
        own.load_state_dict({k: v.full_tensor() for k, v in model.state_dict().items()})
        with torch.no_grad():
            expected = own(input_ids=tokens[None]).logits[0, :-1, 0].numpy()
        first = int(batch.rollouts.prompt_lengths[row])
        np.testing.assert_allclose(found[start + first : end], expected[first - 1 :], atol=1e-5)


def test_the_loss_of_a_pack_sends_no_gradient_to_targets():
    """The gradient of the loss with respect to a value is (V - R) / N where it is not clipped."""
    config = critic_config()
    batch = example()
    with one_rank(config) as worker:
        (pack, *_) = worker.packs_of(batch.rollouts, np.arange(3))
        columns = PackColumns(pack, torch.device("cpu"))

    assert batch.values is not None
    assert batch.returns is not None
    live = columns.take(batch.values).clone().requires_grad_()
    sizes = Denominators(num_tokens=50, num_sequences=3, max_tokens=9)
    loss = ValueLoss(batch=batch, clip=0.3)(ValueResult(live), columns, sizes)
    loss.loss.backward()
    assert live.grad is not None
    torch.testing.assert_close(live.grad, (live.detach() - columns.take(batch.returns)) / 50)
    assert loss.sums == {"clipped": 0.0}


def test_a_batch_without_a_reward_is_skipped():
    batch = example(unscored=tuple(range(24)))
    with one_rank(critic_config()) as worker:
        start = weights_of(worker)
        report = values(worker.update(batch))
        assert_same(weights_of(worker), start, atol=0)
    assert report["critic/skipped_updates"] == 2
    assert report["critic/updates"] == 0


def test_a_saved_critic_continues_with_the_same_numbers(tmp_path: Path):
    """Linear schedule: the learning rate continues too. The files are a model of transformers."""
    config = critic_config(optimizer={"learning_rate": 1e-3, "schedule": "linear"})
    batch = example()
    with one_rank(config) as worker:
        worker.update(batch)
        worker.save(str(tmp_path))
        uninterrupted = values(worker.update(batch))
        expected = weights_of(worker)
    assert json.loads((tmp_path / "critic_state.json").read_text()) == {"ranks": 1, "steps": 1}
    facts = json.loads((tmp_path / "config.json").read_text())
    assert facts["architectures"] == ["LlamaForTokenClassification"]
    assert facts["value_role"] == "critic"

    with one_rank(config) as worker:
        worker.load(str(tmp_path))
        resumed = values(worker.update(batch))
        assert_same(weights_of(worker), expected, atol=0)
    for name in ("critic/loss", "critic/grad_norm", "critic/learning_rate"):
        assert resumed[name] == uninterrupted[name]

    # Its files start another critic.
    with one_rank(config, tmp_path) as worker:
        saved = load_file(tmp_path / "model.safetensors")
        assert_same(weights_of(worker), saved, atol=0)


def test_a_model_that_looks_ahead_is_refused_as_a_critic(tmp_path: Path):
    chosen = next(one for one in ARCHITECTURES if one.name == "bert, not causal")
    save_tiny_model(tmp_path, chosen)
    with (
        pytest.raises(UnsupportedModelError, match=r"^critic\.path: Bert.* is not a causal"),
        one_rank(critic_config(), tmp_path),
    ):
        pass


def test_the_role_of_the_critic_is_the_policys_with_its_own_fields():
    config = critic_config(ranks=1, microbatch_tokens=77)
    policy = config.policy.model_copy(update={"gpus_per_rank": 0.4, "gradient_checkpointing": True})
    role = config.model_copy(update={"policy": policy}).critic_role()
    assert role.microbatch_tokens == 77
    assert role.gpus_per_rank == 0.4
    assert role.gradient_checkpointing
    assert role.optimizer == config.critic.optimizer
    assert config.critic_passes() == (1, 2), "those of the policy"
    assert critic_config(epochs=3, num_mini_batches=1).critic_passes() == (3, 1)
