"""Seconds and memory of one weight sync against a plain copy of the same bytes.

    python -m benchmarks.weight_sync
    python -m benchmarks.weight_sync --models random-0.5b --engine transformers
    python -m benchmarks.weight_sync --transport disk --probe-every 0

One policy rank and one generation worker, without training: every sync sends all weights. The copy
is `numpy.copyto` between two warm buffers, made right before each sync, so that both meet the same
load of the machine. The figures are the fastest of all repetitions after the first. Memory is
what a process has allocated beyond its state before the sync, at its highest; shared memory is
counted as the object store's.

The work on one bucket of 64 MiB without processes, next to a copy of it:

    python -m benchmarks.weight_sync --pieces

Results are recorded in docs/measurements.md.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.grpo_math import on_cpu
from recipes.wiring import probe_tokens, start_workers
from rlsys.config import RunConfig
from rlsys.config.command_line import evolve
from rlsys.config.hardware import detect_hardware
from rlsys.data.prompt_stream import load_prompts
from rlsys.metrics import values
from rlsys.models import resolve_model
from rlsys.models.loading import load_tokenizer, parameter_count
from rlsys.models.weights import StoredWeights, pack_weights, unpack_weights
from rlsys.run.model_checks import ModelDirectories
from workers.cluster import Cluster

MODELS = ("smollm2-135m", "random-0.5b")
# Shapes of random models: hidden size, size of the MLP, layers, heads, heads of keys.
SHAPES = {
    "random-0.1b": (768, 2048, 12, 12, 4),
    "random-0.5b": (1280, 3456, 24, 20, 4),
    "random-1b": (1792, 4864, 26, 28, 4),
}
SAMPLE_S = 0.003
MIB = 2**20
PARTS = ("time/sync_export", "time/sync_load", "time/sync_probe")


def model_directory(name: str, scratch: Path) -> Path:
    """Return the directory of a model, which is built if it is a random one."""
    if name not in SHAPES:
        return resolve_model(name)

    hidden, mlp, layers, heads, key_heads = SHAPES[name]
    tokenizer: Any = load_tokenizer(resolve_model("tiny"))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32768,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(scratch / name)
    tokenizer.save_pretrained(scratch / name)
    return scratch / name


def make_config(path: Path, arguments: argparse.Namespace, scratch: Path) -> RunConfig:
    """Return the configuration of a run with that model."""
    gib = parameter_count(path) * (2 if arguments.dtype == "bfloat16" else 4) / 2**30
    changes: dict[str, object] = {
        "model.path": str(path),
        "generation.engine": arguments.engine,
        "generation.dtype": arguments.dtype,
        "generation.max_tokens": 32,
        "generation.probe_every": max(1, arguments.probe_every),
        "policy.compute_dtype": arguments.dtype,
        "algorithm.kl.coefficient": 0.0,
        "sync.transport": arguments.transport,
        "sync.bucket_mb": arguments.bucket_mb,
        "cluster.object_store_gib": max(1.0, 2.5 * gib),
    }
    if arguments.probe_every == 0:
        changes["generation.logprob_difference_tolerance"] = 0.0
        del changes["generation.probe_every"]
    if arguments.transport == "disk":
        changes["sync.directory"] = str(scratch / "weights")
    return evolve(on_cpu(detect_hardware()), changes)


class PeakMemory:
    """The most private memory that each of some processes holds while it is watched, in bytes."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self.above = dict.fromkeys(pids, 0)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Sample until the block ends."""
        before = {name: _private(pid) for name, pid in self._pids.items()}
        ended = threading.Event()

        def sample() -> None:
            while not ended.wait(SAMPLE_S):
                for name, pid in self._pids.items():
                    self.above[name] = max(self.above[name], _private(pid) - before[name])

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _private(pid: int) -> int:
    """Return the private memory of a process, without shared and mapped pages, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"process {pid} does not say how much memory it has")


def plain_copy(source: np.ndarray, target: np.ndarray) -> float:
    """Return the seconds of one copy."""
    start = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - start


async def measure(path: Path, config: RunConfig, repetitions: int) -> dict[str, Any]:
    """Start the two actors, and return the fastest figures of some syncs."""
    prompts = load_prompts(config, load_tokenizer(path))
    cluster = Cluster.connect(config)
    try:
        probe = probe_tokens(config, prompts, path)
        models = ModelDirectories.same(path)
        workers = await start_workers(cluster, config, models, probe, notify=print)
        policy: Any = workers.policy
        weights: Any = workers.weights
        engine = weights._pool.members[0].present
        pids = {
            "policy": await policy.workers[0].__ray_call__.remote(lambda _: os.getpid()),
            "engine": await engine.__ray_call__.remote(lambda _: os.getpid()),
            "driver": os.getpid(),
        }
        first = values(await workers.weights.sync(0))
        source = np.ones(int(first["sync/bytes"]), dtype=np.uint8)
        target = np.ones_like(source)
        copies, syncs, memory = [], [], PeakMemory(pids)
        for version in range(1, repetitions + 1):
            copies.append(plain_copy(source, target))
            start = time.perf_counter()
            with memory.watched():
                report = values(await workers.weights.sync(version))
            syncs.append({"sync": time.perf_counter() - start, **report})
    finally:
        cluster.shutdown()

    fastest = min(syncs, key=lambda sync: sync["sync"])
    parts = {name: min(s[name] for s in syncs if name in s) for name in PARTS if name in fastest}
    return {
        "bytes": first["sync/bytes"],
        "copy": min(copies),
        "sync": fastest["sync"],
        "parts": parts,
        "probe tokens": sum(map(len, probe)),
        "memory": memory.above,
    }


def pieces(repetitions: int) -> dict[str, float]:
    """Return the least processor time of each piece of work on a bucket of bfloat16, in seconds."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    masters = [torch.randn(2**20, generator=generator) for _ in range(32)]
    source = torch.cat(masters).bfloat16().view(torch.uint8).numpy()
    target = np.ones_like(source)
    named = [(str(number), master) for number, master in enumerate(masters)]

    def build() -> StoredWeights:
        return pack_weights(named, version=0, dtype=torch.bfloat16, bucket_bytes=source.nbytes)

    sent = build()
    work: dict[str, Callable[[], Any]] = {
        "copy": lambda: np.copyto(target, source),
        "adler32 of all bytes (before)": lambda: zlib.adler32(source.data),
        "cast from float32": lambda: [master.bfloat16() for master in masters],
        "cast and checksum: what rank 0 does before the store": build,
        "compare the checksum: what an engine does before it loads": lambda: list(
            unpack_weights(*sent)
        ),
    }
    return {name: min(_seconds(run) for _ in range(repetitions)) for name, run in work.items()}


def _seconds(run: Callable[[], Any]) -> float:
    """Return the processor time of `run`, which other processes of the machine do not lengthen."""
    start = time.thread_time()
    run()
    return time.thread_time() - start


def main() -> None:
    """Measure each model and print its row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=MODELS, help=f"also {', '.join(SHAPES)}")
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--dtype", default="bfloat16", help="of engine and policy")
    parser.add_argument("--transport", default="object_store")
    parser.add_argument("--bucket-mb", type=int, default=64)
    parser.add_argument("--probe-every", type=int, default=1, help="0: no probe at all")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--pieces", action="store_true", help="one bucket, without processes")
    arguments = parser.parse_args()
    if arguments.pieces:
        for piece, seconds in pieces(20 * arguments.repetitions).items():
            print(f"| {piece} | {seconds * 1e3:.1f} |", flush=True)
        return

    print(
        "| model | MiB | copy ms | sync ms | ratio | export ms | load ms | probe ms (tokens) |",
        end="",
    )
    print(" policy + MiB | engine + MiB | driver + MiB |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            path = model_directory(name, scratch)
            config = make_config(path, arguments, scratch)
            found = asyncio.run(measure(path, config, arguments.repetitions))
        print(row(name, found), flush=True)


def row(name: str, found: dict[str, Any]) -> str:
    """Return the line of a table."""
    export, load, probe = (found["parts"].get(part) for part in PARTS)
    checked = "none" if probe is None else f"{probe * 1e3:.0f} ({found['probe tokens']})"
    cells = [
        name,
        f"{found['bytes'] / MIB:.0f}",
        f"{found['copy'] * 1e3:.0f}",
        f"{found['sync'] * 1e3:.0f}",
        f"{found['sync'] / found['copy']:.1f}",
        f"{export * 1e3:.0f}",
        f"{load * 1e3:.0f}",
        checked,
        *(f"{found['memory'][process] / MIB:.0f}" for process in ("policy", "engine", "driver")),
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
