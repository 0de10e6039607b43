"""Kill a random process of a tiny run at a random moment, again and again.

    python -m benchmarks.chaos --rounds 40
    python -m benchmarks.chaos --rounds 4 --kinds "policy rank,driver" --directory /tmp/chaos

A round is a run of `recipes.ppo_math` with the tiny model and the transformers engine, in which one
process gets SIGKILL; with the kind `hang`, the policy's rank gets SIGSTOP instead. A run whose
driver ends is continued with the same command and --resume. The metrics of every round are compared
with those of a run that nobody disturbed, and all processes that a round leaves are counted and
killed. One line of JSON a round goes to DIRECTORY/rounds.jsonl. See docs/fault_tolerance.md.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.support.disturbed_runs import (
    FLAGS,
    KINDS,
    DisturbedRun,
    Ended,
    differences,
    faults_of,
    strike,
    undisturbed,
)

HANG = "hang"
ENDS_THE_DRIVER = ("driver", "raylet", "head")
STEPS = 6
PHASE_TIMEOUT_S = 60
LEFT_AFTER_S = 20.0
PRINTED = ("round", "kind", "place", "survived", "healed", "lost_s", "lost_steps", "wrong", "left")


@dataclass(frozen=True, kw_only=True)
class Round:
    """What a round did, and what it cost."""

    round: int
    kind: str
    place: str  # phase and step of the blow
    survived: bool  # it ended with the metrics of an undisturbed run
    healed: bool  # and its driver did not end
    lost_s: float  # seconds more than the undisturbed run
    lost_steps: int  # taken again
    wrong: int  # metrics and steps that differ, are missing or are there twice
    left: int  # processes that live LEFT_AFTER_S after the end
    output: str = ""  # of a round that did not survive


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the rounds, and print a line for each and a table at the end."""
    options = _options(arguments)
    directory = options.directory or Path(tempfile.mkdtemp(prefix="rlsys-chaos-"))
    directory.mkdir(parents=True, exist_ok=True)
    chance = random.Random(options.seed)
    flags = (*FLAGS, "--trainer.steps", str(STEPS))

    whole = directory / "whole"
    with undisturbed(whole, *flags, timeout_s=options.timeout) as ended:
        seconds = ended.seconds
    print(f"undisturbed: {seconds:.0f} s; results in {directory}", flush=True)

    rounds = []
    for number in range(options.rounds):
        kind = options.kinds[number % len(options.kinds)]
        place = directory / f"round_{number:03d}"
        one = _round(number, kind, place, whole, seconds, flags, chance, options.timeout)
        rounds.append(one)
        with (directory / "rounds.jsonl").open("a") as file:
            file.write(json.dumps(asdict(one)) + "\n")
        print("  ".join(f"{name} {getattr(one, name)}" for name in PRINTED), flush=True)
        if one.survived and not options.keep:
            shutil.rmtree(place)
    _print_table(rounds)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument(
        "--kinds",
        type=lambda text: text.split(","),
        default=[*KINDS, HANG],
        help="comma-separated; they take turns",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the blows")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds of one run")
    parser.add_argument("--directory", type=Path, help="of the runs; default: a new one in /tmp")
    parser.add_argument("--keep", action="store_true", help="keep the runs that survived too")
    options = parser.parse_args(arguments)
    unknown = set(options.kinds) - {*KINDS, HANG}
    if unknown:
        parser.error(f"--kinds: {sorted(unknown)} are none of {', '.join([*KINDS, HANG])}")
    return options


def _round(
    number: int,
    kind: str,
    directory: Path,
    whole: Path,
    seconds: float,
    flags: Sequence[str],
    chance: random.Random,
    timeout_s: float,
) -> Round:
    """Run, strike at a random moment of the training, and compare the result."""
    if kind == HANG:
        flags = (*flags, "--trainer.phase_timeout_s", str(PHASE_TIMEOUT_S))
    began = time.monotonic()
    with DisturbedRun(directory, *flags) as run:
        place = _strike(run, kind, chance, timeout_s)
        ended = run.end(timeout_s)
        left = len(run.left_over(LEFT_AFTER_S))
    outputs, healed = [ended], ended.code == 0
    if not healed:
        with DisturbedRun(directory, "--resume") as again:
            outputs.append(again.end(timeout_s))
            left += len(again.left_over(LEFT_AFTER_S))

    wrong = differences(directory, whole) if outputs[-1].code == 0 else ["the run failed"]
    survived = not wrong
    return Round(
        round=number,
        kind=kind,
        place=place,
        survived=survived,
        healed=survived and healed,
        lost_s=round(time.monotonic() - began - seconds, 1),
        lost_steps=_lost_steps(directory, outputs, place),
        wrong=len(wrong),
        left=left,
        output="" if survived else "\n".join([*wrong[:20], *(one.output for one in outputs)]),
    )


def _strike(run: DisturbedRun, kind: str, chance: random.Random, timeout_s: float) -> str:
    """Wait for a random moment, strike, and return where the run was."""
    victim, number = ("policy rank", signal.SIGSTOP) if kind == HANG else (kind, signal.SIGKILL)
    after = chance.randrange(STEPS)
    delay_s = chance.uniform(0.0, 1.5)
    if not run.wait_until(lambda s: s.state == "running" and s.step >= after, timeout_s):
        return "the run ended before"
    time.sleep(delay_s)

    place: list[str] = []
    run.wait_until(lambda status: not place.append(status.phase), timeout_s)
    return place[0] if strike(run, victim, number) and place else "there was no such process"


def _lost_steps(directory: Path, outputs: Sequence[Ended], place: str) -> int:
    """Return the steps that were taken again: those that restarts name, and those of a resume."""
    lost = 0
    for fault in faults_of(directory):
        named = re.search(r"\((\d+) steps? lost\)", str(fault["action"]))
        lost += int(named.group(1)) if named else 0
    if len(outputs) > 1:
        step = re.search(r"of step (\d+)", place)
        newest = r"(?:resuming from|already complete:) \S*step_(\d+)"
        resumed = re.search(newest, outputs[1].output)
        completed = max(0, int(step.group(1)) - 1) if step else 0
        lost += max(0, completed - (int(resumed.group(1)) if resumed else 0))
    return lost


def _print_table(rounds: Sequence[Round]) -> None:
    columns = ("process", "rounds", "survived", "healed", "s lost", "steps lost", "wrong", "left")
    print("\nMeans of the seconds and steps lost.\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    kinds = list(dict.fromkeys(one.kind for one in rounds))
    for kind in kinds:
        _print_row(kind, [one for one in rounds if one.kind == kind])
    _print_row("all", rounds)
    others = [one for one in rounds if one.kind not in ENDS_THE_DRIVER]
    _print_row("all but driver, raylet and head", others)


def _print_row(name: str, rounds: Sequence[Round]) -> None:
    count = max(1, len(rounds))
    cells = [
        name,
        len(rounds),
        sum(one.survived for one in rounds),
        sum(one.healed for one in rounds),
        f"{sum(one.lost_s for one in rounds) / count:.1f}",
        f"{sum(one.lost_steps for one in rounds) / count:.1f}",
        sum(one.wrong for one in rounds),
        sum(one.left for one in rounds),
    ]
    print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
