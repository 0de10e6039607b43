"""The exact gradient of every accepted configuration against the one that the documents state.

Everything, which is slices and 1,500 random combinations, about ten minutes on two cores:

    python -m benchmarks.campaigns.enumeration --seed 0

A sample of each, under a minute:

    python -m benchmarks.campaigns.enumeration --seed 0 --small

Cases whose name contains these words, with their numbers:

    python -m benchmarks.campaigns.enumeration --only "estimator=rloo recompute=True"

Every combination of estimator, ratio, weight, aggregation, KL, entropy, correction, staleness and
shape of the batch gets one class:

    refused              preflight refuses it, by field
    exact                the expected gradient of the real pipeline is that of the regularised
                         objective
    biased, documented   it is not, a sentence of the documents says so (`BIASES`), and it equals
                         the method's own formula, written again here
    finding              anything else; the exit code is then 1

The classes of all combinations go to docs/data/enumeration.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.campaigns.enumeration_biases import Bias, documented, undocumented
from benchmarks.campaigns.enumeration_cases import MACHINE, Case, random_case, slices
from benchmarks.campaigns.enumeration_pipeline import World, expected_gradient
from benchmarks.campaigns.enumeration_statements import Stated, has_statement, true_gradient
from recipes.grpo_math import grpo_math
from rlsys.algorithms.advantages import is_unbiased
from rlsys.config import ConfigError
from rlsys.config.command_line import evolve
from rlsys.run.directory import RunDirectory
from rlsys.run.preflight import config_mistakes

EXACT = 1e-9
# Where advantages are estimated again, live log-probabilities travel between ranks in float32.
SINGLE = 1e-5
NOTHING = 1e-12
RANDOM_CASES = 1500
SMALL = (110, 60)  # sampled from the slices, random
DATA = Path("docs/data/enumeration.csv")
FIELD = re.compile(r"^[a-z_]+(\.[a-z_]+)*")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The class of one case.

    Errors are relative to the norm of the stated gradient; NaN where there is nothing to compare.
    """

    case: Case
    kind: str
    error: float = float("nan")
    formula_error: float = float("nan")
    reasons: tuple[str, ...] = ()
    message: str = ""


def relative_error(found: Tensor, wanted: Tensor, *, any_length: bool = False) -> float:
    """Return ||c found - wanted|| / ||wanted|| with c = 1, or with the best c."""
    size = float(wanted.norm())
    if size < 1e-12:
        return float(found.norm())
    factor = 1.0
    if any_length and float(found.norm()) > 0:
        factor = float(found @ wanted / (found @ found))
    return float((factor * found - wanted).norm()) / size


def examine(case: Case, seed: int) -> Outcome:
    """Return the class of one case."""
    message = refusal(case)
    if message is not None:
        named = FIELD.match(message)
        return Outcome(case=case, kind="refused" if named else "finding", message=message)

    config = case.config()
    world = World.of(case, seed)
    resolved = case.resolved()
    try:
        found = expected_gradient(case, config, world)
    except Exception as error:  # what is accepted must not fail while it runs
        return Outcome(case=case, kind="finding", message=f"{type(error).__name__}: {error}")
    if not bool(torch.isfinite(found).all()):
        return Outcome(case=case, kind="finding", message="the gradient is not finite")

    wanted, length_is_stated = true_gradient(resolved, world)
    # Where truncated responses are masked, the others may all have the reward of the baseline.
    may_vanish = case.staleness == "far" or resolved.mask_truncated
    if not may_vanish and float(found.norm()) < NOTHING < float(wanted.norm()):
        return Outcome(case=case, kind="finding", message="every update is 0", error=1.0)

    error = relative_error(found, wanted, any_length=not length_is_stated)
    formula_error = float("nan")
    if has_statement(resolved):
        formula_error = relative_error(found, Stated(resolved, world).gradient())
    return judge(case, resolved, error, formula_error)


def judge(case: Case, resolved: Case, error: float, formula_error: float) -> Outcome:
    """Return the class that two errors mean."""
    limit = SINGLE if resolved.recompute else EXACT
    reasons: tuple[Bias, ...] = documented(resolved)
    names = tuple(bias.name for bias in reasons)

    if formula_error > limit:
        kind, message = "finding", "differs from the method's own formula"
    elif error <= limit:
        kind, message = "exact", ""
    elif _declares_the_gradient(resolved):
        kind, message = "finding", "the estimator declares to be unbiased"
    elif reasons:
        kind, message = "biased, documented", ""
    else:
        kind, message = "finding", "not the gradient of the objective, and no document says so"
    return Outcome(
        case=case,
        kind=kind,
        error=error,
        formula_error=formula_error,
        reasons=names if error > limit else (),
        message=message,
    )


def _declares_the_gradient(case: Case) -> bool:
    """Return whether nothing but the estimator decides about the gradient, and it is `unbiased`."""
    plain = Case(
        estimator=case.estimator,
        parameters=case.parameters,
        kl_placement=case.kl_placement,
        kl_kind=case.kl_kind,
        ratio=case.ratio,
        weight=case.weight,
        rewards=case.rewards,
        prompts=case.prompts,
        group=case.group,
        max_tokens=case.max_tokens,
    )
    in_reward = case.kl_placement in ("none", "reward")
    return case == plain and in_reward and is_unbiased(case.estimator, dict(case.parameters))


def refusal(case: Case) -> str | None:
    """Return the command line's message about the case; None where it accepts it."""
    return _refusal(json.dumps(case.flags(), sort_keys=True))


@cache
def _refusal(flags: str) -> str | None:
    directory = RunDirectory(Path("runs") / "never-made")
    try:
        config = evolve(grpo_math(MACHINE), json.loads(flags))
    except ConfigError as error:
        return str(error).splitlines()[0]
    mistakes = config_mistakes(config, directory, MACHINE, resume=False)
    return mistakes[0] if mistakes else None


def cases(seed: int, *, small: bool) -> list[Case]:
    """Return slices and random combinations, each once."""
    draw = random.Random(seed)
    ordered = list(dict.fromkeys(slices()))
    count = RANDOM_CASES
    if small:
        ordered, count = draw.sample(ordered, SMALL[0]), SMALL[1]
    return list(dict.fromkeys([*ordered, *(random_case(draw) for _ in range(count))]))


def examine_all(chosen: Sequence[Case], seed: int, processes: int) -> list[Outcome]:
    """Examine cases; the result has their order, whatever the number of processes."""
    if processes == 1:
        return [examine(case, seed) for case in chosen]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(examine, chosen, [seed] * len(chosen), chunksize=8))


def write_csv(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write one row per case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["class", "case", "error", "formula_error", "reasons", "message"])
        for outcome in sorted(outcomes, key=lambda o: (o.kind, o.case.name())):
            table.writerow(
                [
                    outcome.kind,
                    outcome.case.name(),
                    f"{outcome.error:.1e}",
                    f"{outcome.formula_error:.1e}",
                    "; ".join(outcome.reasons),
                    outcome.message,
                ]
            )


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return counts, the size of each documented bias, and findings."""
    counts = Counter(outcome.kind for outcome in outcomes)
    lines = [f"{counts[kind]:6d}  {kind}" for kind in sorted(counts)]

    sizes: dict[str, list[float]] = {}
    for outcome in outcomes:
        if outcome.kind == "biased, documented" and len(outcome.reasons) == 1:
            sizes.setdefault(outcome.reasons[0], []).append(outcome.error)
    lines += [
        "",
        "error of the gradient where this is the only reason: cases, smallest, median, largest",
    ]
    lines += [
        f"{len(found):6d}  {min(found):8.1e} {median(found):8.1e} {max(found):8.1e}  {reason}"
        for reason, found in sorted(sizes.items())
    ]

    findings = [outcome for outcome in outcomes if outcome.kind == "finding"]
    lines += ["", f"findings: {len(findings)}"]
    for outcome in findings:
        errors = f"error {outcome.error:.1e}, from its formula {outcome.formula_error:.1e}"
        lines.append(f"  {outcome.case.name()}: {outcome.message} ({errors})")
    return "\n".join(lines)


def main() -> int:
    """Run the campaign; the number of findings decides the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", default="", help="Cases whose name contains these words.")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--csv", type=Path, default=None, help=f"Where to write; {DATA} for docs.")
    options = parser.parse_args()

    start = time.perf_counter()
    chosen = [
        case
        for case in cases(options.seed, small=options.small)
        if all(word in case.name().split() for word in options.only.split())
    ]
    outcomes = examine_all(chosen, options.seed, options.processes)

    if options.csv:
        write_csv(outcomes, options.csv)
    print(summary(outcomes))
    missing = undocumented()
    print("\n".join(missing))
    print(f"{len(outcomes)} cases in {time.perf_counter() - start:.0f} s")
    return 1 if any(outcome.kind == "finding" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
