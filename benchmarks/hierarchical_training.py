"""GRPO, RLOO and hierarchical baselines trained on the embedded problems.

All runs have the same problems and the same number of samples and updates; there are several seeds.

    python -m recipes.grpo_math --trainer.steps 12 --run.directory runs/warm
    python -m benchmarks.hierarchical_training runs/compare \\
        --model runs/warm/checkpoints/step_000012

The results are in docs/hierarchical_log.md.

Every run makes four updates per rollout batch, so that the policy is up to three updates ahead of
its sampler. Start from a policy that sometimes answers right. With one that hardly ever does, four
updates on the first few rewards decide whether a run learns at all, whatever the baseline. Finished
runs are read from disk.

    grpo            mean and standard deviation of the group, PPO's clip, token mean
    rloo            leave-one-out mean, the ratio of the whole response: unbiased, like
                    hierarchical with shrinkage coefficients of 0
    hierarchical    `recipes.hierarchical_math` with its own settings
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlsys.run.observers.metrics_log import MetricsRecord, read_metrics

ARMS: Mapping[str, tuple[str, ...]] = {
    "grpo": ("grpo_math", "--policy.num_mini_batches", "4"),
    "rloo": (
        *("grpo_math", "--preset", "rloo", "--policy.num_mini_batches", "4"),
        *("--algorithm.kl.coefficient", "0"),
        *("--algorithm.objective.weight", "importance", "--algorithm.objective.ratio", "product"),
    ),
    "hierarchical": ("hierarchical_math",),
}
SAME = (
    *("--data.synthetic.eval_size", "128"),
    *("--trainer.checkpoints.every", "0", "--trainer.save_rollouts_every", "0"),
)
FIGURE = Path("docs/images/hierarchical_training.svg")


@dataclass(frozen=True)
class Curve:
    """One finished run."""

    held_out: Mapping[int, float]  # accuracy by step
    reward: float  # mean over all samples of the run
    updates: float  # mean norm of the gradient before clipping
    seconds: float  # median of a step

    @staticmethod
    def of(records: Sequence[MetricsRecord]) -> Curve:
        """Return the curve of a run's metrics."""
        steps = [record.values for record in records if record.kind == "train"]
        evaluations = [record for record in records if record.kind == "eval"]
        return Curve(
            held_out={record.step: record.values["eval/accuracy"] for record in evaluations},
            reward=statistics.fmean(step["reward/mean"] for step in steps),
            updates=statistics.fmean(step["policy/grad_norm"] for step in steps),
            seconds=statistics.median(step["time/step"] for step in steps),
        )


def run(arm: str, seed: int, directory: Path, model: str, steps: int) -> Curve:
    """Train, unless `directory` holds the run already.

    Raises:
        SystemExit: a run of other length is there, or the run failed.
    """
    if not directory.exists():
        recipe, *own = ARMS[arm]
        command = [sys.executable, "-m", f"recipes.{recipe}", "--run.directory", str(directory)]
        command += ["--model.path", model, "--trainer.seed", str(seed)]
        lengths = ("--trainer.steps", str(steps), "--trainer.evaluation.every", str(steps // 3))
        subprocess.run([*command, *SAME, *own, *lengths], check=True)

    records = read_metrics(directory / "metrics.jsonl")
    if not records or records[-1].step != steps or records[-1].kind != "eval":
        sys.exit(
            f"{directory} is not a finished run of {steps} steps."
            " Remove it, or choose another directory."
        )
    return Curve.of(records)


def average(values: Sequence[float]) -> str:
    """Return the mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):.3f} ± {error:.3f}"


def table(curves: Mapping[str, Sequence[Curve]]) -> str:
    """Return a Markdown table with a row per arm."""
    steps = sorted(next(iter(curves.values()))[0].held_out)
    names = [
        *(f"held out, {step}" for step in steps),
        "mean reward",
        "gradient norm",
        "seconds per step",
    ]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for arm, runs in curves.items():
        cells = [average([run.held_out[step] for run in runs]) for step in steps]
        cells += [average([run.reward for run in runs]), average([run.updates for run in runs])]
        cells.append(f"{statistics.median(run.seconds for run in runs):.2f}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(curves: Mapping[str, Sequence[Curve]]) -> str:
    """Return, as Markdown, hierarchical minus each other arm, seed by seed."""

    def at_the_end(run: Curve) -> float:
        return run.held_out[max(run.held_out)]

    lines = []
    for arm, runs in curves.items():
        if arm == "hierarchical":
            continue
        pairs = list(zip(curves["hierarchical"], runs, strict=True))
        last = [100 * (at_the_end(own) - at_the_end(other)) for own, other in pairs]
        rewards = [own.reward - other.reward for own, other in pairs]

        seeds = ", ".join(f"{value:+.3f}" for value in rewards)
        points = ", ".join(f"{value:+.1f}" for value in last)
        lines.append(
            f"hierarchical minus {arm}: mean reward {average(rewards)} (seeds: {seeds}); "
            f"held out at the end, points: {points}"
        )
    return "\n".join(lines)


def draw(curves: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """Draw the held-out accuracy over steps: the mean, and a thin line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for i, (arm, runs) in enumerate(curves.items()):
        steps = sorted(runs[0].held_out)
        for one in runs:
            accuracies = [100 * one.held_out[step] for step in steps]
            axis.plot(steps, accuracies, color=f"C{i}", alpha=0.25, linewidth=1)
        mean = [100 * statistics.fmean(one.held_out[step] for one in runs) for step in steps]
        axis.plot(steps, mean, "o-", color=f"C{i}", label=arm)
    axis.set(xlabel="step (four updates each)", ylabel="held-out accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path)


def main() -> None:
    """Train or read all runs, and compare them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="where the runs are, or will be")
    parser.add_argument("--model", default="smollm2-135m", help="anything that --model.path takes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    arguments = parser.parse_args()

    curves: dict[str, list[Curve]] = {arm: [] for arm in ARMS}
    for seed in arguments.seeds:
        for arm in ARMS:
            directory = arguments.directory / f"{arm}-{seed}"
            curves[arm].append(run(arm, seed, directory, arguments.model, arguments.steps))

    print(table(curves))
    print()
    print(differences(curves))
    draw(curves, arguments.figure)


if __name__ == "__main__":
    main()
