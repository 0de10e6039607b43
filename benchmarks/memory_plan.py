"""Predicted and measured memory of policy ranks, by phase: does `python -m rlsys.plan` hold?

    . .venv/bin/activate
    python -m benchmarks.memory_plan                       all cases
    python -m benchmarks.memory_plan --case smollm2-1      one of them
    python -m benchmarks.memory_plan --kept                with the allocator as in a run

Every rank is a fresh process without Ray. It first runs a tiny model through all phases, so that
the libraries are loaded; its resident memory then is the baseline, which is subtracted. The
high-water mark of the system (VmHWM) starts over before each phase. Memory is given back to the
system when it is freed; with --kept the allocator has the settings of a run's ranks, which keep it.
Results are recorded in docs/planning_memory.md.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsys.config.sync import SyncConfig
from rlsys.plan.roles import (
    Moment,
    Peak,
    RankSettings,
    checkpoint_moments,
    forward_moments,
    resting,
    setup_moments,
    sync_moments,
    update_moments,
)
from rlsys.plan.run_memory import OF_FIRST_RANK
from rlsys.plan.shapes import ModelShape, shape_of_model

if TYPE_CHECKING:
    from rlsys.config import RunConfig
    from rlsys.data.batches import TrainBatch
    from workers.training.policy import PolicyWorker

MIB = 1024**2
# With these glibc returns memory when it is freed, so resident memory is that of live tensors.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 17)}
# Those of the ranks of a run: `workers.cluster.ALLOCATOR`.
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}

# Each process is a copy of one that has imported everything and done nothing.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["recipes.grpo_math", "transformers", "workers.training.policy"])

RANDOM_SHAPES = {
    # 48 M parameters, embedding and head are two matrices.
    "random-48m": ModelShape(
        hidden=512,
        layers=8,
        heads=8,
        kv_heads=4,
        intermediate=2048,
        vocabulary=16384,
        head_dim=64,
        file_bytes=4,
    ),
    # 245 M parameters
    "random-245m": ModelShape(
        hidden=1024,
        layers=18,
        heads=16,
        kv_heads=8,
        intermediate=2816,
        vocabulary=32000,
        head_dim=64,
        file_bytes=4,
        tied=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement."""

    name: str
    model: str = "smollm2-135m"
    ranks: int = 1
    dtype: str = "float32"
    response_tokens: int = 24  # of each of the 4 responses of a group, which is a pack
    chunk_tokens: int = 48  # of logits
    checkpointing: bool = False


CASES = (
    Case(name="smollm2-1"),
    Case(name="smollm2-2", ranks=2),
    Case(name="smollm2-1-long", response_tokens=112, chunk_tokens=256),
    Case(name="smollm2-2-bfloat16", ranks=2, dtype="bfloat16"),
    Case(name="smollm2-1-checkpointing", response_tokens=112, checkpointing=True),
    Case(name="random-48m-1", model="random-48m"),
    Case(name="random-48m-2", model="random-48m", ranks=2),
    Case(name="random-245m-1", model="random-245m"),
    Case(name="random-245m-2", model="random-245m", ranks=2),
)
PROMPT_TOKENS, SAMPLES = 64, 4


def group_tokens(case: Case) -> int:
    """Return the packed tokens of a group: the last token of a response predicts nothing."""
    return PROMPT_TOKENS + SAMPLES * (case.response_tokens - 1)


def settings_of(case: Case) -> RankSettings:
    """Return the sizes that the prediction knows."""
    return RankSettings(
        ranks=case.ranks,
        compute_bytes=2 if case.dtype == "bfloat16" else 4,
        tokens=group_tokens(case),
        response_tokens=SAMPLES * case.response_tokens,
        chunk_tokens=case.chunk_tokens,
        kernel="shared_prefix",
        group_tokens=group_tokens(case),
        gradient_checkpointing=case.checkpointing,
    )


def predicted(case: Case, shape: ModelShape, rank: int) -> dict[str, tuple[float, str]]:
    """Return bytes and moment of the peak of each phase on a rank."""
    settings = settings_of(case)
    first = tuple(  # before its step the optimizer has no moments
        replace(moment, host={**moment.host, "moments": 0.0})
        if moment.name != "optimizer"
        else moment
        for moment in update_moments(shape, settings)
    )
    phases = {
        "set-up": setup_moments(shape, settings),
        "first update": first,
        "update": update_moments(shape, settings),
        "log-probs": forward_moments(shape, settings, resting(shape, settings)),
        "sync": sync_moments(
            shape,
            settings,
            engine_bytes=2 if case.dtype == "bfloat16" else 4,
            bucket_bytes=SyncConfig().bucket_bytes,
        ),
        "checkpoint": checkpoint_moments(shape, settings),
    }
    return {
        name: (peak.host.host_bytes, peak.host.name)
        for name, peak in (
            (name, Peak.of(name, tuple(on_rank(moment, rank) for moment in moments)))
            for name, moments in phases.items()
        )
    }


def on_rank(moment: Moment, rank: int) -> Moment:
    """Leave out what only rank 0 has."""
    if rank == 0:
        return moment
    return replace(moment, host={k: v for k, v in moment.host.items() if k not in OF_FIRST_RANK})


def shape_of(name: str) -> ModelShape:
    return RANDOM_SHAPES[name] if name in RANDOM_SHAPES else shape_of_model(name)


def write_random_model(shape: ModelShape, directory: Path) -> None:
    """Save a Llama of random weights; it needs no tokenizer, since the tokens are random too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=shape.tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def directory_of(name: str, folder: str) -> str:
    """Return the model's directory; random ones are written in a process of their own."""
    if name not in RANDOM_SHAPES:
        from rlsys.models import resolve_model

        return str(resolve_model(name))
    directory = Path(folder) / name
    if not directory.exists():
        writer = PROCESSES.Process(target=write_random_model, args=(RANDOM_SHAPES[name], directory))
        writer.start()
        writer.join()
        if writer.exitcode:
            raise RuntimeError(f"the random model {name} could not be written")
    return str(directory)


def configuration(case: Case) -> RunConfig:
    """Return the configuration of a case, with one pack for each group."""
    from recipes.grpo_math import on_cpu
    from rlsys.config.command_line import evolve
    from rlsys.config.hardware import detect_hardware

    fields: dict[str, Any] = {
        "model.path": case.model if case.model not in RANDOM_SHAPES else "tiny",
        "data.max_prompt_tokens": PROMPT_TOKENS,
        "generation.max_tokens": case.response_tokens,
        "generation.samples_per_prompt": SAMPLES,
        "generation.dtype": case.dtype,
        "policy.compute_dtype": case.dtype,
        "policy.ranks": case.ranks,
        "policy.microbatch_tokens": group_tokens(case),
        "policy.logit_chunk_tokens": case.chunk_tokens,
        "policy.gradient_checkpointing": case.checkpointing,
        "trainer.prompts_per_step": 2 * case.ranks,
    }
    return evolve(on_cpu(detect_hardware()), fields)


def example(case: Case, vocabulary: int) -> TrainBatch:
    """Return two groups of random tokens for each rank."""
    import numpy as np

    from rlsys.data.batches import TrainBatch
    from tests.support.rollout_examples import rewards_of, rollouts

    rng = np.random.default_rng(0)
    drawn = [
        (
            rng.integers(5, vocabulary, PROMPT_TOKENS).tolist(),
            [rng.integers(5, vocabulary, case.response_tokens).tolist() for _ in range(SAMPLES)],
        )
        for _ in range(2 * case.ranks)
    ]
    batch = rollouts(drawn)
    of_response = rng.normal(size=len(batch)).astype(np.float32)
    advantages = np.repeat(of_response, batch.sequence_lengths) * batch.response_mask
    return TrainBatch(rollouts=batch, rewards=rewards_of(batch), advantages=advantages)


def status(name: str) -> int:
    """Return a value of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def peak_of(run: Callable[[], object]) -> int:
    """Return the largest resident memory while `run` runs, in bytes."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts over
    run()
    return status("VmHWM")


def phases(
    worker: PolicyWorker, address: str, case: Case, vocabulary: int, folder: str
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield each phase of a rank, in the order in which they must run."""
    from rlsys.models.weights import buckets_of
    from workers.training.model_setup import DTYPES

    batch = example(case, vocabulary)

    def sync() -> None:
        weights, size = worker.backend.weights(), SyncConfig().bucket_bytes
        for bucket in buckets_of(weights, dtype=DTYPES[case.dtype], bucket_bytes=size):
            del bucket  # it would go to the object store

    def save() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as directory:
            worker.save(directory)

    yield "set-up", lambda: worker.setup(address)
    yield "first update", lambda: worker.update(batch)
    yield "update", lambda: worker.update(batch)
    yield "log-probs", lambda: worker.logprobs(batch.rollouts)
    yield "sync", sync
    yield "checkpoint", save


def rank_process(case: Case, directory: str, rank: int, folder: str, pipe: Connection) -> None:
    """Measure one rank; the parent relays the address of rank 0."""
    from rlsys.models import resolve_model
    from workers.training.policy import PolicyWorker

    def prepared(of: Case, model: str) -> tuple[PolicyWorker, str]:
        worker = PolicyWorker(configuration(of), model, rank, of.ranks)
        if rank == 0:
            pipe.send(worker.rendezvous())
        return worker, pipe.recv()

    warm_up = replace(case, response_tokens=8)
    worker, address = prepared(warm_up, str(resolve_model("tiny")))
    for _, run in phases(worker, address, warm_up, 250, folder):
        run()
        del run  # it holds the worker
    worker.shutdown()
    del worker
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)

    baseline = status("VmRSS")
    worker, address = prepared(case, directory)
    measured = {
        name: peak_of(run) - baseline
        for name, run in phases(worker, address, case, shape_of(case.model).vocabulary, folder)
    }
    worker.shutdown()
    pipe.send((baseline, measured))


Measured = tuple[int, dict[str, int]]  # bytes: the baseline of a rank, and its peak in each phase


def measure(case: Case, folder: str) -> list[Measured]:
    """Return what is measured of each rank."""
    directory = directory_of(case.model, folder)
    pipes, processes = [], []
    for rank in range(case.ranks):
        own, other = PROCESSES.Pipe()
        process = PROCESSES.Process(
            target=rank_process, args=(case, directory, rank, folder, other)
        )
        process.start()
        other.close()
        pipes.append(own)
        processes.append(process)

    for _ in range(2):  # the tiny model's group, then the measured one
        address = pipes[0].recv()
        for pipe in pipes:
            pipe.send(address)
    found = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    return found


def report(case: Case, found: Sequence[Measured]) -> None:
    """Print the rows of a case."""
    shape = shape_of(case.model)
    for rank, (baseline, measured) in enumerate(found):
        for phase, (expected, moment) in predicted(case, shape, rank).items():
            error = expected / measured[phase] - 1
            print(
                f"| {case.name} | {rank} | {phase} | {moment} | {expected / MIB:,.0f} | "
                f"{measured[phase] / MIB:,.0f} | {error:+.1%} | {baseline / MIB:,.0f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=[case.name for case in CASES], action="append")
    parser.add_argument("--record", type=Path, help="append what was measured to this file")
    parser.add_argument(
        "--read", type=Path, help="compare with what --record wrote; measure nothing"
    )
    parser.add_argument("--kept", action="store_true", help="the allocator keeps freed memory")
    arguments = parser.parse_args()
    os.environ.update(KEPT if arguments.kept else RETURNED)  # of the processes to come

    print("| case | rank | phase | moment | predicted MiB | measured MiB | error | baseline MiB |")
    print("|---|---|---|---|---|---|---|---|")
    recorded: dict[str, list[Measured]] = {}
    if arguments.read:
        lines = map(json.loads, arguments.read.read_text().splitlines())
        recorded = {line["case"]: line["ranks"] for line in lines}

    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if arguments.case and case.name not in arguments.case:
                continue
            if arguments.read:
                report(case, recorded.get(case.name, []))
                continue
            found = measure(case, folder)
            report(case, found)
            if arguments.record:
                with arguments.record.open("a") as file:
                    file.write(json.dumps({"case": case.name, "ranks": found}) + "\n")


if __name__ == "__main__":
    main()
