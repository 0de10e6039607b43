"""Losses of examples: parity with transformers, and independence of how they are packed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlsys.algorithms.reward_modeling import ranking_loss
from rlsys.config.offline import PreferenceConfig, RankingConfig, SupervisedConfig
from rlsys.data.example_stream import ExampleBatch
from rlsys.data.packing import pack_rows
from rlsys.models import resolve_model
from rlsys.models.value_models import load_value_model, value_head
from tests.support.example_batches import random_examples
from workers.training.losses import Denominators, PackColumns
from workers.training.offline_losses import (
    OfflineLoss,
    PreferenceLoss,
    RankingLoss,
    SupervisedLoss,
)
from workers.training.packed_attention import register_packed_attention
from workers.training.packed_model import PackedCausalLM, PackTensors
from workers.training.packed_value_model import PackedValueModel

CPU = torch.device("cpu")
# Budget of a pack, ranks, shared prompts, padded
PLANS = [
    (10_000, 1, True, False),
    (40, 1, True, False),
    (40, 1, False, False),
    (40, 1, False, True),
    (60, 2, True, False),
    (10_000, 3, False, False),
]


def last_tokens(batch: ExampleBatch) -> np.ndarray:
    last = np.zeros(len(batch.sequences.token_ids), dtype=np.bool_)
    last[batch.sequences.offsets[1:] - 1] = True
    return last


def accumulated(
    model: Any, batch: ExampleBatch, loss: OfflineLoss, plan: tuple[int, int, bool, bool]
) -> tuple[float, dict[str, torch.Tensor], Counter[str]]:
    """Return loss, gradients and sums over all packs of all ranks."""
    budget, ranks, shared, padded = plan
    sequences = batch.sequences
    if isinstance(model, PackedValueModel):
        sequences = sequences.marked_after(last_tokens(batch))
    model.packing = not padded
    kernel = "sdpa" if padded else register_packed_attention("sdpa")
    model.model.set_attn_implementation(kernel)
    model.zero_grad()
    sizes = Denominators(
        num_tokens=batch.sequences.num_loss_tokens,
        num_sequences=batch.num_examples,
        max_tokens=100,
    )
    value = 0.0
    sums: Counter[str] = Counter()
    for rank in range(ranks):
        packs = pack_rows(
            sequences,
            np.arange(len(batch)),
            budget=budget,
            rank=rank,
            ranks=ranks,
            shared_prefix_packing=shared,
            padded=padded,
            whole_groups=True,
        )
        for pack in packs:
            if pack.is_padding:
                continue
            result = model(PackTensors.of(pack, CPU))
            pack_loss = loss(result, PackColumns(pack, CPU), sizes)
            pack_loss.loss.backward()
            value += pack_loss.loss.item()
            sums.update(pack_loss.sums)
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return value, gradients, sums


def own_logprobs(model: PreTrainedModel, batch: ExampleBatch) -> list[torch.Tensor]:
    """Return the log-probabilities of the learned tokens, by the model's own forward pass."""
    found = []
    sequences = batch.sequences
    for row in range(len(batch)):
        start, stop = sequences.offsets[row], sequences.offsets[row + 1]
        tokens = torch.from_numpy(sequences.token_ids[start:stop].astype(np.int64))
        logits = model(input_ids=tokens[None]).logits[0, :-1]
        logprobs = logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
        found.append(logprobs[torch.from_numpy(sequences.loss_mask[start + 1 : stop])])
    return found


@pytest.fixture(scope="module")
def language_model() -> PackedCausalLM:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(resolve_model("tiny"), dtype=torch.float32)
    return PackedCausalLM(model.eval(), chunk_tokens=16)


@pytest.fixture(scope="module")
def value_model() -> PackedValueModel:
    model = load_value_model(
        resolve_model("tiny"), dtype=torch.float32, attention="sdpa", prefer="sequence"
    )
    torch.manual_seed(0)
    torch.nn.init.normal_(value_head(model).weight, std=0.5)
    return PackedValueModel(model)


def reference_of(batch: ExampleBatch) -> np.ndarray:
    return np.random.default_rng(4).normal(-30, 5, len(batch)).astype(np.float32)


def assert_equal_for_all_plans(model: Any, batch: ExampleBatch, loss: OfflineLoss) -> float:
    """Check that loss, gradient and sums do not depend on packing; return the loss."""
    value, gradients, sums = accumulated(model, batch, loss, PLANS[0])
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-4
    for plan in PLANS[1:]:
        other, other_gradients, other_sums = accumulated(model, batch, loss, plan)
        assert other == pytest.approx(value, abs=1e-5, rel=1e-6), plan
        assert set(other_sums) == set(sums)
        for name in sums:
            assert other_sums[name] == pytest.approx(sums[name], abs=1e-3, rel=1e-5), (plan, name)
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                other_gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=f"{plan} {name}"
            )
    return value


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_supervised(language_model: PackedCausalLM, aggregation: Any):
    batch = random_examples((1,) * 9)
    loss = SupervisedLoss(objective=SupervisedConfig(aggregation=aggregation))
    value = assert_equal_for_all_plans(language_model, batch, loss)

    language_model.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        rows = own_logprobs(language_model.model, batch)
    means = torch.stack([-row.mean() for row in rows])
    expected = -torch.cat(rows).mean() if aggregation == "token_mean" else means.mean()
    assert value == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize(
    "objective",
    [
        PreferenceConfig(beta=0.3),
        PreferenceConfig(kind="ipo", beta=0.2),
        PreferenceConfig(label_smoothing=0.2, length_normalized=True),
    ],
)
def test_preferences(language_model: PackedCausalLM, objective: PreferenceConfig):
    """Pairs, and rankings of three, whose three pairs together count as one pair."""
    batch = random_examples((2, 3, 2, 2, 3))
    reference = reference_of(batch)
    loss = PreferenceLoss(objective=objective, batch=batch, reference=reference)
    value = assert_equal_for_all_plans(language_model, batch, loss)

    language_model.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        rows = own_logprobs(language_model.model, batch)
    ratios = []
    for row, ref in zip(rows, reference.tolist(), strict=True):
        ratio = float(row.sum()) - ref
        ratios.append(ratio / len(row) if objective.length_normalized else ratio)

    per_prompt: list[float] = []
    for group in np.unique(batch.sequences.group_ids):
        members = np.flatnonzero(batch.sequences.group_ids == group)
        pairs = [
            ratios[i] - ratios[j]
            for i in members
            for j in members
            if batch.ranks[i] < batch.ranks[j]
        ]
        per_prompt.append(sum(_pair_loss(h, objective) for h in pairs) / len(pairs))
    assert value == pytest.approx(sum(per_prompt) / len(per_prompt), rel=1e-4)


def _pair_loss(h: float, objective: PreferenceConfig) -> float:
    if objective.kind == "ipo":
        return (h - 1 / (2 * objective.beta)) ** 2
    scaled = torch.tensor(objective.beta * h, dtype=torch.float64)
    smoothing = objective.label_smoothing
    return float(-(1 - smoothing) * F.logsigmoid(scaled) - smoothing * F.logsigmoid(-scaled))


@pytest.mark.parametrize("kind", ["pairwise", "plackett_luce"])
def test_rankings(value_model: PackedValueModel, kind: Any):
    batch = random_examples((2, 4, 3, 2))
    loss = RankingLoss(objective=RankingConfig(kind=kind), batch=batch)
    value = assert_equal_for_all_plans(value_model, batch, loss)

    # The reward is what transformers returns for the whole sequence: the value at its last token.
    value_model.model.set_attn_implementation("sdpa")
    value_model.model.config.pad_token_id = 0
    sequences = batch.sequences
    rewards = torch.zeros(4, 4)
    ranks = torch.full((4, 4), -1)
    with torch.no_grad():
        for row in range(len(batch)):
            tokens = sequences.token_ids[sequences.offsets[row] : sequences.offsets[row + 1]]
            prompt = int(sequences.group_ids[row]) - 5
            place = int((sequences.group_ids[:row] == sequences.group_ids[row]).sum())
            output = value_model.model(input_ids=torch.from_numpy(tokens.astype(np.int64))[None])
            rewards[prompt, place] = output.logits[0, 0]
            ranks[prompt, place] = int(batch.ranks[row])
    assert value == pytest.approx(float(ranking_loss(rewards, ranks, kind=kind)), abs=1e-5)


def test_the_responses_to_a_prompt_stay_in_one_pack():
    batch = random_examples((4, 4, 4))
    for budget, _, shared, padded in PLANS:
        packs = pack_rows(
            batch.sequences,
            np.arange(len(batch)),
            budget=budget,
            rank=0,
            ranks=1,
            shared_prefix_packing=shared,
            padded=padded,
            whole_groups=True,
        )
        seen = [set(batch.sequences.group_ids[pack.rows].tolist()) for pack in packs]
        assert sum(map(len, seen)) == 3
