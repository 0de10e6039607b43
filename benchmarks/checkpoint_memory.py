"""Seconds and peak host memory of every rank while a checkpoint is written, read and exported.

    . .venv/bin/activate
    python -m benchmarks.checkpoint_memory                    1, 2 and 4 ranks
    python -m benchmarks.checkpoint_memory --ranks 2 --layers 12

A Llama in float32 with Adam's moments, in processes of its own, one thread each. "Extra" is the
peak of the resident memory during the call above what was resident before it, which includes the
rank's shard; it must stay below the largest weight + 200 MB, whatever the number of ranks. The
command fails where it does not. Results are recorded in docs/measurements.md.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from transformers import LlamaConfig, LlamaForCausalLM

from rlsys.config import RunConfig
from rlsys.export import export
from workers.training.backends.fsdp2 import build
from workers.training.packed_model import PackedCausalLM
from workers.training.saved_state import save_backend

ALLOWANCE_MB = 200


@dataclass(frozen=True, kw_only=True)
class Use:
    """The resident memory of a process around a call, in MB, and its seconds."""

    before: float
    peak: float
    seconds: float


def resident(field: str) -> float:
    """Return VmRSS (now) or VmHWM (peak) of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024 / 1e6


def measured(call: Callable[[], Any]) -> Use:
    """Run `call`, and return what it used."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = resident("VmRSS"), time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return Use(before=before, peak=resident("VmHWM"), seconds=seconds)


def model_config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=16000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        tie_word_embeddings=False,
    )


def rank_process(rank: int, ranks: int, layers: int, folder: Path, results: Any) -> None:
    """Build, save and load on one rank."""
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet{ranks}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
    settings = RunConfig.model_validate(
        {"policy": {"ranks": ranks, "compute_dtype": "float32"}}
    ).policy
    with torch.device("meta"):
        model = LlamaForCausalLM(model_config(layers))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    module = PackedCausalLM(model, chunk_tokens=256)
    backend = build(module, settings, torch.device("cpu"), folder / "model")
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    backend.step(1e-5)

    dist.barrier()
    path = folder / f"checkpoint{ranks}"
    results.put(("save", rank, measured(lambda: save_backend(backend, path))))
    dist.barrier()
    results.put(("load", rank, measured(lambda: backend.load(path))))
    dist.barrier()
    dist.destroy_process_group()


def export_process(source: Path, target: Path, results: Any) -> None:
    """Export a checkpoint in a process of its own."""
    torch.set_num_threads(1)
    results.put(("export", 0, measured(lambda: export(source, target))))


def uses(processes: list[Any], results: Any, count: int) -> list[tuple[str, int, Use]]:
    """Run processes, and return their results."""
    for process in processes:
        process.start()
    found = [results.get() for _ in range(count)]
    for process in processes:
        process.join()
    return sorted(found, key=lambda one: (one[0], one[1]))


def main() -> int:
    """Print the table, and return 1 where a process held too much."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()

    config = model_config(arguments.layers)
    with torch.device("meta"):
        sizes = [one.numel() * 4 / 1e6 for one in LlamaForCausalLM(config).parameters()]
    limit = max(sizes) + ALLOWANCE_MB
    print(f"weights {sum(sizes):.0f} MB, the largest {max(sizes):.0f} MB; limit {limit:.0f} MB")
    print("| ranks | call | rank | state, MB | before, MB | extra, MB | seconds |")
    print("|---|---|---|---|---|---|---|")

    torch.set_num_threads(1)  # a process with threads could not be forked
    context = multiprocessing.get_context("fork")
    exceeded = False
    for ranks in arguments.ranks:
        folder = Path(tempfile.mkdtemp(prefix="rlsys-benchmark-"))
        config.save_pretrained(folder / "model")
        path = folder / f"checkpoint{ranks}"
        path.mkdir()
        results = context.Queue()
        group = [
            context.Process(
                target=rank_process, args=(rank, ranks, arguments.layers, folder, results)
            )
            for rank in range(ranks)
        ]
        found = uses(group, results, 2 * ranks)
        one = context.Process(target=export_process, args=(path, folder / "out", results))
        found += uses([one], results, 1)
        shutil.rmtree(folder)

        for call, rank, use in found:
            state = 0 if call == "export" else 3 * sum(sizes) / ranks
            extra = use.peak - use.before
            exceeded |= extra > limit
            print(
                f"| {ranks} | {call} | {rank} | {state:.0f} | {use.before:.0f} | {extra:.0f} "
                f"| {use.seconds:.1f} |"
            )
    return int(exceeded)


if __name__ == "__main__":
    sys.exit(main())
