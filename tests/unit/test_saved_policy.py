"""A policy rank saves a model that other programs load, and from which it continues itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlsys.config import GenerationConfig, ModelConfig, PolicyConfig, RunConfig
from rlsys.models.loading import load_causal_lm, load_tokenizer
from tests.support.model_families import build_family, load_family
from workers.training.policy import PolicyWorker


def config(directory: Path, engine: str = "vllm") -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(directory), attention="sdpa"),
        generation=GenerationConfig.model_validate({"engine": engine, "dtype": "float32"}),
        policy=PolicyConfig(compute_dtype="float32", microbatch_tokens=32),
    )


@contextmanager
def one_rank(directory: Path, engine: str = "vllm") -> Iterator[PolicyWorker]:
    """Start a policy of one rank in this process."""
    worker = PolicyWorker(config(directory, engine), str(directory), 0, 1)
    try:
        worker.setup(worker.rendezvous())
        yield worker
    finally:
        worker.shutdown()


@torch.no_grad()
def set_weights(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Give the only rank of a model other weights."""
    for name, parameter in model.state_dict().items():
        parameter.to_local().copy_(weights[name])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(torch.arange(3, 30)[None]).logits


@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_a_saved_policy_has_the_names_of_its_checkpoint_and_loads_everywhere(
    family: str, tmp_path: Path
):
    model = tmp_path / "model"
    saved = tmp_path / "saved"
    build_family(family, model)
    (model / "modeling_mine.py").write_text("# code\n")
    saved.mkdir()

    with one_rank(model) as worker:
        inner: Any = worker.backend.module.model
        expected = load_family(model, seed=5)
        set_weights(inner, expected.state_dict())
        worker.save(str(saved))

        written = load_file(saved / "model.safetensors")
        assert set(written) == set(load_file(model / "model.safetensors"))
        assert (saved / "modeling_mine.py").exists()
        reloaded = load_causal_lm(saved, dtype=torch.float32, attention="eager").eval()
        torch.testing.assert_close(logits(reloaded), logits(expected), rtol=0, atol=0)
        assert load_tokenizer(saved).eos_token_id == load_tokenizer(model).eos_token_id

        set_weights(inner, load_family(model, seed=6).state_dict())
        worker.load(str(saved))
        for name, tensor in expected.state_dict().items():
            assert torch.equal(inner.state_dict()[name].full_tensor(), tensor), name


def test_a_probe_of_different_lengths_is_the_models_own_forward(tmp_path: Path):
    build_family("llama", tmp_path)
    sequences = [np.arange(4, 4 + length, dtype=np.int32) for length in (9, 2, 60)]
    with one_rank(tmp_path) as worker:
        found = worker.probe_logprobs(sequences, 1.0)

    model = load_causal_lm(tmp_path, dtype=torch.float32, attention="eager").eval()
    for sequence, logprobs in zip(sequences, found, strict=True):
        tokens = torch.from_numpy(sequence.astype(np.int64))
        with torch.no_grad():
            logs = model(tokens[None]).logits[0, :-1].log_softmax(-1)
        own = logs.gather(1, tokens[1:, None])[:, 0].numpy()
        np.testing.assert_allclose(logprobs, own, atol=1e-5)


def test_a_model_whose_names_cannot_be_mapped_back_is_refused_for_vllm_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    build_family("qwen3_moe", tmp_path)
    monkeypatch.setattr(
        "transformers.core_model_loading.revert_weight_conversion", lambda model, weights: weights
    )
    message = (
        r"^generation\.engine: 'vllm' .* 'qwen3_moe'.*experts.*"
        r"--generation\.engine transformers"
    )
    with pytest.raises(ValueError, match=message), one_rank(tmp_path):
        pass

    with one_rank(tmp_path, "transformers"):
        pass
