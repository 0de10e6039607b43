"""Weights converted a few at a time are those that transformers converts all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlsys.models.checkpoint_names import CheckpointNames, to_checkpoint, untied_state_dict
from tests.support.model_families import FAMILIES, build_family, load_family

CONVERTED = {  # families with weights that are more than renamed
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "phimoe",
    "glm4_moe",
    "deepseek_v2",
    "deepseek_v3",
}


def streamed(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights of the checkpoint, converted group by group; each must come once."""
    state = untied_state_dict(model)
    names = CheckpointNames(model, state)
    found: dict[str, torch.Tensor] = {}
    for group in names.groups:
        part = names.convert(group, {name: state[name] for name in group.names})
        assert tuple(part) == group.outputs
        assert not set(part) & set(found)
        found |= part
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_converted_a_weight_at_a_time_and_back(family: str, tmp_path: Path):
    build_family(family, tmp_path)
    model = load_family(tmp_path, seed=2)
    state = untied_state_dict(model)
    whole = to_checkpoint(model, state)

    found = streamed(model)
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(found[name], tensor), name

    groups = CheckpointNames(model, state).groups
    assert {len(group.names) for group in groups} == {1}
    assert all(group.renamed for group in groups) == (family not in CONVERTED)

    # And back, in an order in which the parts of a weight do not come together.
    other = load_family(tmp_path, seed=3)
    CheckpointNames(other, untied_state_dict(other)).load(reversed(list(whole.items())))
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def fused(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert as a model would whose checkpoint has q and k of a layer in one weight."""
    made = dict(weights)
    for name in weights:
        if name.endswith("q_proj.weight"):
            other = name.replace("q_proj", "k_proj")
            both = (made.pop(name), made.pop(other))  # KeyError without its other half
            made[name.replace("q_proj", "qk_proj")] = torch.cat(both)
    return made


def test_weights_that_become_one_are_converted_layer_by_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    build_family("llama", tmp_path)
    model = load_family(tmp_path, seed=2)
    monkeypatch.setattr("rlsys.models.checkpoint_names.to_checkpoint", fused)
    names = CheckpointNames(model, untied_state_dict(model))
    together = [group.names for group in names.groups if len(group.names) > 1]
    assert together == [
        tuple(f"model.layers.{layer}.self_attn.{part}_proj.weight" for part in "qk")
        for layer in range(2)
    ]
    sent = fused(model, untied_state_dict(model))
    assert streamed(model).keys() == sent.keys()

    other = load_family(tmp_path, seed=3)
    CheckpointNames(other, untied_state_dict(other)).load(sent.items())
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_weights_that_cannot_be_separated_are_converted_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def across_layers(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = dict(weights)
        norms = [made.pop(f"model.layers.{layer}.input_layernorm.weight") for layer in range(2)]
        return made | {"norms": torch.stack(norms)}

    build_family("llama", tmp_path)
    model = load_family(tmp_path, seed=2)
    monkeypatch.setattr("rlsys.models.checkpoint_names.to_checkpoint", across_layers)
    names = CheckpointNames(model, untied_state_dict(model))
    (together,) = (group for group in names.groups if not group.renamed)
    assert together.outputs == ("norms",)
    assert len(together.names) == 2


def test_missing_and_foreign_weights_are_named(tmp_path: Path):
    build_family("mixtral", tmp_path)
    model = load_family(tmp_path, seed=2)
    sent = {
        name: tensor.clone()
        for name, tensor in to_checkpoint(model, untied_state_dict(model)).items()
    }
    names = CheckpointNames(model, untied_state_dict(model))
    with pytest.raises(ValueError, match=r"^checkpoint: other is no weight of the model"):
        names.load([("other", torch.ones(1))])
    del sent["model.norm.weight"]
    with pytest.raises(ValueError, match=r"no weights for model\.norm\.weight"):
        names.load(sent.items())
