"""Models run packed or padded, whichever gives their own log-probabilities, or are refused."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from rlsys.algorithms.token_logprobs import LogitTransform
from rlsys.models.loading import UnsupportedModelError, check_architecture, load_causal_lm
from tests.support.architectures import (
    ARCHITECTURES,
    PACKED,
    Architecture,
    save_tiny_model,
    tiny_model,
)
from workers.training import forward_check, packed_attention
from workers.training.forward_check import (
    ForwardCheck,
    Lengths,
    Packing,
    check_forward,
    try_forward,
)

LENGTHS = Lengths(prompt=24, response=40)
CPU = torch.device("cpu")


def architecture(name: str) -> Architecture:
    return next(a for a in ARCHITECTURES if a.name == name)


def verdict(model: PreTrainedModel, *, packing: Packing = "auto", kernel: str = "sdpa"):
    return try_forward(model, kernel=kernel, lengths=LENGTHS, packing=packing, device=CPU)


@pytest.mark.parametrize("chosen", PACKED, ids=lambda chosen: chosen.name)
def test_families_that_must_be_fast_run_packed(chosen: Architecture):
    found = verdict(tiny_model(chosen))
    assert found.packing, found.reason
    assert found.error < 1e-4


@pytest.mark.parametrize("kernel", ["eager", "flex_attention"])
@pytest.mark.parametrize("name", ["mistral, sliding window", "gemma2, sliding window, softcaps"])
def test_windows_and_softcaps_in_every_kernel(name: str, kernel: str):
    found = verdict(tiny_model(architecture(name)), kernel=kernel)
    assert found.packing, found.reason


@pytest.mark.parametrize(
    "name", ["falcon", "bloom, ALiBi", "lfm2, convolution state", "stablelm", "gptj, LM-head bias"]
)
def test_others_run_their_own_padded_pass(name: str):
    model = tiny_model(architecture(name))
    found = verdict(model)
    assert not found.packing
    assert found.reason
    assert found.error < 1e-4
    with pytest.raises(UnsupportedModelError, match=r"policy\.packing: true, but .* auto or false"):
        verdict(model, packing=True)
    assert verdict(model, packing=False).reason is None  # as requested


def test_a_model_that_looks_ahead_is_refused():
    with pytest.raises(UnsupportedModelError, match="not a causal language model"):
        verdict(tiny_model(architecture("bert, not causal")))


def test_a_model_that_fails_on_token_ids_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"model\.path: the forward pass of ProphetNet"):
        verdict(tiny_model(Architecture(model_type="prophetnet")))


def test_a_window_that_is_left_out_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packed_attention.PackedLayout, "window", lambda self, window: None)
    found = verdict(tiny_model(architecture("mistral, sliding window")))
    assert not found.packing
    assert "differ from the model's own" in str(found.reason)


def test_a_logit_scale_that_is_left_out_is_found(monkeypatch: pytest.MonkeyPatch):
    nothing = LogitTransform()
    monkeypatch.setattr("workers.training.packed_model.logit_transform", lambda config: nothing)
    found = verdict(tiny_model(architecture("granite, scales")))
    assert not found.packing
    assert "differ from the model's own" in str(found.reason)


def test_dropout_in_training_mode_is_found():
    model = tiny_model(architecture("phi3, sliding window, dropout")).train()
    with pytest.raises(UnsupportedModelError):  # even two of its own passes differ
        verdict(model)


def test_the_verdict_is_kept_for_this_model_and_these_lengths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RLSYS_CACHE", str(tmp_path))
    model = tiny_model(architecture("llama"))

    def check(lengths: Lengths) -> ForwardCheck:
        return check_forward(model, kernel="sdpa", lengths=lengths, packing="auto", device=CPU)

    first = check(LENGTHS)

    monkeypatch.setattr(forward_check, "try_forward", lambda *_, **__: pytest.fail("tried again"))
    assert check(LENGTHS) == first
    with pytest.raises(pytest.fail.Exception, match="tried again"):
        check(dataclasses.replace(LENGTHS, response=41))

    (file,) = (tmp_path / "forward_checks").iterdir()
    file.write_text("{")
    with pytest.raises(pytest.fail.Exception, match="tried again"):
        check(LENGTHS)


def test_packed_attention_refuses_keywords_that_it_does_not_know():
    attention = packed_attention._FUNCTIONS["sdpa"]
    states = torch.zeros(1, 1, 2, 4)
    layout = packed_attention.PackedLayout([], CPU)
    for keywords, message in [
        ({"s_aux": states}, "s_aux"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "causal"),
    ]:
        with pytest.raises(packed_attention.UnsupportedAttentionError, match=message):
            attention(None, states, states, states, None, packed_layout=layout, **keywords)


def test_attention_softcaps_are_loaded_with_a_kernel_that_has_them(tmp_path: Path):
    save_tiny_model(tmp_path, architecture("gemma2, sliding window, softcaps"))
    model = load_causal_lm(tmp_path, dtype=torch.float32, attention="sdpa")
    assert model.config._attn_implementation == "eager"

    save_tiny_model(tmp_path, architecture("gpt_oss, sliding window, sinks, experts"))
    model = load_causal_lm(tmp_path, dtype=torch.float32, attention="sdpa")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"model_type": "t5"}, "no causal language model of type 't5'"),
        (
            {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "code.Model"}},
            "trust_remote_code true",
        ),
        ({"model_type": "llama", "quantization_config": {"quant_method": "awq"}}, "quantized .awq"),
        (
            {
                "model_type": "phi3",
                "original_max_position_embeddings": 64,
                "rope_scaling": {"type": "longrope"},
            },
            "longrope.*beyond 64 tokens.*is 100",
        ),
        (
            {
                "model_type": "llama",
                "max_position_embeddings": 99,
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0},
            },
            "dynamic.*beyond 99 tokens",
        ),
    ],
)
def test_unsupported_configurations_are_refused_before_anything_starts(
    tmp_path: Path, facts: dict, message: str
):
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=rf"model\.path: .*{message}"):
        check_architecture(tmp_path, field="model.path", longest=100, trust_remote_code=False)


def test_long_rope_within_its_original_length_is_right(tmp_path: Path):
    facts = {
        "model_type": "phi3",
        "original_max_position_embeddings": 100,
        "rope_scaling": {"type": "longrope"},
    }
    (tmp_path / "config.json").write_text(json.dumps(facts))
    check_architecture(tmp_path, field="model.path", longest=100, trust_remote_code=False)

    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.0, 1.0, 1.0, 1.0],
        "long_factor": [9.0] * 8,
        "original_max_position_embeddings": 64,
        "factor": 8.0,
    }
    chosen = Architecture(model_type="phi3", settings={"rope_parameters": rope})
    assert verdict(tiny_model(chosen)).packing
