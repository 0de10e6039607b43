"""The same SFT, DPO and reward-model training in rlsys and in TRL: losses, time and memory.

    . .venv/bin/activate
    python -m benchmarks.offline_side_by_side                         all three, 10 steps
    python -m benchmarks.offline_side_by_side --kinds dpo --rounds 3

Both start from the same weights and take the same examples in the same order, with the same
optimizer, in float32 and without dropout: the token ids that reach the two models are compared, and
then the losses of each step. rlsys runs as a recipe does, with Ray and all its processes
(`python -m recipes.sft_math ...`); TRL runs from an environment of its own, which the script makes
once (`--environment`). The examples are generated problems, several to a prompt:

    prompt      What is 7 - 4?\\nFind the value of 9 + 2.
    response     7 - 4 = 3. \\boxed{3}\\n9 + 2 = 11. \\boxed{11}

A prompt has 1 to 8 of them (`--problems`), so lengths vary, though less than in MATH. A rejected
response has wrong results. A step has `--sequences` sequences, that is half as many pairs.

Both get the allocator's settings of `workers/cluster.py`, as many threads as this process may use,
and the same priority. Seconds per step are means from the end of the first step on. TRL runs with
each number of micro-batches in `--accumulation`; its fastest counts. A ratio is that of two runs
one after the other; the median over the rounds is printed with the smallest and the largest.

CPU seconds are those of all processes. Beside other programs they tell more than the clock, best
with OMP_WAIT_POLICY=passive, so that waiting threads do not count. Memory is the largest until the
end of the last step: of the processes that hold a model (each one's own peak, added up), and of all
processes together. Results are recorded in docs/measurements.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.process_use import ProcessUse
from benchmarks.side_by_side import MODEL, trl_python
from rlsys.config.command_line import parse
from rlsys.config.hardware import detect_hardware
from rlsys.config.offline import OfflineRunConfig
from rlsys.data.example_stream import load_examples, source_examples
from rlsys.data.synthetic_problems import SolvedProblem, generate_solved_problems
from rlsys.data.synthetic_rankings import generated_rankings
from rlsys.models import resolve_model
from rlsys.models.catalogue import cache_directory
from rlsys.models.loading import end_token_ids, load_tokenizer
from rlsys.run.observers.metrics_log import read_metrics
from workers.cluster import ALLOCATOR

TRL_STEP = Path(__file__).with_name("trl_offline_step.py")
TOLERANCE = 1e-3  # of a loss

BETAS = (0.9, 0.95)
EPS = 1e-8
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0
DPO_BETA = 0.1


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of training."""

    name: str
    recipe: str
    role: str  # section of the trained model in the configuration
    responses: int  # sequences of one example
    learning_rate: float  # the recipe's


KINDS = {
    kind.name: kind
    for kind in (
        Kind(name="sft", recipe="sft_math", role="policy", responses=1, learning_rate=5e-5),
        Kind(name="dpo", recipe="dpo_math", role="policy", responses=2, learning_rate=2e-5),
        Kind(
            name="reward_model",
            recipe="reward_model_math",
            role="reward_model",
            responses=2,
            learning_rate=5e-5,
        ),
    )
}

# [token ids, which of them are learned] of a sequence; None: a reward model learns no token.
Row = list


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, until the end of its last step."""

    losses: Sequence[float]
    ends: Sequence[float]  # of the steps, in seconds since the epoch
    cpu: float  # CPU seconds of all processes from the end of the first step to that of the last
    model_gib: float  # processes that hold a model, the sum of their peaks
    all_gib: float  # all processes, at the same time

    @property
    def seconds(self) -> float:
        """Mean seconds of a step without the first."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)

    @property
    def cpu_seconds(self) -> float:
        """Mean CPU seconds of a step without the first."""
        return self.cpu / (len(self.ends) - 1)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What both do."""

    kind: Kind
    steps: int
    examples: int  # per step
    model: Path
    data: Path

    def flags(self, directory: Path) -> list[str]:
        """Return the flags of the recipe."""
        role = f"--{self.kind.role}"
        flags = {
            "--model.path": self.model,
            "--data.train": self.data,
            "--data.eval": "off",
            "--data.shuffle": "false",
            "--data.max_prompt_tokens": 512,
            "--data.max_response_tokens": 512,
            "--trainer.steps": self.steps,
            "--trainer.examples_per_step": self.examples,
            "--trainer.evaluation.every": 0,
            "--trainer.checkpoints.every": 0,
            f"{role}.compute_dtype": "float32",
            f"{role}.optimizer.learning_rate": self.kind.learning_rate,
            f"{role}.optimizer.schedule": "constant",
            f"{role}.optimizer.warmup_steps": 0,
            f"{role}.optimizer.betas": json.dumps(BETAS),
            f"{role}.optimizer.eps": EPS,
            f"{role}.optimizer.weight_decay": WEIGHT_DECAY,
            f"{role}.optimizer.max_grad_norm": MAX_GRAD_NORM,
            "--run.directory": directory,
            "--run.progress": "false",
        }
        if self.kind.name == "dpo":
            flags["--objective.beta"] = DPO_BETA
        return [word for flag, value in flags.items() for word in (flag, str(value))]

    def trl_settings(self) -> dict[str, object]:
        """Return the same settings of optimizer and loss, under TRL's names."""
        settings: dict[str, object] = {
            "learning_rate": self.kind.learning_rate,
            "adam_beta1": BETAS[0],
            "adam_beta2": BETAS[1],
            "adam_epsilon": EPS,
            "weight_decay": WEIGHT_DECAY,
            "max_grad_norm": MAX_GRAD_NORM,
        }
        if self.kind.name == "dpo":
            settings["beta"] = DPO_BETA
        return settings


def write_examples(kind: Kind, count: int, problems: int, file: Path) -> None:
    """Write examples of 1 to `problems` problems, in the columns that both read."""
    rng = random.Random(0)
    counts = [rng.randint(1, problems) for _ in range(count)]
    solved, _ = generate_solved_problems((1,), train_size=sum(counts), eval_size=1, seed=0)

    lines = []
    for size in counts:
        own, solved = solved[:size], solved[size:]
        lines.append(json.dumps(example(kind, own)) + "\n")
    file.write_text("".join(lines))


def example(kind: Kind, solved: Sequence[SolvedProblem]) -> dict[str, str]:
    """Return one example of several problems.

    Responses begin with a space, so that both tokenize them alike.
    """
    prompt = "\n".join(each.problem.problem for each in solved)
    right = " " + "\n".join(each.solution for each in solved)
    if kind.responses == 1:
        return {"prompt": prompt, "completion": right}

    wrong = []
    for ranking in generated_rankings(solved, responses=2, seed=0):
        wrong.append(ranking.responses[ranking.ranks.index(max(ranking.ranks))])
    return {"prompt": prompt, "chosen": right, "rejected": " " + "\n".join(wrong)}


def save_reward_model(source: Path, directory: Path) -> None:
    """Save the model with a random head, in transformers' layout, which both load."""
    model = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=1, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(model.score.weight, std=0.02, generator=generator)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)


def expected_rows(work: Work, directory: Path) -> list[list[Row]]:
    """Return the sequences of each step that the recipe with these flags trains on."""
    hardware = detect_hardware()
    module = importlib.import_module(f"recipes.{work.kind.recipe}")
    recipe = getattr(module, work.kind.recipe)(hardware)
    config: OfflineRunConfig = parse(recipe, work.flags(directory)).config

    tokenizer = load_tokenizer(work.model)
    ends = end_token_ids(work.model, tokenizer)
    stream = load_examples(config, tokenizer, source_examples(config), ends).train
    steps = []
    for _ in range(work.steps):
        batch = stream.next_batch()
        sequences = batch.sequences
        rows: list[Row] = []
        for start, end in zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True):
            learned = sequences.loss_mask[start:end].tolist()
            masked = None if work.kind.name == "reward_model" else learned
            rows.append([sequences.token_ids[start:end].tolist(), masked])
        by_rank = sorted(range(len(rows)), key=lambda i: (sequences.group_ids[i], batch.ranks[i]))
        steps.append([rows[i] for i in by_rank])
    return steps


def check_rows(expected: Sequence[Sequence[Row]], seen: Sequence[Sequence[Row]]) -> None:
    """Refuse a comparison on different tokens.

    Raises:
        RuntimeError: some sequence differs, or its learned tokens do.
    """
    if len(expected) != len(seen):
        raise RuntimeError(f"rlsys trains on {len(expected)} steps, TRL on {len(seen)}")
    for step, (ours, theirs) in enumerate(zip(expected, seen, strict=True), start=1):
        if list(ours) == list(theirs):
            continue
        pairs = zip(ours, theirs, strict=False)
        place = next((i for i, (own, their) in enumerate(pairs) if own != their), len(ours))
        raise RuntimeError(
            f"step {step}: rlsys and TRL train on different tokens, first in sequence {place} "
            f"(rlsys has {len(ours)} of them, TRL {len(theirs)})"
        )


def run_watched(command: Sequence[str], log: Path) -> ProcessUse:
    """Run a command, and return what its processes used.

    Raises:
        RuntimeError: the command failed; with the end of what it printed.
    """
    # Ray lowers the priority of its workers, which beside other programs would decide the result.
    environment = {**os.environ, **ALLOCATOR, "RAY_worker_niceness": "0"}
    environment["OMP_NUM_THREADS"] = str(detect_hardware().cpus)
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        with ProcessUse(process.pid) as use:
            code = process.wait()
    if code:
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return use


def run_rlsys(work: Work, directory: Path) -> Run:
    """Run the recipe."""
    command = [sys.executable, "-m", f"recipes.{work.kind.recipe}", *work.flags(directory)]
    use = run_watched(command, directory.with_suffix(".log"))
    records = [
        record for record in read_metrics(directory / "metrics.jsonl") if record.kind == "train"
    ]
    last = records[-1]
    ends = [record.time for record in records]
    roles = (f"memory/{work.kind.role}", "memory/reference")
    return Run(
        losses=[record.values[f"{work.kind.role}/loss"] for record in records],
        ends=ends,
        cpu=use.cpu_seconds(ends[0], ends[-1]),
        model_gib=sum(last.values.get(name, 0.0) for name in roles),
        all_gib=use.peak_gib(ends[-1]),
    )


def run_trl(
    work: Work, python: Path, accumulation: int, directory: Path
) -> tuple[Run, list[list[Row]]]:
    """Run TRL's trainer; return the run and the sequences of each step."""
    output = directory.with_suffix(".json")
    command = [str(python), str(TRL_STEP), str(work.model), str(work.data)]
    command += ["--kind", work.kind.name, "--output", str(output), "--steps", str(work.steps)]
    command += ["--examples", str(work.examples), "--accumulation", str(accumulation)]
    command += ["--optimizer", json.dumps(work.trl_settings())]
    use = run_watched(command, directory.with_suffix(".log"))
    found = json.loads(output.read_text())
    ends = found["ends"]
    run = Run(
        losses=found["losses"],
        ends=ends,
        cpu=use.cpu_seconds(ends[0], ends[-1]),
        model_gib=found["gib"],
        all_gib=use.peak_gib(ends[-1]),
    )
    return run, found["rows"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The runs of one kind, a pair for each round."""

    kind: str
    tokens: float  # of a step, without padding; a prompt once for each of its responses
    trl: Sequence[Run]
    rlsys: Sequence[Run]
    accumulation: Sequence[int]  # TRL's fastest number of micro-batches

    @property
    def difference(self) -> float:
        """Largest difference of a loss, over steps and rounds."""
        return max(
            abs(theirs - ours)
            for trl, rlsys in zip(self.trl, self.rlsys, strict=True)
            for theirs, ours in zip(trl.losses, rlsys.losses, strict=True)
        )

    def report(self) -> str:
        """Return the losses of the first round, step by step."""
        steps = zip(self.trl[0].losses, self.rlsys[0].losses, strict=True)
        lines = [f"\n{self.kind}: loss before each step\n\n| step | TRL | rlsys | difference |"]
        lines.append("|---|---|---|---|")
        for step, (theirs, ours) in enumerate(steps, start=1):
            lines.append(f"| {step} | {theirs:.6f} | {ours:.6f} | {ours - theirs:+.1e} |")
        return "\n".join(lines)

    def rows(self) -> tuple[str, str]:
        """Return the row of each program."""
        both = (("TRL", self.trl), ("rlsys", self.rlsys))
        wall, cpu = self._ratios("seconds"), self._ratios("cpu_seconds")
        first, second = (
            [self.kind, f"{self.tokens:.0f}", name, *_figures(runs)] for name, runs in both
        )
        first += ["", "", ""]
        second += [f"**{_spread(wall)}**", f"**{_spread(cpu)}**", f"{self.difference:.0e}"]
        return f"| {' | '.join(first)} |", f"| {' | '.join(second)} |"

    def _ratios(self, name: str) -> list[float]:
        """Return TRL's figure divided by that of rlsys, for each round."""
        rounds = zip(self.trl, self.rlsys, strict=True)
        return [getattr(trl, name) / getattr(rlsys, name) for trl, rlsys in rounds]


def _figures(runs: Sequence[Run]) -> list[str]:
    return [
        f"{statistics.median(run.seconds for run in runs):.2f}",
        f"{statistics.median(run.cpu_seconds for run in runs):.2f}",
        f"{max(run.model_gib for run in runs):.1f}",
        f"{max(run.all_gib for run in runs):.1f}",
    ]


def _spread(ratios: Sequence[float]) -> str:
    median = f"{statistics.median(ratios):.2f}"
    return median if len(ratios) == 1 else f"{median} ({min(ratios):.2f} to {max(ratios):.2f})"


HEADER = (
    "| | tokens per step | | s per step | CPU s per step | GiB, processes with a model "
    "| GiB, all processes | times as fast | times less CPU time | largest difference of a loss |\n"
    + "|---" * 10
    + "|"
)


def compare(kind: Kind, arguments: argparse.Namespace, python: Path, directory: Path) -> Comparison:
    """Run both, in turn, and compare tokens and losses."""
    directory.mkdir()
    examples = arguments.sequences // kind.responses
    model = resolve_model(arguments.model)
    if kind.name == "reward_model":
        save_reward_model(model, directory / "model")
        model = directory / "model"
    data = directory / "examples.jsonl"
    write_examples(kind, examples * arguments.steps, arguments.problems, data)
    work = Work(kind=kind, steps=arguments.steps, examples=examples, model=model, data=data)
    expected = expected_rows(work, directory / "unused")

    trl: list[Run] = []
    rlsys: list[Run] = []
    fastest: list[int] = []
    for number in range(arguments.rounds):
        rlsys.append(run_rlsys(work, directory / f"rlsys_{number}"))
        runs: dict[int, Run] = {}
        for accumulation in arguments.accumulation:
            place = directory / f"trl_{number}_{accumulation}"
            runs[accumulation], rows = run_trl(work, python, accumulation, place)
            check_rows(expected, rows)
            print(
                f"{kind.name}, round {number + 1}: rlsys {rlsys[-1].seconds:.2f} s per step, TRL "
                f"{runs[accumulation].seconds:.2f} s in {accumulation} micro-batches",
                flush=True,
            )
        fastest.append(min(runs, key=lambda count: runs[count].seconds))
        trl.append(runs[fastest[-1]])

    num_tokens = sum(len(tokens) for step in expected for tokens, _ in step)
    return Comparison(
        kind=kind.name,
        tokens=num_tokens / work.steps,
        trl=trl,
        rlsys=rlsys,
        accumulation=fastest,
    )


def main() -> None:
    """Compare each kind and print a table; exit code 1 where losses differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sequences", type=int, default=8, help="sequences of a step")
    parser.add_argument("--problems", type=int, default=8, help="most problems of a prompt")
    parser.add_argument("--accumulation", nargs="*", type=int, default=[1, 4])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--environment", type=Path, default=cache_directory() / "trl")
    parser.add_argument("--output", type=Path, help="write the runs as JSON too")
    arguments = parser.parse_args()

    python = trl_python(arguments.environment)
    with tempfile.TemporaryDirectory() as scratch:
        comparisons = [
            compare(KINDS[name], arguments, python, Path(scratch) / name)
            for name in arguments.kinds
        ]

    for comparison in comparisons:
        print(comparison.report())
    print("\n" + HEADER)
    for comparison in comparisons:
        print("\n".join(comparison.rows()))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps([asdict(each) for each in comparisons], indent=1))

    different = [each.kind for each in comparisons if not each.difference <= TOLERANCE]
    if different:
        sys.exit(f"losses differ by more than {TOLERANCE:g}: {', '.join(different)}")


if __name__ == "__main__":
    main()
