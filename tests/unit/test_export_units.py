"""Weights leave and enter the form of a checkpoint in parts, with the same result as at once."""

from pathlib import Path

import pytest
import torch

from rlsys.models import weight_files
from rlsys.models.checkpoint_names import to_checkpoint
from rlsys.models.export_units import check_weights, export_units, readers
from rlsys.models.tensor_files import TensorFacts, TensorFileWriter
from rlsys.models.weight_files import WeightFiles
from tests.support.model_families import FAMILIES, build_family, load_family
from workers.training.sharded_checkpoint import WeightPlan


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_written_and_read_in_parts(family: str, tmp_path: Path):
    build_family(family, tmp_path / "model")
    model = load_family(tmp_path / "model", seed=2)
    state = model.state_dict()
    facts = [TensorFacts.of(name, tensor) for name, tensor in state.items()]
    units = export_units(model, facts)
    # No unit has more than one weight: what is held beside a shard is one tensor.
    assert [unit.weights for unit in units] == [(one,) for one in facts]

    expected = to_checkpoint(model, state)
    exported = [one for unit in units for one in unit.exported]
    assert {one.name for one in exported} == set(expected)
    with TensorFileWriter(tmp_path / weight_files.SINGLE, exported, {}) as file:
        for unit in units:
            part = {one.name: state[one.name] for one in unit.weights}
            for name, tensor in to_checkpoint(model, part).items():
                assert torch.equal(tensor, expected[name]), name
                file.write(name, tensor)

    files = WeightFiles.of(tmp_path)
    check_weights(units, files)
    for unit in units:
        for name, read in readers(model, unit, files).items():
            flat = state[name].reshape(-1)
            middle = len(flat) // 3
            assert torch.equal(read(0, middle), flat[:middle]), name
            assert torch.equal(read(middle, len(flat)), flat[middle:]), name


def test_experts_are_not_only_renamed_and_others_are(tmp_path: Path):
    build_family("qwen3_moe", tmp_path)
    model = load_family(tmp_path, seed=2)
    facts = [TensorFacts.of(name, tensor) for name, tensor in model.state_dict().items()]
    converted = {
        unit.weights[0].name for unit in export_units(model, facts) if not unit.only_renamed
    }
    layers = model.config.num_hidden_layers
    assert converted == {
        f"model.layers.{layer}.mlp.experts.{weight}"
        for layer in range(layers)
        for weight in ("gate_up_proj", "down_proj")
    }


def test_a_conversion_that_needs_several_weights_gets_those_of_its_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The biases of q and k are one tensor on the disk of this imagined model."""
    build_family("llama", tmp_path / "model")
    model = load_family(tmp_path / "model", seed=2)

    def revert(_: object, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        joined = {}
        for name, tensor in weights.items():
            if name.endswith("q_proj.bias"):
                other = weights[name.replace("q_proj", "k_proj")]
                joined[name.replace("q_proj", "qk_proj")] = torch.cat([tensor, other])
            elif not name.endswith("k_proj.bias"):
                joined[name] = tensor
        return joined

    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", revert)
    state = model.state_dict()
    units = export_units(model, [TensorFacts.of(name, one) for name, one in state.items()])
    together = [{one.name for one in unit.weights} for unit in units if len(unit.weights) > 1]
    assert together == [
        {f"model.layers.{layer}.self_attn.{part}_proj.bias" for part in "qk"}
        for layer in range(model.config.num_hidden_layers)
    ]

    exported = [one for unit in units for one in unit.exported]
    with TensorFileWriter(tmp_path / weight_files.SINGLE, exported, {}) as file:
        for name, tensor in revert(model, state).items():
            file.write(name, tensor)
    files = WeightFiles.of(tmp_path)
    for unit in units:
        for name, read in readers(model, unit, files).items():
            assert torch.equal(read(0, state[name].numel()), state[name].reshape(-1)), name


def test_files_of_another_model_are_refused(tmp_path: Path):
    for family in ("llama", "qwen3_moe"):
        build_family(family, tmp_path / family)
    model = load_family(tmp_path / "qwen3_moe", seed=2)
    facts = [TensorFacts.of(name, tensor) for name, tensor in model.state_dict().items()]
    units = export_units(model, facts)
    check_weights(units, WeightFiles.of(tmp_path / "qwen3_moe"))
    with pytest.raises(ValueError, match=r"no weight .* of shape .* belongs to another model"):
        check_weights(units, WeightFiles.of(tmp_path / "llama"))


@pytest.mark.parametrize("ranks", [1, 2, 4, 9])
def test_ranks_write_parts_of_about_the_same_size(ranks: int, tmp_path: Path):
    build_family("llama", tmp_path)
    model = load_family(tmp_path, seed=2)
    facts = [TensorFacts.of(name, tensor) for name, tensor in model.state_dict().items()]
    units = export_units(model, facts)
    plan = WeightPlan.of(units, ranks=ranks, file_bytes=10**9)
    assert list(plan.owners) == sorted(plan.owners)
    written = {
        one.name: rank for rank, file in zip(plan.writers, plan.files, strict=True) for one in file
    }
    assert written == {
        one.name: owner
        for unit, owner in zip(units, plan.owners, strict=True)
        for one in unit.exported
    }
    total = sum(unit.num_bytes for unit in units)
    largest = max(unit.num_bytes for unit in units)
    sizes = [
        sum(unit.num_bytes for unit, owner in zip(units, plan.owners, strict=True) if owner == rank)
        for rank in range(ranks)
    ]
    assert max(sizes) <= total / ranks + largest
