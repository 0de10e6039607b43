"""Seconds and memory of hierarchical baselines at training size, beside a plain `lstsq`.

1,024 responses x 8,192 tokens, every case, each in its own process:

    python -m benchmarks.hierarchical_baselines

A smaller batch, and a single case:

    python -m benchmarks.hierarchical_baselines --responses 256
    python -m benchmarks.hierarchical_baselines --case group,blocks,16

The plain version forms and solves one least-squares system per group and position with
`torch.linalg.lstsq`, in sample, with neither leave-one-out nor shrinkage: far less work. It is
timed at a few positions and scaled to all. Results are recorded in docs/hierarchical_log.md.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch
from torch import Tensor

from rlsys.algorithms.advantages import AdvantageInputs, hierarchical_advantages

CASES = [
    f"{scope},{horizons},16"
    for scope in ("auto", "group", "batch")
    for horizons in ("current_and_final", "blocks")
]
CASES += ["auto,current_and_final,64", "auto,blocks,64"]
PLAIN_POSITIONS = 16


def batch_of(responses: int, tokens: int, group: int) -> AdvantageInputs:
    """Return a batch of responses of different lengths, some with tool tokens.

    Log-ratios drift to a standard deviation of about 0.5; squared score norms are mostly near 0.
    Rewards depend on the ratio of the response to some degree: else there would be nothing to fit.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(tokens // 4, tokens + 1, (responses,), generator=generator)
    lengths[0] = tokens
    mask = torch.arange(tokens)[None] < lengths[:, None]
    mask[::7, tokens // 8 : tokens // 6] = False
    old = -torch.rand(responses, tokens, generator=generator)
    noise = torch.randn(responses, tokens, generator=generator) * 0.5 / tokens**0.5
    ids = torch.arange(responses) // group
    entropies = torch.rand(int(ids.max()) + 1, 1, generator=generator)  # one per prompt
    return AdvantageInputs(
        rewards=(
            (noise * mask).sum(1) + 0.5 * torch.randn(responses, generator=generator) > 0
        ).float(),
        response_mask=mask,
        group_ids=ids,
        squared_score_norms=entropies[ids]
        * torch.rand(responses, tokens, generator=generator) ** 4,
        rollout_logprobs=old - noise,
        old_logprobs=old,
    )


def plain_seconds(inputs: AdvantageInputs, horizons: str, group: int) -> float:
    """Return the seconds of one `lstsq` per group and position, scaled from a few positions."""
    assert inputs.old_logprobs is not None
    assert inputs.rollout_logprobs is not None
    differences = inputs.old_logprobs.double() - inputs.rollout_logprobs
    ratios = torch.where(inputs.response_mask, differences, 0.0).cumsum(1).exp()

    length = ratios.shape[1]
    boundaries = [length - 1]
    if horizons == "blocks":
        boundaries = [*range(255, length - 1, 256), length - 1]

    start = time.perf_counter()
    for t in torch.linspace(0, length - 1, PLAIN_POSITIONS).long().tolist():
        for rows in torch.arange(len(ratios)).split(group):
            rewards = inputs.rewards[rows].double()
            alive = inputs.response_mask[rows, t]
            _one_plain_fit(ratios[rows], rewards, alive, t, boundaries)
    return (time.perf_counter() - start) * length / PLAIN_POSITIONS


def _one_plain_fit(
    ratios: Tensor, rewards: Tensor, alive: Tensor, t: int, boundaries: list[int]
) -> Tensor:
    features = ratios[:, [t, *(s for s in boundaries if s >= t)]] * alive[:, None]
    target = ratios[:, -1] * rewards * alive
    fit = torch.linalg.lstsq(features, target[:, None], driver="gelsd")
    return target - features @ fit.solution[:, 0]


def run_case(case: str, responses: int, tokens: int, plain: bool) -> None:
    """Measure one case in this process and print its row."""
    scope, horizons, group = case.split(",")
    inputs = batch_of(responses, tokens, int(group))

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    out = hierarchical_advantages(inputs, horizons=horizons, scope=scope)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    shrinkage = [
        f"{name} {value:.2f}"
        for name, value in out.diagnostics.items()
        if name.startswith("shrinkage")
    ]
    cells = [
        scope,
        horizons,
        group,
        f"{seconds:.2f}",
        f"{peak / 2**20:.2f}",
        f"{(peak - before) / 2**20:.2f}",
        f"{plain_seconds(inputs, horizons, int(group)):.0f}" if plain else "-",
        " ".join(shrinkage),
    ]
    print(f"| {' | '.join(cells)} |")


def main() -> None:
    """Measure one case, or every case in its own process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--responses", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--case", help="scope,horizons,group size; default: all")
    parser.add_argument("--plain", action=argparse.BooleanOptionalAction, default=True)
    given = parser.parse_args()
    if given.case:
        run_case(given.case, given.responses, given.tokens, given.plain)
        return

    header = (
        "scope",
        "horizons",
        "group",
        "seconds",
        "peak GiB",
        "of that the call",
        "plain lstsq, seconds",
        "shrinkage",
    )
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|", flush=True)
    for case in CASES:
        sizes = ["--responses", str(given.responses), "--tokens", str(given.tokens)]
        subprocess.run(
            [sys.executable, "-m", "benchmarks.hierarchical_baselines", "--case", case, *sizes],
            check=True,
        )


if __name__ == "__main__":
    main()
