"""The DeepSpeed backend on one rank; `tests/integration/test_backends.py` has the contract."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from rlsys.models import resolve_model
from rlsys.models.checkpoint_names import names_without_mapping
from rlsys.models.loading import UnsupportedModelError
from rlsys.models.tensor_files import TensorFacts
from rlsys.models.value_models import load_value_model
from rlsys.models.weight_files import file_names, write_index
from tests.support.backend_ranks import CPU, Case, example, running, tiny
from workers.training.backends import build_backend, fsdp2
from workers.training.backends.deepspeed import check_modules, import_deepspeed
from workers.training.losses import Denominators, PackColumns, PackLoss, backward_passes
from workers.training.packed_attention import register_packed_attention
from workers.training.packed_value_model import PackedValueModel, ValueResult


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Start a process group of one rank in this process."""
    meet = tmp_path_factory.mktemp("group") / "meet"
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def value_weights(case: Case) -> dict[str, Tensor]:
    """Return the weights of a value model after two updates towards 0, 1, 2, 0, ..."""
    directory = resolve_model("tiny")
    model = load_value_model(directory, dtype=torch.float32, attention="sdpa", head_seed=3)
    model.set_attn_implementation(register_packed_attention("sdpa"))
    backend = build_backend(PackedValueModel(model), case.settings(), CPU, directory)

    batch, _ = example()
    targets = np.arange(len(batch.token_ids), dtype=np.float32) % 3

    def squared_error(result: ValueResult, columns: PackColumns, sizes: Denominators) -> PackLoss:
        errors = (result.values - columns.take(targets)).square()
        return PackLoss(loss=errors.sum() / sizes.num_tokens, sums={}, maxima={})

    run = running(case)  # its packs
    for _ in range(2):
        list(backward_passes(backend, run.packs, squared_error, run.sizes))
        backend.step(1e-3)
    return {name: tensor.clone() for name, tensor in backend.weights()}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_value_model_learns_the_same_as_with_fsdp2(stage: int):
    found = value_weights(Case(zero_stage=stage, budget=50))
    expected = value_weights(Case(backend="fsdp2", budget=50))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0, msg=name)


@pytest.mark.usefixtures("alone")
def test_names_are_checked_by_the_shapes_of_whole_weights():
    """ZeRO 3 leaves empty tensors in the model."""
    model = running(Case(zero_stage=3)).backend.module.model
    assert {tensor.numel() for tensor in model.state_dict().values()} == {0}
    assert names_without_mapping(model, resolve_model("tiny")) == []


@pytest.mark.usefixtures("alone")
def test_one_weight_at_a_time_is_gathered(monkeypatch: pytest.MonkeyPatch):
    backend: Any = running(Case(zero_stage=3)).backend
    whole, gathered = backend._whole, []
    monkeypatch.setattr(backend, "_whole", lambda tensor: gathered.append(0) or whole(tensor))
    for count, _ in enumerate(backend.weights(), start=1):
        assert len(gathered) == count


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_in_several_files_is_read_and_its_optimizer_refused(tmp_path: Path):
    backend = running(Case(zero_stage=1)).backend
    weights = {name: torch.full_like(tensor, 0.5) for name, tensor in backend.weights()}
    half = len(weights) // 2
    parts = [dict(list(weights.items())[:half]), dict(list(weights.items())[half:])]
    for name, part in zip(file_names(2), parts, strict=True):
        save_file(part, tmp_path / name)
    write_index(tmp_path, [[TensorFacts.of(*pair) for pair in part.items()] for part in parts])

    with pytest.raises(ValueError, match="was saved with another backend"):
        backend.load(tmp_path)
    assert all(bool((tensor == 0.5).all()) for _, tensor in backend.weights())


def test_a_node_without_the_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match="'deepspeed' cannot be imported on a node of the ranks"):
        import_deepspeed(CPU)


def test_a_module_for_each_expert_is_refused():
    module = tiny(Case())
    check_modules(module)

    decoder: Any = module.model.get_decoder()
    decoder.layers[1].mlp.experts = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.experts of .* a module for"):
        check_modules(module)

    fsdp2.check_modules(module, 1)
    with pytest.raises(
        UnsupportedModelError, match=r"ranks: 2 .*layers\.1\.mlp\.experts of .*frozen"
    ):
        fsdp2.check_modules(module, 2)
    decoder.layers[1].mlp.experts.requires_grad_(False)
    fsdp2.check_modules(module, 2)
