"""Predicted peaks against the allocator's, for real updates and passes of an FSDP2 backend.

Every allocation of torch on the CPU is recorded, so that the peak is that of live tensors, exactly.
benchmarks/memory_plan.py compares resident memory of whole processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from rlsys.config import PolicyConfig
from rlsys.data.packing import Pack, pack_rows
from rlsys.plan.roles import Peak, RankSettings, forward_moments, resting, update_moments
from rlsys.plan.shapes import ModelShape
from tests.support.peak_memory import peak_bytes
from tests.support.rollout_examples import rollouts
from workers.training.backends.fsdp2 import FSDP2Backend, build
from workers.training.packed_attention import register_packed_attention
from workers.training.packed_model import PackedCausalLM, PackTensors

CPU = torch.device("cpu")
PROMPT, SAMPLES = 16, 4
WIDE = ModelShape(
    hidden=64,
    layers=2,
    heads=4,
    kv_heads=2,
    intermediate=128,
    vocabulary=4096,
    head_dim=16,
    tied=True,
)
DEEP = ModelShape(
    hidden=128,
    layers=6,
    heads=4,
    kv_heads=4,
    intermediate=512,
    vocabulary=512,
    head_dim=32,
)


@dataclass(frozen=True, kw_only=True)
class Example:
    """A model, the length of its responses, and the moment at which its update should peak."""

    shape: ModelShape
    response: int
    chunk: int
    peak: str
    dtype: str = "float32"
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        return PROMPT + SAMPLES * (self.response - 1)

    @property
    def settings(self) -> RankSettings:
        return RankSettings(
            ranks=1,
            compute_bytes=2 if self.dtype == "bfloat16" else 4,
            tokens=self.tokens,
            response_tokens=SAMPLES * self.response,
            chunk_tokens=self.chunk,
            kernel="shared_prefix",
            group_tokens=self.tokens,
            gradient_checkpointing=self.checkpointing,
        )


EXAMPLES = {
    "logits": Example(shape=WIDE, response=24, chunk=32, peak="logits"),
    "logits in one chunk": Example(shape=WIDE, response=24, chunk=512, peak="logits"),
    "activations": Example(shape=DEEP, response=80, chunk=64, peak="last block"),
    "checkpointing": Example(
        shape=DEEP, response=80, chunk=64, peak="last block", checkpointing=True
    ),
    "bfloat16": Example(shape=DEEP, response=80, chunk=64, peak="last block", dtype="bfloat16"),
    "bfloat16 logits": Example(shape=WIDE, response=24, chunk=32, peak="logits", dtype="bfloat16"),
    "end of the backward pass": Example(
        shape=replace(WIDE, tied=False), response=2, chunk=4, peak="embedding gradient"
    ),
}


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """Start a process group of one rank in this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def backend_of(example: Example, directory: Path) -> FSDP2Backend:
    shape = example.shape
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation(register_packed_attention("sdpa"))
    settings = PolicyConfig(
        compute_dtype="bfloat16" if example.dtype == "bfloat16" else "float32",
        gradient_checkpointing=example.checkpointing,
    )
    return build(PackedCausalLM(model, chunk_tokens=example.chunk), settings, CPU, directory)


def packs_of(example: Example) -> list[Pack]:
    """Return two packs of random tokens, a group each."""
    rng = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        return rng.integers(3, example.shape.vocabulary, count).tolist()

    drawn = [(tokens(PROMPT), [tokens(example.response) for _ in range(SAMPLES)]) for _ in range(2)]
    sequences = rollouts(drawn).sequences
    packs = pack_rows(
        sequences,
        np.arange(len(sequences)),
        budget=example.tokens,
        rank=0,
        ranks=1,
        shared_prefix_packing=True,
    )
    assert [pack.num_tokens for pack in packs] == [example.tokens] * 2
    return packs


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_peak_of_an_update_is_the_predicted_one(name: str, tmp_path: Path):
    example = EXAMPLES[name]
    backend, packs = backend_of(example, tmp_path), packs_of(example)

    def update() -> None:
        for pack in packs:
            result = backend.forward(PackTensors.of(pack, CPU))
            backend.backward(-result.logprobs.mean())
            del result
        backend.step(1e-3)

    update()  # from here on there are moments
    held = sum(resting(example.shape, example.settings).values())
    measured = held + peak_bytes(update)
    predicted = Peak.of("update", update_moments(example.shape, example.settings)).host
    assert predicted.name == example.peak
    assert predicted.host_bytes == pytest.approx(measured, rel=0.05)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", ["logits", "activations", "bfloat16", "bfloat16 logits"])
def test_the_peak_of_logprobs_is_the_predicted_one(name: str, tmp_path: Path):
    example = EXAMPLES[name]
    backend, packs = backend_of(example, tmp_path), packs_of(example)

    @torch.no_grad()
    def logprobs() -> None:
        for pack in packs:
            backend.forward(PackTensors.of(pack, CPU))

    masters = {"masters": resting(example.shape, example.settings)["masters"]}
    measured = masters["masters"] + peak_bytes(logprobs)
    moments = forward_moments(example.shape, example.settings, masters)
    assert Peak.of("log-probs", moments).host.host_bytes == pytest.approx(measured, rel=0.05)
