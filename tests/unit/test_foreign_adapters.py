"""Adapters that PEFT has written: merged as PEFT merges them, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlsys.models.adapters import merge_adapters

LAYER = "model.layers.0.mlp.up_proj"
PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}
ADAPTER = {
    f"{LAYER}.lora_A.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
    f"{LAYER}.lora_B.weight": torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
}


def merged(
    folder: Path, facts: dict[str, Any], further: dict[str, Tensor], *, tied: bool = False
) -> dict[str, Tensor]:
    """Merge an adapter of scale 2, and what is trained whole, with a base of zeros."""
    base, adapters = folder / "base", folder / "adapters"
    names = (f"{LAYER}.weight", "model.embed_tokens.weight", "lm_head.weight")[: 2 if tied else 3]
    for directory in (base, adapters):
        directory.mkdir()
    save_file({name: torch.zeros(2, 2) for name in names}, base / "model.safetensors")
    weights = {f"base_model.model.{name}": tensor for name, tensor in (ADAPTER | further).items()}
    save_file(weights, adapters / "adapter_model.safetensors")
    (adapters / "adapter_config.json").write_text(json.dumps(PLAIN | facts))
    merge_adapters(adapters, base, folder / "out")
    return load_file(folder / "out" / "model.safetensors")


def test_an_embedding_that_was_trained_whole_leaves_the_lm_head_of_the_base(tmp_path: Path):
    embedding = {"model.embed_tokens.weight": torch.ones(2, 2)}
    found = merged(tmp_path, {"task_type": "CAUSAL_LM"}, embedding)
    assert found.keys() == {f"{LAYER}.weight", "model.embed_tokens.weight", "lm_head.weight"}
    assert torch.equal(found["model.embed_tokens.weight"], torch.ones(2, 2))
    assert torch.equal(found["lm_head.weight"], torch.zeros(2, 2))
    assert torch.equal(found[f"{LAYER}.weight"], torch.tensor([[2.0, 0.0], [0.0, 0.0]]))


def test_a_head_for_values_takes_the_place_of_the_lm_head(tmp_path: Path):
    found = merged(tmp_path, {"task_type": "SEQ_CLS"}, {"score.weight": torch.ones(1, 2)})
    assert found.keys() == {f"{LAYER}.weight", "model.embed_tokens.weight", "score.weight"}


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq"])
def test_a_start_that_changes_the_base_is_refused(tmp_path: Path, start: str):
    with pytest.raises(ValueError, match=rf"not plain LoRA .init_lora_weights: {start}"):
        merged(tmp_path, {"init_lora_weights": start}, {})


def test_an_adapter_of_an_embedding_is_refused(tmp_path: Path):
    further = {"model.embed_tokens.lora_embedding_A": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=r"embed_tokens.lora_embedding_A in .* is no adapter of a"):
        merged(tmp_path, {}, further)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_one_of_two_tied_weights_that_was_trained_whole_is_refused(tmp_path: Path, name: str):
    """PEFT trains a copy of it, so that the two differ; the merged model would tie them again."""
    with pytest.raises(ValueError, match=rf"^model\.path: .*{name} .* tied .*merge_and"):
        merged(tmp_path, {"task_type": "CAUSAL_LM"}, {name: torch.ones(2, 2)}, tied=True)


def test_tied_weights_that_are_saved_as_equal_are_merged(tmp_path: Path):
    """PEFT saves both where the vocabulary has grown."""
    both = {name: torch.ones(2, 2) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    found = merged(tmp_path, {"task_type": "CAUSAL_LM"}, both, tied=True)
    assert torch.equal(found["model.embed_tokens.weight"], torch.ones(2, 2))
