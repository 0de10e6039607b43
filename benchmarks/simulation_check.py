"""Step times that the simulator predicts, against those of real runs, on a CPU.

On a quiet machine with as many cores as generation workers, 5 minutes:

    python -m benchmarks.simulation_check

Each run is one of `recipes.grpo_math` with the tiny model and the transformers engine, which
samples the responses to one prompt together and those to the next afterwards. All responses have
the full length, so a step is the same again and again. Two runs with one worker give the constants
of the simulator: the seconds of an engine's step with few and with many sequences, those of an
update, a sync and a reward. From these alone it predicts the step times of the four CASES.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlsys.run.directory import RunDirectory
from rlsys.run.observers.metrics_log import read_metrics
from rlsys.simulate.engine import EngineSpeed
from rlsys.simulate.length_laws import MeasuredLengths
from rlsys.simulate.run import run_scenario
from rlsys.simulate.scenario import Scenario, Workload

WARM_UP = 2  # steps that do not count
TIMEOUT_S = 600
FLAGS = (
    *("--model.path", "tiny", "--generation.engine", "transformers"),
    *("--generation.dtype", "float32", "--policy.compute_dtype", "float32"),
    *("--generation.cpus_per_worker", "0", "--generation.stop", "[never-sampled]"),
    *("--data.synthetic.train_size", "200", "--data.eval", "off"),
    *("--plugins", "benchmarks.varied_reward", "--reward.functions", "[text_length]"),
    *("--trainer.evaluation.every", "0", "--trainer.checkpoints.every", "0"),
)
# The phases of a step that the simulator takes as one, the update.
TRAINING = ("time/logprobs", "time/advantages", "time/update", "time/other")


@dataclass(frozen=True, kw_only=True)
class Case:
    """The sizes of a run."""

    workers: int
    prompts: int
    samples: int
    tokens: int  # of each response

    @property
    def batch_tokens(self) -> int:
        return self.prompts * self.samples * self.tokens


FEW = Case(workers=1, prompts=8, samples=4, tokens=64)
MANY = Case(workers=1, prompts=8, samples=16, tokens=64)
CASES = (
    Case(workers=1, prompts=8, samples=8, tokens=64),
    Case(workers=1, prompts=16, samples=8, tokens=32),
    Case(workers=2, prompts=8, samples=8, tokens=64),
    Case(workers=2, prompts=8, samples=16, tokens=128),
)


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What the simulator is given."""

    engine: EngineSpeed
    train_fixed_s: float
    train_token_s: float
    sync_s: float
    reward_s: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything, and print a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8, help="that count, of each run")
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first ones")
    options = parser.parse_args(arguments)

    constants = fit(measure(FEW, options.steps), measure(MANY, options.steps))
    print(constants)
    print(
        "| workers | prompts | samples | tokens | measured s | predicted s | predicted/measured |"
    )
    print("|---|---|---|---|---|---|---|")
    for case in CASES[: options.cases]:
        measured = measure(case, options.steps)["time/step"]
        predicted = predict(case, constants)
        cells = (case.workers, case.prompts, case.samples, case.tokens)
        numbers = f"{measured:.2f} | {predicted:.2f} | {predicted / measured:.2f}"
        print(f"| {' | '.join(map(str, cells))} | {numbers} |", flush=True)


def measure(case: Case, steps: int) -> dict[str, float]:
    """Run a case, and return the median of each metric over the steps that count."""
    flags = (
        *FLAGS,
        *("--generation.workers", str(case.workers)),
        *("--generation.samples_per_prompt", str(case.samples)),
        *("--generation.min_tokens", str(case.tokens)),
        *("--generation.max_tokens", str(case.tokens)),
        *("--trainer.prompts_per_step", str(case.prompts)),
        *("--trainer.steps", str(steps + WARM_UP)),
    )
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        command = [sys.executable, "-m", "recipes.grpo_math", "--run.directory", str(directory)]
        # One thread for each worker, so that two workers do not slow each other down.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *flags],
            env=environment,
            timeout=TIMEOUT_S,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{case} ended with {done.returncode}:\n{done.stdout[-2000:]}")
        records = read_metrics(RunDirectory(directory).metrics)
    counted = [record.values for record in records if record.kind == "train"][WARM_UP:]
    return {name: statistics.median(step[name] for step in counted) for name in counted[0]}


def fit(few: Mapping[str, float], many: Mapping[str, float]) -> Constants:
    """Return the constants with which the simulator has the times of both runs.

    Raises:
        ValueError: an engine's step with more sequences took less time, which is noise.
    """
    first, second = (sum(metrics[name] for name in TRAINING) for metrics in (few, many))
    token_s = max(0.0, (second - first) / (MANY.batch_tokens - FEW.batch_tokens))
    return Constants(
        engine=EngineSpeed.through(
            (FEW.samples, FEW.batch_tokens / few["time/generate"]),
            (MANY.samples, MANY.batch_tokens / many["time/generate"]),
        ),
        train_fixed_s=max(0.0, first - token_s * FEW.batch_tokens),
        train_token_s=token_s,
        sync_s=statistics.mean((few["time/sync"], many["time/sync"])),
        reward_s=statistics.mean((few["time/reward"], many["time/reward"])),
    )


def predict(case: Case, constants: Constants) -> float:
    """Return the seconds of a step of the simulator."""
    engine = EngineSpeed(
        step_s=constants.engine.step_s,
        sequence_s=constants.engine.sequence_s,
        max_sequences=case.samples,  # one prompt after the other
    )
    workload = Workload(
        prompts_per_step=case.prompts,
        samples_per_prompt=case.samples,
        lengths=MeasuredLengths((case.tokens,)),
        reward_s=constants.reward_s,
        train_token_s=constants.train_token_s,
        train_fixed_s=constants.train_fixed_s,
        sync_s=constants.sync_s,
    )
    scenario = Scenario(
        workload=workload, engines=case.workers, engine=engine, max_staleness=0, steps=2
    )
    return run_scenario(scenario).step_s


if __name__ == "__main__":
    main()
