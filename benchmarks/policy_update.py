"""Seconds of one policy update by operation, beside the matrix products that it cannot do without.

    . .venv/bin/activate
    python -m benchmarks.policy_update                           responses of 32 tokens
    python -m benchmarks.policy_update --tokens 220 --profile    where the time goes
    python -m benchmarks.policy_update --groups 8 --equal 7      7 of 8 groups have no gradient

One process, one rank, random tokens: prompts of 100 tokens, each with 8 responses. "Products" are
those of the model's linear layers alone, forward and backward, on as many tokens as the packs hold.
Results are recorded in docs/measurements.md.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import statistics
import time
from collections import Counter

import numpy as np
import torch
from torch import nn

from recipes.grpo_math import on_cpu
from rlsys.config import RunConfig
from rlsys.config.command_line import evolve
from rlsys.config.hardware import detect_hardware
from rlsys.data.batches import TrainBatch
from rlsys.models import resolve_model
from rlsys.run.compute_dtype import choose_dtypes
from tests.support.rollout_examples import rewards_of, rollouts
from workers.training.model_setup import DTYPES
from workers.training.policy import PolicyWorker

PROMPT_TOKENS = 100
SAMPLES = 8


def configuration(arguments: argparse.Namespace) -> RunConfig:
    """Return the default recipe with the sizes of this benchmark."""
    hardware = detect_hardware()
    fields = {
        "model.path": arguments.model,
        "generation.max_tokens": arguments.tokens,
        "generation.samples_per_prompt": SAMPLES,
        "trainer.prompts_per_step": arguments.groups,
    }
    if arguments.dtype != "auto":
        fields |= {"generation.dtype": arguments.dtype, "policy.compute_dtype": arguments.dtype}
    fields |= dict(item.split("=", 1) for item in arguments.set)
    config = evolve(on_cpu(hardware), fields)
    return choose_dtypes(config, hardware, resolve_model(config.model.path)).config


def example(groups: int, tokens: int, equal: int) -> TrainBatch:
    """Return random responses of `tokens` tokens; the last `equal` groups have advantages of 0."""
    rng = np.random.default_rng(0)
    drawn = [
        (
            rng.integers(5, 900, PROMPT_TOKENS).tolist(),
            [rng.integers(5, 900, tokens).tolist() for _ in range(SAMPLES)],
        )
        for _ in range(groups)
    ]
    batch = rollouts(drawn)
    of_response = rng.normal(size=len(batch)).astype(np.float32)
    of_response[(groups - equal) * SAMPLES :] = 0.0
    advantages = np.repeat(of_response, batch.sequence_lengths) * batch.response_mask
    return TrainBatch(rollouts=batch, rewards=rewards_of(batch), advantages=advantages)


def floor_seconds(worker: PolicyWorker, num_tokens: int, dtype: torch.dtype) -> float:
    """Return the seconds of the products of all linear layers on `num_tokens` tokens."""
    shapes = Counter(
        tuple(module.weight.shape)
        for module in worker.backend.module.modules()
        if isinstance(module, nn.Linear)
    )
    total = 0.0
    for (width, depth), times in shapes.items():
        inputs = torch.randn(num_tokens, depth, dtype=dtype)
        weight = torch.randn(width, depth, dtype=dtype)
        outputs = torch.randn(num_tokens, width, dtype=dtype)
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            nn.functional.linear(inputs, weight)
            torch.mm(outputs, weight)
            torch.mm(outputs.t(), inputs)
            seconds.append(time.perf_counter() - began)
        total += times * min(seconds)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=32, help="of each response")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--equal", type=int, default=0, help="groups with advantages of 0")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE")
    arguments = parser.parse_args()

    config = configuration(arguments)
    os.environ["OMP_NUM_THREADS"] = str(detect_hardware().cpus)
    worker = PolicyWorker(config, str(resolve_model(config.model.path)), 0, 1)
    worker.setup(worker.rendezvous())
    batch = example(arguments.groups, arguments.tokens, arguments.equal)
    rows = np.arange(len(batch.rollouts))
    num_tokens = sum(pack.num_tokens for pack in worker.packs_of(batch.rollouts, rows))

    worker.update(batch)  # the first allocates
    seconds, busy = [], []
    for _ in range(arguments.repeats):
        began, computed = time.perf_counter(), time.process_time()
        worker.update(batch)
        seconds.append(time.perf_counter() - began)
        busy.append(time.process_time() - computed)
    gc.collect()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    floor = floor_seconds(worker, num_tokens, DTYPES[config.policy.compute_dtype])
    median = statistics.median(seconds)
    print(
        f"{config.policy.compute_dtype}, {arguments.tokens} tokens, {num_tokens} in packs: "
        f"update {median:.2f} s ({min(seconds):.2f} to {max(seconds):.2f}; "
        f"{min(busy):.2f} CPU seconds), products {floor:.2f} s, "
        f"ratio {median / floor:.2f}, peak {peak:.2f} GiB"
    )
    if arguments.profile:
        with torch.profiler.profile() as profile:
            worker.update(batch)
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))
    worker.shutdown()


if __name__ == "__main__":
    main()
