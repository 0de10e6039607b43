"""A weight sync from an FSDP2 policy into a real engine, proven by the log-probs of both sides.

    update -> backend.weights() -> shards -> engine.install_weights -> log-probs of a probe

The shards pass from hand to hand here; in a run Ray's object store carries them.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.gpu_check.attention import synchronize
from benchmarks.gpu_check.catalogue import Place
from benchmarks.gpu_check.examples import packs_of
from benchmarks.gpu_check.policy import (
    SMALL,
    TINY,
    Optimizer,
    Role,
    backend_of,
    join,
    packed,
    save_random_model,
)
from benchmarks.gpu_check.results import Figure, Finding, at_least, within
from benchmarks.gpu_check.update import likelihood_loss, sizes_of
from rlsys.data.sequences import TokenSequences
from rlsys.models.loading import load_causal_lm
from rlsys.models.weights import StoredWeights, pack_weights, unpack_weights
from workers.generation.engines.engine import RolloutEngine
from workers.generation.engines.transformers import TransformersEngine
from workers.training.backends.fsdp2 import FSDP2Backend
from workers.training.losses import backward_passes
from workers.training.packed_model import PackTensors

# The bounds of `workers.weight_sync.synchronizer` on the mean difference after a sync.
LIMIT = {"float32": 0.01, "bfloat16": 0.15}
# The updates before the sync must change the weights more than the bound, or it proves nothing.
LEAST_CHANGE = 4.0
UPDATES = 6
LEARNING_RATE = 1e-3
TINY_LEARNING_RATE = 3e-3  # a model of 0.1 M parameters needs larger steps


@dataclass(frozen=True, kw_only=True)
class Generation:
    """`RunConfig.generation`, as far as the transformers engine reads it."""

    dtype: str


@dataclass(frozen=True, kw_only=True)
class Data:
    """`RunConfig.data`, as far as the transformers engine reads it."""

    max_prompt_tokens: int


@dataclass(frozen=True, kw_only=True)
class Model:
    """`RunConfig.model`, as far as the transformers engine reads it."""

    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class EngineFields:
    """The fields of a `RunConfig` that the transformers engine reads."""

    generation: Generation
    data: Data
    model: Model = Model()


def transformers_engine(directory: Path, dtype: str) -> RolloutEngine:
    """Start the transformers engine."""
    fields = EngineFields(
        generation=Generation(dtype=dtype), data=Data(max_prompt_tokens=64), model=Model()
    )
    return TransformersEngine(fields, str(directory))


def vllm_engine(directory: Path, dtype: str, *, longest: int = 256) -> RolloutEngine:
    """Start vLLM."""
    from rlsys.config import RunConfig
    from workers.generation.engines.vllm import VLLMEngine

    config = RunConfig.model_validate(
        {
            "data": {"max_prompt_tokens": longest // 2},
            "generation": {
                "engine": "vllm",
                "dtype": dtype,
                "max_tokens": longest - longest // 2,
                "gpu_memory_utilization": 0.3,
            },
        }
    )
    return VLLMEngine(config, str(directory))


def trained_backend(directory: Path, dtype: str, device: torch.device) -> FSDP2Backend:
    """Load a model as the policy."""
    model = load_causal_lm(directory, dtype=torch.float32, attention="sdpa")
    nn.Module.to(model, device)
    tiny = model.config.get_text_config().hidden_size == TINY.hidden
    rate = TINY_LEARNING_RATE if tiny else LEARNING_RATE
    role = Role(compute_dtype=dtype, optimizer=Optimizer(learning_rate=rate))
    return backend_of(packed(model, "sdpa"), role, device, directory)


def update(backend: FSDP2Backend, texts: TokenSequences) -> None:
    """Change the weights visibly."""
    packs = packs_of(texts, budget=4096, shares=False)
    for _ in range(UPDATES):
        for _ in backward_passes(backend, packs, likelihood_loss, sizes_of(packs)):
            pass
        backend.step(backend.optimizer.defaults["lr"])


@torch.no_grad()
def trainer_logprobs(backend: FSDP2Backend, texts: TokenSequences) -> NDArray[np.float32]:
    """Return the policy's log-probabilities of all tokens but the first of each text."""
    flat = np.zeros(len(texts.token_ids), dtype=np.float32)
    for pack in packs_of(texts, budget=4096, shares=False):
        result = backend.forward(PackTensors.of(pack, backend.device))
        flat[pack.flat_positions] = result.logprobs.cpu().numpy()
    return flat[texts.loss_mask]


def engine_logprobs(engine: RolloutEngine, probe: list[NDArray[np.int32]]) -> NDArray[np.float32]:
    """Return the engine's log-probabilities of the same tokens."""
    return np.concatenate(engine.probe_logprobs(probe))


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The trainer's side of a sync."""

    stored: StoredWeights
    expected: NDArray[np.float32]  # log-probs of the probe
    seconds: float  # of gathering and packing


def probe_sequences() -> list[NDArray[np.int32]]:
    """Return the sequences on which both sides are compared."""
    rng = np.random.default_rng(0)
    return [rng.integers(3, 300, length, dtype=np.int32) for length in (9, 24, 40)]


def train_and_export(directory: Path, dtype: str) -> Exported:
    """Train the model in `directory` for some updates, and pack its weights."""
    device = join()
    backend = trained_backend(directory, dtype, device)
    texts = TokenSequences.of_texts(probe_sequences())
    update(backend, texts)
    expected = trainer_logprobs(backend, texts)

    synchronize(device)
    began = time.perf_counter()
    stored = pack_weights(backend.weights(), version=1, dtype=getattr(torch, dtype))
    seconds = time.perf_counter() - began
    return Exported(stored=stored, expected=expected, seconds=seconds)


def in_another_process(directory: Path, dtype: str) -> Exported:
    """Run `train_and_export` in a process of its own, as a run does.

    vLLM has a process group of its own, and a process can have only one.
    """
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawned) as pool:
        return pool.submit(train_and_export, directory, dtype).result()


def sync(
    place: Place,
    start: Callable[[Path, str], RolloutEngine],
    export: Callable[[Path, str], Exported],
) -> Finding:
    """Train a model, give its weights to an engine and compare the log-probs before and after."""
    dtype = "float32" if place.small else "bfloat16"
    directory = place.folder / "model"
    directory.mkdir()
    save_random_model(TINY if place.small else SMALL, directory, place.device)

    engine = start(directory, dtype)
    exported = export(directory, dtype)
    probe = probe_sequences()
    stale = np.abs(engine_logprobs(engine, probe) - exported.expected)

    began = time.perf_counter()
    engine.install_weights(unpack_weights(*exported.stored))
    synchronize(place.device)
    installed = time.perf_counter() - began
    fresh = np.abs(engine_logprobs(engine, probe) - exported.expected)
    return finding(exported, stale, fresh, dtype, installed)


def finding(
    exported: Exported,
    stale: NDArray[np.float32],
    fresh: NDArray[np.float32],
    dtype: str,
    installed: float,
) -> Finding:
    """Return what a sync has shown.

    Args:
        stale, fresh: differences of the log-probs before and after it.
        installed: seconds that the engine took.
    """
    before, after, limit = float(stale.mean()), float(fresh.mean()), LIMIT[dtype]
    figures = (
        Figure(name="mean log-prob difference before the sync", value=before, unit="nats"),
        Figure(name="mean log-prob difference after the sync", value=after, unit="nats"),
        Figure(name="largest log-prob difference after it", value=float(fresh.max()), unit="nats"),
        Figure(name="weights", value=exported.stored.manifest.num_bytes / 2**20, unit="MiB"),
        Figure(name="gathering and packing them", value=exported.seconds, unit="s"),
        Figure(name="installing them", value=installed, unit="s"),
        Figure(
            name="copying as many bytes in host memory",
            value=copy_seconds([array for part in exported.stored.parts for array in part]),
            unit="s",
        ),
    )
    faults = within("mean log-prob difference after the sync", after, limit)
    faults += at_least("mean log-prob difference before the sync", before, LEAST_CHANGE * limit)
    return Finding(figures=figures, faults=faults)


def copy_seconds(shards: list[NDArray[np.uint8]]) -> float:
    """Return the seconds in which the bytes of some arrays are copied in host memory."""
    copies = [shard.copy() for shard in shards]
    began = time.perf_counter()
    for copy, shard in zip(copies, shards, strict=True):
        np.copyto(copy, shard)
    return time.perf_counter() - began


def transformers(place: Place) -> Finding:
    """Check the transformers engine."""
    return sync(place, transformers_engine, train_and_export)


def vllm(place: Place) -> Finding:
    """Check vLLM."""
    return sync(place, vllm_engine, in_another_process)
