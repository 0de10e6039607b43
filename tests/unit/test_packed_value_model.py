"""Value models: packed, padded and transformers' own values agree, before and after saving."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from rlsys.config import RunConfig
from rlsys.data.packing import pack_rows
from rlsys.data.sequences import TokenSequences
from rlsys.models import resolve_model
from rlsys.models.loading import UnsupportedModelError
from rlsys.models.value_models import (
    ValueLayout,
    load_value_model,
    saved_value_layout,
    separate_padding,
    value_head,
    value_layout,
)
from tests.support.architectures import ARCHITECTURES, PACKED, Architecture, save_tiny_model
from tests.support.rollout_examples import random_rollouts
from workers.training import packed_attention
from workers.training.backends import build_backend
from workers.training.checked_outputs import VALUES
from workers.training.forward_check import ForwardCheck, Lengths, try_forward
from workers.training.model_setup import prepare, prepare_model, value_model
from workers.training.packed_attention import register_packed_attention
from workers.training.packed_model import PackTensors
from workers.training.packed_value_model import PackedValueModel
from workers.training.saved_state import save_backend

CPU = torch.device("cpu")
LENGTHS = Lengths(prompt=24, response=40)
CONFIG = RunConfig.model_validate(
    {"model": {"path": "tiny"}, "policy": {"compute_dtype": "float32"}}
)
# Transformers has no class with a head for the others.
WITH_A_HEAD = [one for one in PACKED if one.model_type != "granite"]


def architecture(name: str) -> Architecture:
    return next(one for one in ARCHITECTURES if one.name == name)


def loaded(directory: Path, *, prefer: ValueLayout = "token") -> PreTrainedModel:
    """Return the value model of a directory in float32, with a random head."""
    model = load_value_model(directory, dtype=torch.float32, attention="sdpa", prefer=prefer)
    give_random_head(model)
    return model


def give_random_head(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in value_head(model).parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * value_head(model).in_features ** -0.5)


@torch.no_grad()
def packed_values(
    module: PackedValueModel,
    sequences: TokenSequences,
    *,
    budget: int = 1000,
    shares: bool = True,
) -> np.ndarray:
    """Return [N] the values at the loss tokens of `sequences`, NaN elsewhere."""
    packs = pack_rows(
        sequences,
        np.arange(len(sequences)),
        budget=budget,
        rank=0,
        ranks=1,
        shared_prefix_packing=shares and module.packing,
        padded=not module.packing,
    )
    flat = np.full(len(sequences.token_ids), np.nan, dtype=np.float32)
    for pack in packs:
        flat[pack.flat_positions] = module(PackTensors.of(pack, CPU)).values.numpy()
    return flat


@torch.no_grad()
def own_values(model: PreTrainedModel, sequences: TokenSequences) -> np.ndarray:
    """Return [N] what transformers' class for tokens returns before each loss token."""
    flat = np.full(len(sequences.token_ids), np.nan, dtype=np.float32)
    for start, end in zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True):
        tokens = torch.from_numpy(sequences.token_ids[start:end].astype(np.int64))
        logits = model(input_ids=tokens[None]).logits[0, :, 0].numpy()
        flat[start + 1 : end] = logits[:-1]
    return np.where(sequences.loss_mask, flat, np.nan)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """Start a process group of one rank in this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2, sliding window, softcaps", "phi3"])
@pytest.mark.parametrize("shares", [True, False])
def test_packed_and_padded_values_are_those_of_transformers(
    name: str, shares: bool, tmp_path: Path
):
    save_tiny_model(tmp_path, architecture(name))
    model = loaded(tmp_path)
    sequences = random_rollouts(0).sequences
    expected = own_values(model, sequences)
    assert np.nanstd(expected) > 0.2, "values that are all alike would show no difference"

    padded = packed_values(PackedValueModel(model, packing=False), sequences)
    np.testing.assert_allclose(padded, expected, atol=1e-5, rtol=1e-5)

    model.set_attn_implementation(register_packed_attention("sdpa"))
    for budget in (24, 1000):
        module = PackedValueModel(model)
        packed = packed_values(module, sequences, budget=budget, shares=shares)
        np.testing.assert_allclose(packed, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chosen", WITH_A_HEAD, ids=lambda chosen: chosen.name)
def test_the_check_at_set_up_covers_value_models(chosen: Architecture, tmp_path: Path):
    save_tiny_model(tmp_path, chosen)
    model = load_value_model(tmp_path, dtype=torch.float32, attention="sdpa")
    found = checked(model)
    assert found.packing, found.reason
    assert 0 < found.error < 1e-4, "exactly 0 would mean that the new head hides everything"
    assert not value_head(model).weight.any(), "the check leaves the new head as it is"


def checked(model: PreTrainedModel) -> ForwardCheck:
    return try_forward(
        model, kernel="sdpa", lengths=LENGTHS, packing="auto", device=CPU, checked=VALUES
    )


def test_the_check_finds_a_window_that_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_tiny_model(tmp_path, architecture("mistral, sliding window"))
    model = load_value_model(tmp_path, dtype=torch.float32, attention="sdpa")
    monkeypatch.setattr(packed_attention.PackedLayout, "window", lambda self, window: None)
    found = checked(model)
    assert not found.packing
    assert "packed values differ from the model's own" in str(found.reason)


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path):
    save_tiny_model(tmp_path, architecture("bert, not causal"))
    model = load_value_model(tmp_path, dtype=torch.float32, attention="sdpa")
    with pytest.raises(UnsupportedModelError, match="not a causal language model"):
        checked(model)


def test_a_new_head_is_zero_on_the_weights_of_the_language_model():
    directory = resolve_model("tiny")
    model = load_value_model(directory, dtype=torch.float32, attention="sdpa")
    language: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert not any(parameter.any() for parameter in value_head(model).parameters())

    trunk = dict(language.base_model.named_parameters())
    own = dict(model.base_model.named_parameters())
    assert trunk.keys() == own.keys()
    assert all(torch.equal(own[name], trunk[name]) for name in own)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("layout", ["token", "sequence"])
def test_a_saved_model_has_the_same_values_in_transformers(layout: ValueLayout, tmp_path: Path):
    """Also it loads again as a value model, in the same layout."""
    directory, target = resolve_model("tiny"), tmp_path / "saved"
    target.mkdir()
    module, _ = prepare(value_model(layout), CONFIG, CONFIG.policy, directory, CPU)
    give_random_head(module.model)
    sequences = random_rollouts(0, vocabulary=200).sequences
    if layout == "sequence":
        # transformers reads such a model after the last token of a sequence.
        sequences = sequences.marked_after(last_tokens(sequences))
    expected = packed_values(module, sequences)
    save_backend(build_backend(module, CONFIG.policy, CPU, directory), target)

    assert saved_value_layout(target) == layout
    again = load_value_model(target, dtype=torch.float32, attention="sdpa", prefer="token")
    np.testing.assert_allclose(
        packed_values(PackedValueModel(again, packing=False), sequences), expected, atol=1e-5
    )
    if layout == "token":
        own: Any = AutoModelForTokenClassification.from_pretrained(target, dtype=torch.float32)
        np.testing.assert_allclose(own_values(own.eval(), sequences), expected, atol=1e-5)
    else:
        own = AutoModelForSequenceClassification.from_pretrained(target, dtype=torch.float32)
        np.testing.assert_allclose(
            pooled_values(own.eval(), sequences), expected[~np.isnan(expected)], atol=1e-5
        )


def last_tokens(sequences: TokenSequences) -> np.ndarray:
    marks = np.zeros(len(sequences.token_ids), dtype=np.bool_)
    marks[sequences.offsets[1:] - 1] = True
    return marks


@torch.no_grad()
def pooled_values(model: PreTrainedModel, sequences: TokenSequences) -> list[float]:
    """Return [B] transformers' value of each sequence, without the token that marking added."""
    tokens = torch.from_numpy(sequences.token_ids.astype(np.int64))
    parts = zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True)
    return [
        float(model(input_ids=tokens[None, start : end - 1]).logits[0, 0]) for start, end in parts
    ]


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_of_the_policy_becomes_a_value_model(tmp_path: Path):
    directory = resolve_model("tiny")
    module, _ = prepare_model(CONFIG, CONFIG.policy, directory, CPU)
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.add_(0.01)
    expected = {name: tensor.clone() for name, tensor in module.model.base_model.named_parameters()}
    save_backend(build_backend(module, CONFIG.policy, CPU, directory), tmp_path)
    (tmp_path / "policy_state.json").write_text("{}")

    own = load_value_model(tmp_path, dtype=torch.float32, attention="sdpa").base_model
    for name, parameter in own.named_parameters():
        assert torch.equal(parameter, expected[name])


def test_heads_with_several_outputs_are_refused(tmp_path: Path):
    facts = {"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(UnsupportedModelError, match="has 2 labels"):
        value_layout(tmp_path)


def test_types_without_a_head_in_transformers_are_refused(tmp_path: Path):
    facts = {"architectures": ["GraniteForCausalLM"], "model_type": "granite"}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(UnsupportedModelError, match="no model of type 'granite' with a head"):
        value_layout(tmp_path)


def test_types_with_one_of_the_layouts_get_that_one(tmp_path: Path):
    facts = {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    assert value_layout(tmp_path, prefer="token") == "sequence"


def test_a_checkpoint_without_some_weights_is_refused(tmp_path: Path):
    model: Any = AutoModelForCausalLM.from_pretrained(resolve_model("tiny"))
    weights = model.state_dict()
    del weights["model.layers.1.mlp.up_proj.weight"]
    del weights["lm_head.weight"]  # tied
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(UnsupportedModelError, match=r"no weights for model\.layers\.1\.mlp\.up"):
        load_value_model(tmp_path, dtype=torch.float32, attention="sdpa")


def test_a_drawn_head_has_the_variance_of_its_width_and_depends_on_the_seed():
    directory = resolve_model("tiny")

    def head(seed: int | None) -> torch.Tensor:
        model = load_value_model(
            directory, dtype=torch.float32, attention="sdpa", prefer="sequence", head_seed=seed
        )
        return value_head(model).weight[0].detach()

    width = len(head(0))
    assert float(head(0).std()) == pytest.approx((width + 1) ** -0.5, rel=0.3)
    torch.testing.assert_close(head(0), head(0), rtol=0, atol=0)
    assert not torch.equal(head(0), head(1))
    assert not head(None).any()


def test_transformers_reads_a_saved_sequence_classifier_at_the_end_token(tmp_path: Path):
    directory = resolve_model("tiny")
    model = load_value_model(
        directory, dtype=torch.float32, attention="sdpa", prefer="sequence", head_seed=0
    )
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path)
    separate_padding(tmp_path)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.pad_token_id not in {None, tokenizer.eos_token_id}
    texts = [f"{text}{tokenizer.eos_token}" for text in ("7 + 8 = 15.", "The sum of 1 and 2 is 3.")]
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        padded = tokenizer(texts, return_tensors="pt", padding=True)
        rewards = saved(**padded).logits[:, 0]
        for text, reward in zip(texts, rewards, strict=True):
            tokens = tokenizer(text, return_tensors="pt")["input_ids"]
            hidden = saved.base_model(input_ids=tokens).last_hidden_state[0, -1]
            expected = hidden @ saved.score.weight[0]
            torch.testing.assert_close(reward, expected, rtol=1e-4, atol=1e-5)
