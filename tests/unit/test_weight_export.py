"""A policy rank exports its weights bucket by bucket, and an engine loads them."""

from __future__ import annotations

import multiprocessing
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from rlsys.config import RunConfig
from rlsys.models.checkpoint_names import to_checkpoint, untied_state_dict
from rlsys.models.weights import Bucket, StoredWeights, buckets_of
from tests.support.model_families import build_family, load_family
from workers.generation.engines.transformers import TransformersEngine
from workers.generation.worker import differing_groups
from workers.training.policy import PolicyWorker
from workers.weight_sync.transports import make_transport


def config(directory: Path, weights: Path, dtype: str, ranks: int = 1) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": str(directory), "attention": "sdpa"},
            "data": {"max_prompt_tokens": 100},  # some models have 512 positions
            "generation": {"engine": "transformers", "dtype": dtype, "max_tokens": 28},
            "policy": {"ranks": ranks, "compute_dtype": "float32", "microbatch_tokens": 64},
            "sync": {"transport": "disk", "directory": str(weights), "bucket_mb": 1},
        }
    )


@contextmanager
def one_rank(settings: RunConfig) -> Iterator[PolicyWorker]:
    """Start a policy of one rank in this process."""
    worker = PolicyWorker(settings, settings.model.path, 0, 1)
    try:
        worker.setup(worker.rendezvous())
        yield worker
    finally:
        worker.shutdown()


@torch.no_grad()
def set_weights(worker: PolicyWorker, model: PreTrainedModel) -> None:
    """Copy the weights of a model into the only shard of a policy."""
    state = worker.backend.module.model.state_dict()
    for name, weight in untied_state_dict(model).items():
        state[name].to_local().copy_(weight)


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", "bfloat16"), ("qwen3_moe", "float32"), ("gpt2", "float32")]
)
def test_an_engine_gets_exactly_the_weights_of_the_policy(family: str, dtype: str, tmp_path: Path):
    build_family(family, tmp_path / "model")
    settings = config(tmp_path / "model", tmp_path / "weights", dtype)
    engine = TransformersEngine(settings, settings.model.path)
    expected = load_family(tmp_path / "model", seed=5)
    probe = [np.arange(5, 5 + length, dtype=np.int32) for length in (3, 30)]

    with one_rank(settings) as worker:
        set_weights(worker, expected)
        stored = worker.export_weights(3)
        trainer = worker.probe_logprobs(probe, 1.0)
    assert stored is not None
    assert stored.manifest.version == 3
    sent = to_checkpoint(expected, untied_state_dict(expected))
    itemsize = getattr(torch, dtype).itemsize
    assert stored.manifest.num_bytes == sum(t.numel() * itemsize for t in sent.values())

    transport = make_transport(settings.sync)
    engine.install_weights(transport.read(stored))
    state: Any = engine._model.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor.to(getattr(torch, dtype))), name
    names = [entry.name for entry in stored.manifest.entries]
    assert differing_groups(transport.read(stored), engine.weight_checksums(names)) == []
    if dtype == "float32":
        found = engine.probe_logprobs(probe)
        np.testing.assert_allclose(np.concatenate(found), np.concatenate(trainer), atol=1e-4)


def test_buffers_keep_their_type(tmp_path: Path):
    """The trainer reads the biases of the router in float32; in bfloat16 those of 8.01 to 8.04 tie.

    An engine reads them in float32 from the model's file.
    """
    build_family("deepseek_v3", tmp_path / "model")
    settings = config(tmp_path / "model", tmp_path / "weights", "bfloat16")
    engine = TransformersEngine(settings, settings.model.path)
    biases = torch.tensor([8.01, 8.02, 8.03, 8.04])
    with one_rank(settings) as worker:
        state = worker.backend.module.model.state_dict()
        (name,) = (name for name in state if name.endswith("e_score_correction_bias"))
        state[name].copy_(biases)
        stored = worker.export_weights(0)

    assert stored is not None
    engine.install_weights(make_transport(settings.sync).read(stored))
    held: Any = engine._model.state_dict()
    assert torch.equal(held[name], biases)
    types = {entry.name: entry.dtype for entry in stored.manifest.entries}
    assert types.pop(name) == "float32"
    assert set(types.values()) == {"bfloat16"}


class Watching:
    """A transport that counts how many arrays of earlier buckets are alive at each new bucket."""

    def __init__(self) -> None:
        self.alive: list[int] = []

    def write(self, version: int, buckets: Iterator[Bucket], *, keep: Any) -> StoredWeights | None:
        seen: list[weakref.ref[Any]] = []
        for bucket in buckets:
            self.alive.append(sum(array() is not None for array in seen))
            seen += [weakref.ref(array) for array in bucket.arrays]
            del bucket
        return None


def test_one_bucket_at_a_time_is_in_memory():
    made: list[weakref.ref[torch.Tensor]] = []

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(40):
            tensor = torch.full((1000,), float(number))
            made.append(weakref.ref(tensor))
            # The consumer holds the weight before this one at most.
            assert sum(weight() is not None for weight in made) <= 2
            yield str(number), tensor
            del tensor

    transport = Watching()
    packed = buckets_of(gathered(), dtype=torch.bfloat16, bucket_bytes=10_000)
    transport.write(0, packed, keep=())
    assert len(transport.alive) == 8  # five weights of 2,000 bytes each
    assert max(transport.alive) <= 1  # the last weight of the bucket before


def one_of_two(directory: Path, rank: int, addresses: Queue[Any], results: Queue[Any]) -> None:
    """Export twice, on a rank in a process of its own; rank 0 cannot write the first time."""
    settings = config(directory / "model", directory / "weights", "float32", ranks=2)
    worker = PolicyWorker(settings, settings.model.path, rank, 2)
    if rank == 0:
        address = worker.rendezvous()
        addresses.put(address)
    else:
        address = addresses.get(timeout=60)
    worker.setup(address)

    refusal = ""
    try:
        worker.export_weights(0)
    except ValueError as error:
        refusal = str(error)
    results.put((rank, refusal))
    if rank == 0:
        (directory / "weights" / "of_another_program").unlink()
    results.put((rank, worker.export_weights(1)))
    worker.shutdown()


def test_ranks_do_not_wait_for_a_rank_0_that_cannot_write(tmp_path: Path):
    build_family("llama", tmp_path / "model")
    foreign = tmp_path / "weights" / "of_another_program"
    foreign.parent.mkdir()
    foreign.touch()
    context = multiprocessing.get_context("spawn")
    addresses: Any = context.Queue()
    results: Any = context.Queue()
    arguments = [(tmp_path, rank, addresses, results) for rank in (0, 1)]
    processes = [context.Process(target=one_of_two, args=args) for args in arguments]
    for process in processes:
        process.start()
    try:
        answers = [results.get(timeout=200) for _ in range(4)]
    finally:
        for process in processes:
            process.kill()
            process.join()

    of_rank = {rank: [found for one, found in answers if one == rank] for rank in (0, 1)}
    assert of_rank[1] == ["", None]
    refusal, stored = of_rank[0]
    assert "holds other files" in refusal
    found = dict(make_transport(config(tmp_path, foreign.parent, "float32").sync).read(stored))
    expected = load_file(tmp_path / "model" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
