"""Models of which each rank loads its own rows: they equal the model that is loaded whole."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rlsys.config import ModelRoleConfig, RunConfig
from rlsys.data.packing import pack_rows
from rlsys.models.loading import load_causal_lm
from rlsys.models.value_models import load_value_model, value_head
from tests.support.model_families import build_family
from tests.support.peak_memory import peak_bytes
from tests.support.rollout_examples import random_rollouts
from workers.training import forward_check, model_setup
from workers.training.backends import build_backend
from workers.training.backends.backend import ModelBackend
from workers.training.forward_check import ForwardCheck
from workers.training.model_setup import LANGUAGE_MODEL, ModelKind, prepare, value_model
from workers.training.packed_model import PackTensors
from workers.training.process_group import join_process_group, open_rendezvous
from workers.training.sharded_loading import OwnRows, gather, keep_own_rows, tie

CPU = torch.device("cpu")
RANKS = 3  # which divide few sizes

# Plain, tied, biases; fused projections; experts that transformers fuses when it loads; buffers
# that files have, and buffers that it computes.
FAMILIES = (
    "llama",
    "qwen2",
    "gemma2",
    "gemma3_text",
    "phi3",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "granitemoe",
    "deepseek_v3",
    "gpt2",
    "bloom",
    "gptj",
)

Load = Callable[[], PreTrainedModel]


def language_model(directory: Path, dtype: torch.dtype = torch.float32) -> Load:
    return lambda: load_causal_lm(directory, dtype=dtype, attention="sdpa")


def part(load: Load, rank: int, ranks: int = RANKS) -> tuple[PreTrainedModel, OwnRows]:
    """Return the model of one rank, and the rows that it keeps."""
    rows = OwnRows(rank=rank, ranks=ranks, device=CPU)
    with keep_own_rows(rows):
        model = load()
    tie(model, rows, lambda equal: equal)
    return model, rows


def assert_same(load: Load) -> None:
    """Compare all weights and buffers, and which of them are tied."""
    whole = load()
    pieces: dict[str, list[Tensor]] = {name: [] for name, _ in whole.named_parameters()}
    for rank in range(RANKS):
        model, rows = part(load, rank)
        assert len(rows.rows) >= len(pieces) - 2, "only a new head may be whole"
        assert tied_names(model) == tied_names(whole)
        assert model.all_tied_weights_keys == whole.all_tied_weights_keys
        assert model.config.to_dict() == whole.config.to_dict()

        buffers = dict(model.named_buffers())
        assert buffers.keys() == dict(whole.named_buffers()).keys()
        for name, buffer in whole.named_buffers():
            assert buffer.dtype == buffers[name].dtype, name
            assert torch.equal(buffer, buffers[name]), name
        for name, parameter in model.named_parameters():
            if parameter in rows.rows:
                pieces[name].append(rows.rows[parameter])
            elif not rank:
                pieces[name].append(parameter.detach())

    for name, parameter in whole.named_parameters():
        joined = torch.cat(pieces[name])
        assert joined.dtype == parameter.dtype, name
        assert torch.equal(joined, parameter), name


def tied_names(model: PreTrainedModel) -> list[list[str]]:
    """Return the names of each parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(names.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rows_of_all_ranks_are_the_model(family: str, tmp_path: Path):
    build_family(family, tmp_path)
    assert_same(language_model(tmp_path))


@pytest.mark.parametrize("family", ["gemma2", "deepseek_v3"])
def test_a_model_in_bfloat16_keeps_its_frequencies(family: str, tmp_path: Path):
    build_family(family, tmp_path)
    model, _ = part(language_model(tmp_path, torch.bfloat16), 0)
    frequencies = [one for name, one in model.named_buffers() if "inv_freq" in name]
    assert frequencies
    assert all(one.dtype == torch.float32 for one in frequencies)
    assert_same(language_model(tmp_path, torch.bfloat16))


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the weights in the file of a model."""
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("equal", [True, False])
def test_files_with_both_copies_of_a_tied_weight(equal: bool, tmp_path: Path):
    """transformers ties them where they are equal."""
    build_family("qwen2", tmp_path)

    def add_head(weights: dict[str, Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + (0 if equal else 1)

    rewrite(tmp_path, add_head)
    model: Any = language_model(tmp_path)()
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == equal
    assert_same(language_model(tmp_path))


def test_files_in_another_format(tmp_path: Path):
    build_family("qwen2", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert_same(language_model(tmp_path))


def test_half_precision_files_under_old_names(tmp_path: Path):
    build_family("gpt2", tmp_path)

    def without_prefix(weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            weights[name.removeprefix("transformer.")] = weights.pop(name).to(torch.float16)

    rewrite(tmp_path, without_prefix)
    assert_same(language_model(tmp_path))


@pytest.mark.parametrize("seed", [None, 3])
def test_a_new_head_is_whole(seed: int | None, tmp_path: Path):
    build_family("qwen3", tmp_path)

    def load() -> PreTrainedModel:
        return load_value_model(tmp_path, dtype=torch.float32, attention="sdpa", head_seed=seed)

    assert_same(load)
    assert not value_head(part(load, 0)[0]).weight.is_meta


def test_a_saved_head_is_divided(tmp_path: Path):
    def load(path: Path) -> PreTrainedModel:
        return load_value_model(path, dtype=torch.float32, attention="sdpa", head_seed=1)

    build_family("qwen3", tmp_path / "language")
    load(tmp_path / "language").save_pretrained(tmp_path / "saved")
    assert_same(lambda: load(tmp_path / "saved"))
    assert value_head(part(lambda: load(tmp_path / "saved"), 0)[0]).weight.is_meta


def test_what_is_loaded_later_is_whole(tmp_path: Path):
    build_family("llama", tmp_path)
    before = dict(os.environ)
    part(language_model(tmp_path), 0)
    assert dict(os.environ) == before
    assert not any(one.is_meta for one in language_model(tmp_path)().parameters())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_peak_is_the_shard_and_one_layer(
    stored: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config)
    whole = sum(one.numel() * one.element_size() for one in model.parameters())
    layer = sum(one.numel() * one.element_size() for one in model.model.layers[0].parameters())
    nn.Module.to(model, stored)
    model.save_pretrained(tmp_path)
    del model
    load, ranks = language_model(tmp_path), 16
    load()  # what is allocated once, at the first call

    # The file is mapped, which counts as one allocation.
    mapped = (tmp_path / "model.safetensors").stat().st_size
    kept: list[Any] = []
    peak = peak_bytes(lambda: kept.append(part(load, 1, ranks))) - mapped
    assert peak < whole / ranks + layer
    shard = sum(one.numel() * one.element_size() for one in kept[0][1].rows.values())
    assert shard == pytest.approx(whole / ranks, rel=0.02)
    assert peak > 0.9 * shard, "the allocations were counted"

    # Of a model that is loaded whole, too, but the weights of a file in float32 stay in the file.
    if stored == torch.bfloat16:
        monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # other threads are not counted
        assert peak_bytes(lambda: kept.append(load())) - mapped >= whole


# On two ranks, against the present backend of a model that was loaded whole.

SETTINGS = {
    "data": {"max_prompt_tokens": 64},
    "generation": {"dtype": "float32", "max_tokens": 64},
    "policy": {"ranks": 2, "compute_dtype": "float32"},
}


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Let `prepare` load whole models inside of the context."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_setup, "_own_rows", lambda *_: None)
        yield


def built(
    kind: ModelKind[Any], config: RunConfig, settings: ModelRoleConfig, directory: Path
) -> ModelBackend[Any]:
    module, _ = prepare(kind, config, settings, directory, CPU)
    return build_backend(module, settings, CPU, directory)


@torch.no_grad()
def outputs(backend: ModelBackend[Any]) -> Tensor:
    """Return the first output of this rank's packs: log-probabilities, or values."""
    batch = random_rollouts(0, vocabulary=200)
    packs = pack_rows(
        batch.sequences,
        np.arange(len(batch)),
        budget=400,
        rank=dist.get_rank(),
        ranks=2,
        shared_prefix_packing=False,
    )
    return torch.cat([backend.forward(PackTensors.of(pack, CPU))[0] for pack in packs])


def compare(
    kind: ModelKind[Any], config: RunConfig, settings: ModelRoleConfig, directory: Path
) -> None:
    """Compare weights, buffers, what is trained, and outputs; collective."""
    with loaded_whole():
        whole = built(kind, config, settings, directory)
    assert not whole.module.own_rows
    own = built(kind, config, settings, directory)

    expected = dict(whole.module.named_parameters())
    found = dict(own.module.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        one = found[name]
        assert isinstance(one, DTensor), name
        assert one.requires_grad == parameter.requires_grad, name
        assert one.dtype == parameter.dtype, name
        assert torch.equal(one.to_local(), parameter.to_local()), name
    buffers = dict(own.module.named_buffers())
    for name, buffer in whole.module.named_buffers():
        assert torch.equal(buffer.float(), buffers[name].float()), name

    assert torch.equal(outputs(own), outputs(whole))
    exported = {name: tensor.clone() for name, tensor in whole.weights()}
    count = 0
    for name, tensor in own.weights():
        assert torch.equal(tensor, exported[name]), name
        count += 1
    assert count == len(exported)


def compare_on_a_rank(directory: Path) -> None:
    policy = RunConfig.model_validate({"model": {"path": str(directory)}, **SETTINGS})
    frozen = ModelRoleConfig.model_validate({"compute_dtype": "bfloat16"})
    for family in ("gemma2", "qwen3_moe"):
        compare(LANGUAGE_MODEL, policy, policy.policy, directory / family)
    compare(LANGUAGE_MODEL, policy, frozen, directory / "gemma2")
    compare(value_model(), policy, policy.policy, directory / "reward")  # one row, on one rank

    lora = {"path": str(directory), "lora": {"rank": 4}}
    adapted = RunConfig.model_validate({**SETTINGS, "model": lora})
    compare(LANGUAGE_MODEL, adapted, adapted.policy, directory / "qwen3_moe")
    bfloat16 = adapted.policy.model_copy(update={"compute_dtype": "bfloat16"})
    compare(value_model(head_seed=1), adapted, bfloat16, directory / "llama")


def check_gathered_head(directory: Path) -> None:
    """An LM head alone becomes whole on every rank, tied or not."""
    config = RunConfig.model_validate({"model": {"path": str(directory)}, **SETTINGS})
    for family in ("llama", "gemma2"):
        load = language_model(directory / family, torch.bfloat16)
        model, rows = model_setup.load_on_ranks(load, config.policy, CPU)
        assert rows is not None
        head: Any = model.get_output_embeddings()
        gather(head, rows, CPU)
        whole: Any = load().get_output_embeddings()
        assert torch.equal(head.weight, whole.weight)


def check_verdicts(directory: Path) -> None:
    """The passes of all ranks together lead to the verdict of one that has the whole model."""
    config = RunConfig.model_validate({"model": {"path": str(directory)}, **SETTINGS})

    def verdict(name: str, family: str) -> ForwardCheck:
        os.environ["RLSYS_CACHE"] = str(directory / name)
        return prepare(LANGUAGE_MODEL, config, config.policy, directory / family, CPU)[1]

    for family in ("llama", "bloom"):
        with loaded_whole():
            expected = verdict("whole", family)
        assert verdict("rows", family) == expected, family
        assert expected.packing == (family == "llama")

    with pytest.MonkeyPatch.context() as patch:  # as a kernel that computes in bfloat16
        patch.setattr(forward_check, "LOW_PRECISION_KERNELS", ("sdpa",))
        with loaded_whole():
            expected = verdict("whole in bfloat16", "llama")
        assert verdict("rows in bfloat16", "llama") == expected
        assert expected.error > 1e-3, "it was rounded"


def one_of_two(directory: Path, rank: int, addresses: Any, results: Any) -> None:
    """Run the comparisons on a rank, in a process of its own."""
    torch.set_num_threads(1)
    store = open_rendezvous("127.0.0.1", 2) if rank == 0 else None
    if store is not None:
        addresses.put(f"127.0.0.1:{store.port}")
        address = f"127.0.0.1:{store.port}"
    else:
        address = addresses.get(timeout=300)
    join_process_group(address, rank, 2, store)
    try:
        check_verdicts(directory)
        check_gathered_head(directory)
        compare_on_a_rank(directory)
        results.put(None)
    except BaseException as error:
        results.put(repr(error))
        raise
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_on_two_ranks_they_equal_models_that_were_loaded_whole(tmp_path: Path):
    for family in ("llama", "gemma2", "qwen3_moe", "bloom"):
        build_family(family, tmp_path / family)
    head = load_value_model(tmp_path / "llama", dtype=torch.float32, attention="sdpa", head_seed=1)
    head.save_pretrained(tmp_path / "reward")
    context = multiprocessing.get_context("spawn")
    addresses: Any = context.Queue()
    results: Any = context.Queue()
    arguments = [(tmp_path, rank, addresses, results) for rank in (0, 1)]
    processes = [context.Process(target=one_of_two, args=args) for args in arguments]
    try:
        for process in processes:
            process.start()
        assert [results.get(timeout=300) for _ in processes] == [None, None]
    finally:
        for process in processes:
            process.join(timeout=20)
            process.kill()
