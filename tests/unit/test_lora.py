"""Adapters of a policy rank: gradient, merged weights, PEFT's layout, the reference, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from rlsys.config import ModelConfig, RunConfig
from rlsys.export import main as export
from rlsys.models import resolve_model
from rlsys.models.adapters import merge_adapters
from rlsys.models.loading import UnsupportedModelError, load_causal_lm
from rlsys.models.sharded_state import ShardedState
from tests.support.model_families import build_family, load_family
from tests.support.rollout_examples import random_rollouts, train_batch
from tests.support.saved_weights import saved_weights
from workers.training.backends import fsdp2
from workers.training.policy import PolicyWorker

RANK, ALPHA = 4, 12.0
SCALE = ALPHA / RANK
COMPARED = ("policy/loss", "policy/grad_norm", "policy/entropy")
SUFFIXES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def config(directory: Path, **changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "model": {"path": str(directory), "lora": {"rank": RANK, "alpha": ALPHA}},
        "data": {"max_prompt_tokens": 64},
        "generation": {"dtype": "float32", "max_tokens": 64},
        "policy": {
            "compute_dtype": "float32",
            "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1},
        },
    }
    for name, value in changes.items():
        section, _, field = name.partition("__")
        tree[section] = {**tree[section], field: value}
    return RunConfig.model_validate(tree)


@contextmanager
def one_rank(settings: RunConfig, directory: Path) -> Iterator[PolicyWorker]:
    """Start a policy of one rank in this process."""
    worker = PolicyWorker(settings, str(directory), 0, 1)
    try:
        worker.setup(worker.rendezvous())
        yield worker
    finally:
        worker.shutdown()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    build_family("llama", directory)
    return directory


def exported(worker: PolicyWorker) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in worker.backend.weights()}


def trained(worker: PolicyWorker) -> dict[str, torch.Tensor]:
    """Return copies of the trained parameters."""
    named = worker.backend.module.named_parameters()
    return {name: p.full_tensor().detach().clone() for name, p in named if p.requires_grad}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(torch.arange(3, 30)[None]).logits


def step(worker: PolicyWorker, seed: int = 0) -> Mapping[str, Any]:
    return worker.update(train_batch(random_rollouts(seed)))


def test_the_model_starts_as_its_base_and_only_adapters_move(llama: Path):
    base = load_file(llama / "model.safetensors")
    with one_rank(config(llama), llama) as worker:
        start = exported(worker)
        assert set(start) == set(base)
        for name, tensor in start.items():
            assert torch.equal(tensor, base[name]), name  # B is 0

        before, frozen = trained(worker), dict(worker.backend.module.named_parameters())
        assert set(before) == {
            f"model.model.layers.{layer}.{part}.lora_{letter}.default.weight"
            for layer in (0, 1)
            for part in (
                *(f"self_attn.{name}" for name in SUFFIXES[:4]),
                *(f"mlp.{name}" for name in SUFFIXES[4:]),
            )
            for letter in "AB"
        }
        for seed in range(2):  # A has a gradient from the second update on
            step(worker, seed)
        after = trained(worker)
        for name, tensor in before.items():
            assert (after[name] - tensor).abs().max() > 1e-3, name
        for name, parameter in frozen.items():
            if name not in before:
                assert parameter.grad is None, name
        moved = exported(worker)

    for name, tensor in moved.items():
        adapted = name.split(".")[-2] in SUFFIXES and name.endswith("weight")
        assert torch.equal(tensor, base[name]) != adapted, name
        if adapted:  # of rank RANK exactly
            values = torch.linalg.svdvals(tensor - base[name])
            assert values[RANK - 1] > 1e-4 > 1e-5 > values[RANK:].max(), name


def test_an_update_is_that_of_a_slow_twin(llama: Path):
    """The twin multiplies W + scale * B A out and differentiates the loss by A and B."""
    batch = train_batch(random_rollouts(3))
    with one_rank(config(llama), llama) as worker:
        start = trained(worker)
        worker.update(batch)
        found = trained(worker)

    twin = load_causal_lm(llama, dtype=torch.float32, attention="eager")
    base = {name: tensor.detach() for name, tensor in twin.state_dict().items()}
    parts = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    named = dict.fromkeys(name.partition(".lora_")[0] for name in parts)
    rollouts = batch.rollouts

    def merged() -> dict[str, torch.Tensor]:
        weights = dict(base)
        for layer in named:
            down, up = (parts[f"{layer}.lora_{letter}.default.weight"] for letter in "AB")
            name = layer.removeprefix("model.") + ".weight"
            weights[name] = base[name] + SCALE * (up @ down)
        return weights

    # One update per batch: every ratio is 1, so the loss is -sum A * logprob by the aggregation.
    losses = []
    weights = merged()
    offsets = rollouts.sequence_offsets
    for row in range(len(rollouts)):
        at = slice(offsets[row], offsets[row + 1])
        tokens = torch.from_numpy(rollouts.token_ids[at].astype(np.int64))
        out = torch.func.functional_call(twin, weights, (tokens[None],)).logits[0, :-1]
        logs = (out / rollouts.temperature).log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        advantages = torch.from_numpy(batch.advantages[at][1:])
        mask = torch.from_numpy(rollouts.response_mask[at][1:])
        losses.append(-(advantages * (logs - logs.detach()).exp())[mask])
    aggregation = config(llama).algorithm.aggregation
    assert aggregation == "sequence_mean", aggregation
    loss = torch.stack([tokens.mean() for tokens in losses]).mean()
    loss.backward()

    optimizer = torch.optim.AdamW(
        parts.values(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )
    gradients = [part.grad for part in parts.values() if part.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    for gradient in gradients:
        gradient.mul_(torch.clamp(1.0 / (norm + 1e-6), max=1.0))
    before = {name: part.detach().clone() for name, part in parts.items()}
    optimizer.step()
    assert norm > 1e-3
    for name, part in parts.items():
        # Adam's first step is lr * g / (|g| + eps): where a gradient is about 0, its sign is
        # rounding. That of every A is, since B is 0.
        big = part.grad is not None and part.grad.abs() > 1e-6
        torch.testing.assert_close(found[name][big], part.detach()[big], rtol=0, atol=1e-5)
        if ".lora_B." in name:
            assert (part - before[name]).abs().max() > 5e-3


def test_merged_weights_and_checkpoint_are_those_of_peft(llama: Path, tmp_path: Path):
    saved, out = tmp_path / "saved", tmp_path / "merged"
    saved.mkdir()
    with one_rank(config(llama), llama) as worker:
        for seed in range(2):
            step(worker, seed)
        worker.save(str(saved))
        ours = exported(worker)
        sequences = [np.arange(3, 30, dtype=np.int32)]
        (probe,) = worker.probe_logprobs(sequences, 1.0)

    base = load_causal_lm(llama, dtype=torch.float32, attention="eager")
    peft = PeftModel.from_pretrained(base, saved)
    with_adapters = logits(peft)
    merged: Any = peft.merge_and_unload()  # pyright: ignore
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)
    tokens = torch.arange(3, 30)
    expected = with_adapters[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    np.testing.assert_allclose(probe, expected.numpy(), atol=2e-5)

    assert not (saved / "model.safetensors").exists()
    merge_adapters(saved, llama, out)
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, ours[name]), name
    model = load_causal_lm(out, dtype=torch.float32, attention="eager")
    torch.testing.assert_close(logits(model), with_adapters, rtol=0, atol=2e-5)
    assert not (out / "adapter_config.json").exists()


def test_a_resumed_rank_goes_on_exactly(llama: Path, tmp_path: Path):
    with one_rank(config(llama), llama) as worker:
        for seed in range(2):
            step(worker, seed)
        worker.save(str(tmp_path))
        expected = step(worker, 2)
        weights = exported(worker)

    with one_rank(config(llama), llama) as worker:
        worker.load(str(tmp_path))
        found = step(worker, 2)
        for name, tensor in exported(worker).items():
            assert torch.equal(tensor, weights[name]), name
    for metric in COMPARED:
        assert found[metric].value == pytest.approx(expected[metric].value, rel=1e-6)


def test_a_rank_does_not_resume_on_a_base_that_has_changed(llama: Path, tmp_path: Path):
    base, saved = tmp_path / "base", tmp_path / "saved"
    shutil.copytree(llama, base)
    saved.mkdir()
    with one_rank(config(base), base) as worker:
        worker.save(str(saved))

    load_family(base, seed=7).save_pretrained(base)
    with (
        one_rank(config(base), base) as worker,
        pytest.raises(ValueError, match=r"^model\.path: the adapters .* other weights .* Restore"),
    ):
        worker.load(str(saved))


def test_one_weight_at_a_time_is_gathered_and_merged(llama: Path, monkeypatch: pytest.MonkeyPatch):
    gathered = fsdp2.gathered
    calls: list[torch.Size] = []

    def counted(tensor: torch.Tensor, wanted: bool) -> torch.Tensor | None:
        calls.append(tensor.shape)
        return gathered(tensor, wanted)

    monkeypatch.setattr(fsdp2, "gathered", counted)
    with one_rank(config(llama), llama) as worker:
        merged = 0
        for name, tensor in worker.backend.weights():
            # Of an adapted weight A is gathered as well; B is merged where it is.
            assert len(calls) in (1, 2), name
            assert calls[-1] == tensor.shape, name
            merged += len(calls) == 2
            calls.clear()
    assert merged == 2 * len(SUFFIXES)


def test_an_exported_checkpoint_is_the_merged_model(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RLSYS_CACHE", str(tmp_path / "cache"))
    saved, out = tmp_path / "saved", tmp_path / "out"
    saved.mkdir()
    with one_rank(config(llama), llama) as worker:
        step(worker)
        worker.save(str(saved))
        expected = exported(worker)
    assert export([str(saved), str(out)]) == 0
    found = saved_weights(out)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not [file for file in out.iterdir() if "adapter" in file.name or "shard" in file.name]


def test_the_path_of_a_checkpoint_is_the_merged_model(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    saved = tmp_path / "saved"
    saved.mkdir()
    with one_rank(config(llama), llama) as worker:
        step(worker)
        worker.save(str(saved))
        expected = exported(worker)

    merged = resolve_model(str(saved), cache=tmp_path / "cache")
    for name, tensor in load_file(merged / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name
    assert resolve_model(str(saved), cache=tmp_path / "cache") == merged

    # Adapters on other weights would be another model.
    base = json.loads((saved / "adapter_base.json").read_text())
    assert base["path"] == str(llama)
    other = tmp_path / "other"
    build_family("llama", other)
    load_family(other, seed=7).save_pretrained(other)
    (saved / "adapter_base.json").write_text(json.dumps({**base, "path": str(other)}))
    with pytest.raises(ValueError, match=r"^model\.path: the adapters .* other weights"):
        resolve_model(str(saved), cache=tmp_path / "cache")
    (saved / "adapter_base.json").write_text(json.dumps({**base, "path": "./gone"}))
    with pytest.raises(ValueError, match=r"^model\.path: .* whose base model is missing: './gone'"):
        resolve_model(str(saved), cache=tmp_path / "cache")

    facts = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**facts, "use_dora": True}))
    with pytest.raises(ValueError, match=r"not plain LoRA .use_dora: True.*merge_and_unload"):
        merge_adapters(saved, llama, tmp_path / "dora")


def test_merging_keeps_dtype_and_files_of_the_base(llama: Path, tmp_path: Path):
    """The base is in two bfloat16 files; the merge is rounded once."""
    base, saved, out = tmp_path / "base", tmp_path / "saved", tmp_path / "out"
    model = load_family(llama, seed=3)
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(base, max_shard_size="100KB")
    assert len([*base.glob("*.safetensors")]) > 1
    for file in llama.glob("token*"):
        (base / file.name).write_bytes(file.read_bytes())
    # Another copy of the weights, which the index does not name.
    save_file({"layers.0.attention.wq.weight": torch.zeros(2)}, base / "consolidated.safetensors")
    saved.mkdir()
    with one_rank(config(base), base) as worker:
        step(worker)
        worker.save(str(saved))
        expected = exported(worker)

    merge_adapters(saved, base, out)
    model = load_causal_lm(out, dtype=torch.bfloat16, attention="eager")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name].bfloat16()), name
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"]} == {*expected}


def test_the_reference_is_the_base(llama: Path):
    rollouts = random_rollouts(5)
    reference_config = config(llama, model__lora={"rank": 0})
    with one_rank(reference_config, llama) as worker:
        expected = worker.logprobs(rollouts).logprobs

    with one_rank(config(llama), llama) as worker:
        for seed in range(2):
            step(worker, seed)
        taken: list[Any] = []
        worker.put_logprobs = lambda *parts, **_: taken.append(worker.logprobs(*parts))
        worker.put_reference_logprobs(rollouts)
        live = worker.logprobs(rollouts).logprobs
        step(worker, 4)  # adapters are on again
        later = worker.logprobs(rollouts).logprobs

    np.testing.assert_allclose(taken[0].logprobs, expected, rtol=0, atol=1e-6)
    assert np.abs(live - expected).max() > 1e-2
    assert np.abs(later - live).max() > 1e-3


def test_in_bfloat16_the_base_is_stored_in_it_and_adapters_in_float32(llama: Path):
    settings = config(llama, policy__compute_dtype="bfloat16")
    full = config(llama, policy__compute_dtype="bfloat16", model__lora={"rank": 0})
    rollouts = random_rollouts(5)
    with one_rank(full, llama) as worker:
        expected = worker.logprobs(rollouts).logprobs

    with one_rank(settings, llama) as worker:
        # The first pass is that of float32 masters, bit by bit.
        np.testing.assert_array_equal(worker.logprobs(rollouts).logprobs, expected)
        dtypes = {
            (parameter.requires_grad, parameter.dtype)
            for parameter in worker.backend.module.parameters()
        }
        assert dtypes <= {(True, torch.float32), (False, torch.bfloat16)}
        buffers = {buffer.dtype for _, buffer in worker.backend.module.named_buffers()}
        assert buffers == {torch.float32}  # the frequencies of RoPE
        before = trained(worker)
        report = step(worker)
        assert np.isfinite(report["policy/grad_norm"].value)
        assert any((after - before[n]).abs().max() > 1e-3 for n, after in trained(worker).items())


def test_chosen_layers_alone_get_adapters(llama: Path):
    lora = {"rank": RANK, "target_modules": ["q_proj", "mlp.down_proj"]}
    with one_rank(config(llama, model__lora=lora), llama) as worker:
        layers = {name.partition(".lora_")[0] for name in trained(worker)}
    assert layers == {
        f"model.model.layers.{layer}.{part}"
        for layer in (0, 1)
        for part in ("self_attn.q_proj", "mlp.down_proj")
    }


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("qkv", r"'qkv' names no linear layer .* Choose of q_proj, k_proj"),
        ("lm_head", r"'lm_head' names no linear layer in the decoder blocks"),
        ("embed_tokens", r"'embed_tokens' names no linear layer"),
    ],
)
def test_targets_that_are_no_linear_layers_are_refused(llama: Path, target: str, message: str):
    settings = config(llama, model__lora={"rank": 2, "target_modules": [target]})
    error = rf"^model\.lora\.target_modules: {message}"
    with pytest.raises(UnsupportedModelError, match=error), one_rank(settings, llama):
        pass


def test_a_model_without_linear_layers_is_refused(tmp_path: Path):
    build_family("gpt2", tmp_path)
    error = r"^model\.lora\.rank: 4 needs linear layers .* GPT2LMHeadModel"
    with pytest.raises(UnsupportedModelError, match=error), one_rank(config(tmp_path), tmp_path):
        pass


def test_a_layer_whose_weight_is_read_directly_is_refused(
    llama: Path, monkeypatch: pytest.MonkeyPatch
):
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        inner = torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
        return torch.nn.functional.linear(inner, self.down_proj.weight)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    error = r"^model\.lora\.target_modules: .* reads the weight of .*down_proj without calling"
    with pytest.raises(UnsupportedModelError, match=error), one_rank(config(llama), llama):
        pass


def test_experts_keep_their_weights_and_attention_is_adapted(tmp_path: Path):
    """transformers holds experts as one tensor; the exported names are those of the checkpoint."""
    build_family("qwen3_moe", tmp_path)
    base = load_file(tmp_path / "model.safetensors")
    with one_rank(config(tmp_path), tmp_path) as worker:
        for seed in range(2):
            step(worker, seed)
        found = exported(worker)
    assert set(found) == set(base)
    moved = {name for name, tensor in found.items() if not torch.equal(tensor, base[name])}
    assert moved
    assert all("self_attn" in name for name in moved)


def test_frozen_parameters_stay_and_all_others_move(llama: Path):
    patterns = ["model.embed_tokens.*", "*.layers.0.*"]
    settings = config(llama, model__lora={"rank": 0}, policy__frozen=patterns)
    base = load_file(llama / "model.safetensors")
    with one_rank(settings, llama) as worker:
        step(worker)
        found = exported(worker)
        optimizer: Any = getattr(worker.backend, "optimizer")  # noqa: B009
        held = sum(len(group["params"]) for group in optimizer.param_groups)
        assert held == len(trained(worker)) < len(base)
    assert set(found) == set(base)
    for name, tensor in found.items():
        frozen = name.startswith(("model.embed_tokens.", "model.layers.0."))
        assert torch.equal(tensor, base[name]) == frozen, name


def test_frozen_parameters_are_saved_without_moments_and_a_rank_resumes(
    llama: Path, tmp_path: Path
):
    patterns = ["model.embed_tokens.*", "*.layers.0.*"]
    settings = config(llama, model__lora={"rank": 0}, policy__frozen=patterns)
    with one_rank(settings, llama) as worker:
        step(worker)
        worker.save(str(tmp_path))
        names = {name.removeprefix("model.") for name in trained(worker)}
        at_save = exported(worker)
        expected = step(worker, 2)
        weights = exported(worker)

    found = saved_weights(tmp_path)
    assert set(found) == set(at_save)
    assert all(torch.equal(found[name], tensor) for name, tensor in at_save.items())
    moments = ShardedState.of(tmp_path).tensors
    assert {name.partition("/")[2] for name in moments} == names

    with one_rank(settings, llama) as worker:
        worker.load(str(tmp_path))
        report = step(worker, 2)
        for name, tensor in exported(worker).items():
            assert torch.equal(tensor, weights[name]), name
    for metric in COMPARED:
        assert report[metric].value == pytest.approx(expected[metric].value, rel=1e-6)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["model.wte*"], r"'model\.wte\*' matches no parameter of LlamaForCausalLM, such as model"),
        (["model.*", "lm_head*"], r"model\.\*, lm_head\* match all parameters"),
    ],
)
def test_patterns_that_match_nothing_or_everything_are_refused(
    llama: Path, patterns: list[str], message: str
):
    settings = config(llama, model__lora={"rank": 0}, policy__frozen=patterns)
    with (
        pytest.raises(UnsupportedModelError, match=rf"^policy\.frozen: {message}"),
        one_rank(settings, llama),
    ):
        pass


def test_a_whole_checkpoint_is_no_checkpoint_of_adapters(llama: Path, tmp_path: Path):
    with one_rank(config(llama, model__lora={"rank": 0}), llama) as worker:
        worker.save(str(tmp_path))
    error = r"^model\.lora\.rank: 4, but .* holds a whole model"
    with (
        one_rank(config(llama), llama) as worker,
        pytest.raises(ValueError, match=error),
    ):
        worker.load(str(tmp_path))


def test_contradictions_are_refused_by_name():
    for change, message in (
        ({"policy": {"frozen": ["model.*"]}}, r"policy\.frozen: model\.\* has no use with"),
        ({"diagnostics": {"gradient": True}}, r"diagnostics\.gradient: true .*rank 8 freezes"),
    ):
        with pytest.raises(ValueError, match=message):
            RunConfig.model_validate({"model": {"lora": {"rank": 8}}, **change})
    for tree, message in (
        (
            {"model": {"lora": {"rank": 8}}, "policy": {"backend": "deepspeed"}},
            r"model\.lora\.rank: 8 is not supported by policy\.backend 'deepspeed'.*fsdp2",
        ),
        (
            {"policy": {"backend": "deepspeed", "frozen": ["model.*"]}},
            r"policy\.frozen: model\.\* is not supported by policy\.backend 'deepspeed'.*fsdp2",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            RunConfig.model_validate(tree)
    assert not ModelConfig().lora.rank


def test_a_foreign_file_name_is_not_merged_in_silence(llama: Path, tmp_path: Path):
    """The adapters name a layer that the base does not have."""
    saved = tmp_path / "saved"
    saved.mkdir()
    with one_rank(config(llama), llama) as worker:
        worker.save(str(saved))
    weights = load_file(saved / "adapter_model.safetensors")
    renamed = {name.replace("q_proj", "other_proj"): t for name, t in weights.items()}
    save_file(renamed, saved / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"no weight for the adapters of .*other_proj"):
        merge_adapters(saved, llama, tmp_path / "out")
