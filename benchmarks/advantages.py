"""Seconds of an advantage estimator at training size, beside a plain loop over the groups.

    python -m benchmarks.advantages --responses 4096 --tokens 8192

Medians over the repetitions. Results are recorded in docs/measurements.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rlsys.algorithms.advantages import (
    AdvantageInputs,
    available_advantage_estimators,
    get_advantage_estimator,
)


def make_inputs(responses: int, tokens: int, group: int) -> AdvantageInputs:
    """Return groups of `group` responses with uniform lengths, rewards 0 or 1, and all arrays."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, tokens + 1, (responses, 1), generator=generator)
    mask = torch.arange(tokens)[None, :] < lengths
    noise = torch.randn(responses, tokens, generator=generator)
    return AdvantageInputs(
        rewards=torch.randint(0, 2, (responses,), generator=generator).float(),
        response_mask=mask,
        group_ids=torch.arange(responses) // group,
        rollout_logprobs=noise,
        old_logprobs=noise,
        ref_logprobs=noise,
        squared_score_norms=noise.abs(),
        greedy_rewards=torch.zeros(responses),
        kl_coefficient=0.1,
    )


def grpo_by_loop(inputs: AdvantageInputs) -> Tensor:
    """Compute GRPO's advantages with a loop over groups, broadcast over tokens."""
    advantages = torch.zeros(inputs.response_mask.shape)
    for group in inputs.group_ids.unique():
        rows = (inputs.group_ids == group).nonzero()[:, 0]
        rewards = inputs.rewards[rows]
        values = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
        for row, value in zip(rows.tolist(), values.tolist(), strict=True):
            advantages[row] = value * inputs.response_mask[row]
    return advantages


def seconds(work: Callable[[], object], repetitions: int) -> float:
    """Return the median seconds of a call, after one that is not counted."""
    work()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Time the estimators and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--responses", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--estimators", nargs="*", help="default: all")
    arguments = parser.parse_args()

    inputs = make_inputs(arguments.responses, arguments.tokens, arguments.group)
    print("| estimator | seconds |\n|---|---|")
    loop = seconds(lambda: grpo_by_loop(inputs), arguments.repetitions)
    print(f"| grpo, a loop over groups | {loop:.3f} |", flush=True)

    # The hierarchical estimator has a benchmark of its own.
    others = [name for name in available_advantage_estimators() if name != "hierarchical"]
    for name in arguments.estimators or others:
        work = partial(get_advantage_estimator(name), inputs)
        print(f"| {name} | {seconds(work, arguments.repetitions):.3f} |", flush=True)


if __name__ == "__main__":
    main()
