"""Random and wrong configurations through the real command line, checked against fixed rules.

Every field, file and plug-in; of the random configurations each tenth runs for real:

    python -m benchmarks.campaigns.command_line --seed 0 --trials 300

A sample, under a minute:

    python -m benchmarks.campaigns.command_line --seed 0 --trials 30 --small

One kind of: field edge parameter silent data plug-in reward random run:

    python -m benchmarks.campaigns.command_line --only data

A trial is a recipe with flags. Most are dry runs inside this process, through `run_recipe` as the
command calls it. These rules hold for every trial:

    exit code      0, 2 for bad input, 130 when interrupted; an accepted run does not end with 1
    refusals       each line begins with `error:` and a field of the configuration, shows the value
                   and names a remedy
    no traceback   on the console, except from a user's own reward function
    a run          ends with a report, a checkpoint and finite metrics; its config.yaml reads back
                   to the requested configuration
    first update   of a fresh batch: mean ratio 1, nothing clipped

A trial that breaks a rule is a finding and is printed with its command; the exit code is then 1.
Files of the trials lie in runs/campaigns.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.campaigns.command_line_trials import (
    REMEDIES,
    Trial,
    data_trials,
    edge_trials,
    field_trials,
    parameter_trials,
    plugin_trials,
    random_trial,
    reward_trials,
    silent_trials,
)
from recipes.run_recipe import run_recipe
from rlsys.config import RunConfig
from rlsys.config.command_line import all_fields, evolve, parse
from rlsys.config.hardware import detect_hardware

ROOT = Path(__file__).resolve().parents[2]
WORKSPACE = Path("runs") / "campaigns"
LIMIT_S = 240.0  # of one run
SMALL_SAMPLE = 120  # dry runs of the small version
TRIALS_PER_RUN = 10  # random trials of which one runs for real
ROUNDING = {"float32": 1e-4, "bfloat16": 2e-2}  # of the mean ratio of a first update
TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True, kw_only=True)
class Result:
    """Exit code and output of a trial's command."""

    code: int
    out: str
    err: str
    directory: Path | None = None  # of a run


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A trial that broke a rule."""

    trial: Trial
    faults: tuple[str, ...]
    said: str  # the last words on the console

    def text(self) -> str:
        """Return the faults, the command and its output, for people."""
        faults = [f"- {fault}" for fault in self.faults]
        return "\n".join([*faults, f"  {command(self.trial)}", f"    {self.said}"])


def command(trial: Trial) -> str:
    """Return the command that repeats a trial."""
    path = f"PYTHONPATH={shlex.quote(trial.python_path)} " if trial.python_path else ""
    return f"{path}python -m recipes.{trial.recipe} {shlex.join(trial.flags())}"


# --- running trials ---


def recipe_of(name: str):
    """Return the function of a recipe's module."""
    return getattr(importlib.import_module(f"recipes.{name}"), name)


def in_this_process(trial: Trial) -> Result:
    """Make a dry run through the command's own entry point."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    if trial.python_path:
        sys.path.insert(0, trial.python_path)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_recipe(recipe_of(trial.recipe), trial.flags())
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        except BaseException:  # what the interpreter would print
            err.write(traceback.format_exc())
            code = 1
    return Result(code=code, out=out.getvalue(), err=err.getvalue())


def in_a_fork(trial: Trial) -> Result:
    """Make a dry run in a child of this process, with which a plug-in's registrations end."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        sender.send(in_this_process(trial))

    process = context.Process(target=child)
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = Result(code=1, out="", err="the process ended without a word")
    process.join()
    return result


def for_real(trial: Trial, directory: Path) -> Result:
    """Make the whole run as a command in processes of its own."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *([trial.python_path] if trial.python_path else [])]
    arguments = [sys.executable, "-m", f"recipes.{trial.recipe}", *trial.flags()]
    variables = {
        "PYTHONPATH": ":".join(paths),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    process = subprocess.Popen(
        [*arguments, "--run.directory", str(directory)],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        err += f"\nno end after {LIMIT_S:g} s"
    return Result(code=process.returncode, out=out, err=err, directory=directory)


# --- the rules ---

FIELDS = tuple(name for name, _ in all_fields())


def is_field(name: str) -> bool:
    """Return whether a name is a field, a section, or something inside a field.

    Inside a field are its parameters and elements.
    """
    name = name.strip().removeprefix("--")
    if name in ("RAY_ADDRESS", "config", "resume"):
        return True
    return any(
        field == name or field.startswith(name + ".") or name.startswith(field + ".")
        for field in FIELDS
    )


def refusal_faults(trial: Trial, result: Result) -> Iterator[str]:
    """Yield the faults of the message of a command that ended with 2."""
    lines = [line for line in result.err.splitlines() if line.strip()]
    if not lines:
        yield "refused without a word"
    for line in lines:
        if not line.startswith("error: "):
            yield f"a line does not begin with `error:`: {line[:100]!r}"
            continue
        names = line.removeprefix("error: ").split(": ")[0].split(",")
        if not all(is_field(name) for name in names):
            yield f"names no field of the configuration: {line[:100]!r}"
        # A value that does not fit is followed by what the field is for, in brackets.
        explained = "does not fit: " in line and line.endswith(")")
        if not explained and not re.search(rf"\b({REMEDIES})\b", line):
            yield f"says no remedy: {line[:160]!r}"
    if trial.expect not in ("refused", "reported"):
        return

    about = [
        line
        for line in lines
        if trial.field and line.removeprefix("error: ").removeprefix("--").startswith(trial.field)
    ]
    if trial.field and not about:
        yield f"does not name {trial.field}"
    elif trial.value and not any(has_value(line, trial.value) for line in about):
        yield f"does not show the value {trial.value!r}"


def has_value(line: str, value: str) -> bool:
    """Return whether a message shows a value, as it was typed or as it was read."""
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        read = value

    shown = {value, value.strip(".-"), *value.split(",")}
    for part in [read, *inner_values(read)]:
        shown |= {str(part), repr(part)}
        if isinstance(part, str) and re.fullmatch(r"-?[\d.]+e[-+]?\d+", part):
            part = float(part)
        if isinstance(part, float):
            shown |= {f"{part:g}", str(part)}
    return any(text in line for text in shown if text) or not value.strip()


def inner_values(tree: object) -> Iterator[object]:
    """Yield keys and values of a nested value."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from (key, value)
            yield from inner_values(value)
    elif isinstance(tree, list):
        for value in tree:
            yield value
            yield from inner_values(value)


def dry_faults(trial: Trial, result: Result) -> Iterator[str]:
    """Yield the faults of a dry run that was accepted."""
    text, _, plan = result.out.partition("\nmachine  ")
    config = RunConfig.model_validate(yaml.safe_load(text))
    recipe = recipe_of(trial.recipe)(detect_hardware())
    if config != parse(recipe, trial.flags()).config:
        yield "the configuration that is printed reads back to another"
    for name, value in numbers(config.model_dump(mode="json")):
        if not math.isfinite(value):
            yield f"accepts {value} for {name}"
    if trial.problems is not None:
        counted = re.search(r"^data +(\d+) training", plan, re.MULTILINE)
        if counted is None or int(counted[1]) != trial.problems:
            planned = counted[1] if counted else "no"
            yield f"plans with {planned} training problems, the file has {trial.problems}"
        yield from odd_texts(config)


def odd_texts(config: RunConfig) -> Iterator[str]:
    """Yield problems and answers that are not text of the file but a printed Python object."""
    from rlsys.data.prompt_stream import load_problems

    for problem in load_problems(config).train:
        for text in (problem.problem, problem.answer):
            if re.match(r"^(\[[{'\"]|\{'|None$|nan$)", text):
                yield f"reads {text[:60]!r} as a text"
                return


def numbers(tree: object, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield every float of a nested configuration, with its dotted name."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from numbers(value, f"{name}.{key}".strip("."))
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            yield from numbers(value, f"{name}.{i}")
    elif isinstance(tree, float):
        yield name, tree


def run_faults(trial: Trial, result: Result) -> Iterator[str]:
    """Yield the faults of a run that ended with 0."""
    from rlsys.config.command_line import load_yaml
    from rlsys.run.observers.metrics_log import read_metrics

    directory = result.directory
    assert directory is not None
    config = load_yaml(directory / "config.yaml")
    requested = parse(recipe_of(trial.recipe)(detect_hardware()), trial.flags()).config
    if config != evolve(requested, {"run.directory": str(directory)}):
        yield "config.yaml is not the requested configuration"

    if not (directory / "report.html").exists():
        yield "ends without a report"
    if not list((directory / "checkpoints").glob("step_*")):
        yield "ends without a checkpoint"

    records = read_metrics(directory / "metrics.jsonl")
    steps = [record for record in records if record.kind == "train"]
    if len(steps) != config.trainer.steps:
        yield f"metrics of {len(steps)} steps, {config.trainer.steps} were requested"
    for record in records:
        odd = [name for name, value in record.values.items() if not math.isfinite(value)]
        if odd:
            yield f"metrics that are not finite in step {record.step}: {', '.join(odd)}"

    # The policy has not moved before the only update of a batch.
    policy = config.policy
    if steps and policy.epochs * policy.num_mini_batches == 1:
        first = steps[0].values
        ratio = first.get("policy/ratio_mean", 1.0)
        if abs(ratio - 1) > ROUNDING[policy.compute_dtype]:
            yield f"mean ratio {ratio} in the first update"
        if first.get("policy/clip_fraction", 0.0) > 0:
            yield f"{first['policy/clip_fraction']:.1%} clipped in the first update"


def faults_of(trial: Trial, result: Result) -> Iterator[str]:
    """Yield every rule that a result breaks."""
    said = result.out + result.err
    if TRACEBACK in said and trial.kind != "reward function":
        yield "a traceback on the console"
    if result.code == 2:
        yield from refusal_faults(trial, result)
        if trial.expect == "accepted":
            yield "is refused, and should work"
        return
    if trial.expect == "seen":
        if result.code == 0:
            yield "ends with exit code 0"
        if trial.value not in said:
            yield f"does not say {trial.value!r}"
        return
    if result.code != 0:
        yield f"accepted, and then exit code {result.code}"
        return
    if trial.expect == "refused":
        yield f"accepts {trial.value!r} for {trial.field}" if trial.value else "is accepted"
    plan = result.out.partition("\nmachine  ")[2] + result.err
    if trial.expect == "reported" and not (trial.field in plan and trial.value in plan):
        yield f"{trial.field} {trial.value} has no effect here, and nothing says so"
    yield from run_faults(trial, result) if trial.runs else dry_faults(trial, result)


def examine(trial: Trial, directory: Path) -> Finding | None:
    """Run a trial and check it; None where it breaks no rule."""
    if trial.runs:
        result = for_real(trial, directory)
    elif trial.python_path:
        result = in_a_fork(trial)
    else:
        result = in_this_process(trial)

    try:
        found = tuple(faults_of(trial, result))
    except Exception as error:  # an output that the checks cannot read is a finding as well
        found = (f"cannot be checked: {type(error).__name__}: {error}",)
    words = (result.err.strip() or result.out.strip()).splitlines() or [""]
    return Finding(trial=trial, faults=found, said=words[-1][:300]) if found else None


# --- the campaign ---


def dry_trials(seed: int, count: int) -> list[Trial]:
    """Return all trials without a run, in a fixed order."""
    draw = random.Random(seed)
    return [
        *field_trials(),
        *edge_trials(),
        *parameter_trials(),
        *silent_trials(),
        *data_trials(WORKSPACE / "data", draw),
        *plugin_trials(WORKSPACE / "plugins"),
        *(trial for trial in reward_trials(WORKSPACE / "rewards") if not trial.runs),
        *(random_trial(draw) for _ in range(count)),
    ]


def real_trials(seed: int, count: int) -> list[Trial]:
    """Return the trials that run: failing reward functions, and random accepted configurations."""
    draw = random.Random(seed + 1)
    chosen = [trial for trial in reward_trials(WORKSPACE / "rewards") if trial.runs]
    accepted = 0
    while accepted < count:
        trial = random_trial(draw, runs=True)
        dry = Trial(kind="run", recipe=trial.recipe, arguments=trial.arguments, expect="either")
        if in_this_process(dry).code == 0:
            chosen.append(trial)
            accepted += 1
    return chosen


def examine_all(dry: Sequence[Trial], real: Sequence[Trial], processes: int) -> list[Finding]:
    """Examine all trials: dry runs side by side, runs one after the other."""
    nowhere = [WORKSPACE] * len(dry)
    if processes == 1:
        found = [examine(trial, place) for trial, place in zip(dry, nowhere, strict=True)]
    else:
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            found = list(pool.map(examine, dry, nowhere, chunksize=8))
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for i, trial in enumerate(real):
        found.append(examine(trial, WORKSPACE / "runs" / f"{stamp}-{i}"))
    return [finding for finding in found if finding is not None]


def write_json(trials: Sequence[Trial], findings: Sequence[Finding], path: Path) -> None:
    """Write the counts by kind, and every finding."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "trials": Counter(trial.kind for trial in trials),
        "findings": [
            {
                "kind": finding.trial.kind,
                "faults": finding.faults,
                "command": command(finding.trial),
                "said": finding.said,
            }
            for finding in findings
        ],
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def main() -> int:
    """Run the campaign; the number of findings decides the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=300, help="Random configurations.")
    parser.add_argument("--runs", type=int, default=None, help="How many of them run for real.")
    parser.add_argument("--dry", action="store_true", help="Dry runs alone.")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", default="", help="Trials whose kind begins with this.")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, default=None, help="Where to write the findings.")
    options = parser.parse_args()

    start = time.perf_counter()
    runs = options.trials // TRIALS_PER_RUN if options.runs is None else options.runs
    dry = dry_trials(options.seed, options.trials)
    if options.small:
        dry, runs = random.Random(options.seed).sample(dry, SMALL_SAMPLE), 1
    dry = [trial for trial in dry if trial.kind.startswith(options.only)]
    real = [] if options.dry else real_trials(options.seed, runs)
    if options.small:
        real = real[-1:]  # a reward function that fails takes a run each
    real = [trial for trial in real if trial.kind.startswith(options.only)]

    findings = examine_all(dry, real, options.processes)
    trials = [*dry, *real]
    for finding in findings:
        print(f"{finding.trial.kind}\n{finding.text()}")
    counts = Counter(trial.kind for trial in trials)
    broken = Counter(finding.trial.kind for finding in findings)
    for kind in sorted(counts):
        print(f"{counts[kind]:6d} {kind:16s} {broken[kind]:5d} findings")
    print(f"{len(trials)} trials in {time.perf_counter() - start:.0f} s")
    if options.json:
        write_json(trials, findings, options.json)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
