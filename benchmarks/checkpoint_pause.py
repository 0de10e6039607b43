"""Seconds for which training stands still in a checkpoint: written at once, or in the background.

    . .venv/bin/activate
    python -m benchmarks.checkpoint_pause                     SmolLM2-135M's shape, one rank
    python -m benchmarks.checkpoint_pause --layers 4 --ranks 2

A Llama with random weights in float32 and Adam's moments, in processes of its own, one thread each.
"copy" is the pause of `trainer.checkpoints.asynchronous`, the first time (which allocates the host
memory) and again; "files" is what the thread then takes while the rank does nothing else. "at once"
is the whole pause without it. The seconds are those of the slowest rank, without sealing, which the
driver does: in the pause at once, and beside training otherwise. Results are recorded in
docs/measurements.md.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from transformers import LlamaConfig, LlamaForCausalLM

from rlsys.config import RunConfig
from rlsys.run.checkpoints import seal
from workers.training.backends.fsdp2 import FSDP2Backend, build
from workers.training.background_files import BackgroundFiles, HostMemory
from workers.training.packed_model import PackedCausalLM
from workers.training.saved_state import save_backend

CALLS = ("at once", "copy, first", "files", "copy, again", "seal")


def model_config(layers: int) -> LlamaConfig:
    """Return SmolLM2-135M's shape with some number of layers."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )


def seconds(call: Callable[[], Any]) -> float:
    """Return how long `call` takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def built(ranks: int, layers: int, folder: Path) -> FSDP2Backend:
    """Return a backend whose optimizer has taken a step."""
    settings = RunConfig.model_validate(
        {"policy": {"ranks": ranks, "compute_dtype": "float32"}}
    ).policy
    with torch.device("meta"):
        model = LlamaForCausalLM(model_config(layers))
    model.to_empty(device="cpu")
    model.tie_weights()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    module = PackedCausalLM(model, chunk_tokens=256)
    backend = build(module, settings, torch.device("cpu"), folder / "model")
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    backend.step(1e-5)
    return backend


def rank_process(rank: int, ranks: int, layers: int, folder: Path, results: Any) -> None:
    """Save on one rank in both ways."""
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
    backend, memory = built(ranks, layers, folder), HostMemory()

    dist.barrier()
    found = {"at once": seconds(lambda: save_backend(backend, folder / "once"))}
    for name in ("copy, first", "copy, again"):
        files = BackgroundFiles(folder / name, memory)

        def copy(files: BackgroundFiles = files) -> None:
            backend.save(files)
            files.start()

        dist.barrier()
        found[name] = seconds(copy)
        files.wait()
        found["files"] = files.seconds() or 0.0

    dist.barrier()
    found["seal"] = seconds(lambda: seal(folder / "once")) if rank == 0 else 0.0
    results.put((found, memory.num_bytes))
    dist.destroy_process_group()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--layers", type=int, default=30)
    arguments = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="rlsys-benchmark-"))
    try:
        model_config(arguments.layers).save_pretrained(folder / "model")
        for name in ("once", "copy, first", "copy, again"):
            (folder / name).mkdir()
        torch.set_num_threads(1)  # a process with threads could not be forked
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        group = [
            context.Process(
                target=rank_process,
                args=(rank, arguments.ranks, arguments.layers, folder, results),
            )
            for rank in range(arguments.ranks)
        ]
        for process in group:
            process.start()
        found = [results.get() for _ in group]
        for process in group:
            process.join()
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    print("| ranks | copy of a rank, MB | " + " | ".join(f"{name}, s" for name in CALLS) + " |")
    print("|" + "---|" * (len(CALLS) + 2))
    cells = [f"{max(times[name] for times, _ in found):.2f}" for name in CALLS]
    size = max(held for _, held in found) / 1e6
    print(f"| {arguments.ranks} | {size:.0f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
