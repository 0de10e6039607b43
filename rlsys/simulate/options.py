"""The command line of `python -m rlsys.simulate`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rlsys.simulate.engine import EngineSpeed
from rlsys.simulate.length_laws import LengthLaw, parse_law
from rlsys.simulate.scenario import Failures

T = TypeVar("T")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; argparse ends the program where one is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m rlsys.simulate",
        description="Throughput, idle time and staleness of training on clusters of many sizes, by "
        "running the real training loops in simulated time. The defaults are estimates for a model "
        "of 7 B parameters on H100s, which nobody has measured: give your own.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument("--gpus", type=_list_of(_positive), default="8,64", help="sizes")
    cluster.add_argument("--gpus-per-engine", type=_positive, default=1)
    cluster.add_argument(
        "--engine",
        type=_points,
        default="1:120,256:12000",
        help="two measured points of an engine, sequences:tokens per second",
    )
    cluster.add_argument("--max-sequences", type=_positive, default=256, help="of an engine")
    cluster.add_argument(
        "--failures", type=_failures, help="MEAN,RESTART: seconds between deaths of one engine"
    )

    work = parser.add_argument_group("work of a step")
    work.add_argument("--prompts-per-gpu", type=_rate, default=2.0, help="prompts of a step")
    work.add_argument("--samples", type=_positive, default=16, help="responses to a prompt")
    work.add_argument(
        "--lengths",
        type=_law,
        default="lognormal:1500,1.0,16000",
        help="lognormal:MEDIAN,SIGMA,LONGEST, constant:TOKENS, or a Parquet file of rollouts",
    )
    work.add_argument("--train-tokens", type=_rate, default=7000.0, help="per second and GPU")
    work.add_argument("--train-fixed-s", type=_seconds, default=1.0, help="of each update")
    work.add_argument("--sync-s", type=_seconds, default=3.0, help="of the weights")
    work.add_argument("--reward-s", type=_seconds, default=1.0, help="of a response")

    loop = parser.add_argument_group("loop")
    loop.add_argument(
        "--staleness", type=_list_of(int), default="1,4", help="trainer.max_staleness"
    )
    loop.add_argument(
        "--groups-per-call", type=_positive, default=8, help="trainer.asynchronous.groups_per_call"
    )
    loop.add_argument("--steps", type=_positive, default=12, help="that count")
    loop.add_argument("--seed", type=int, default=0)

    output = parser.add_argument_group("output")
    output.add_argument("--all", action="store_true", help="every split, not only the best")
    output.add_argument("--json", action="store_true")
    output.add_argument("--plot", type=Path, help="PNG file")
    options = parser.parse_args(arguments)
    if min(options.staleness) < 1:
        parser.error("--staleness: give numbers of at least 1; the synchronous loop always runs")
    return options


def _list_of(one: Callable[[str], T]) -> Callable[[str], list[T]]:
    def parse(text: str) -> list[T]:
        return [one(part) for part in text.split(",")]

    return parse


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _rate(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return number


def _points(text: str) -> EngineSpeed:
    try:
        first, second = (tuple(map(float, point.split(":"))) for point in text.split(","))
        (n, rate), (m, other_rate) = first, second
        return EngineSpeed.through((int(n), rate), (int(m), other_rate))
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not SEQUENCES:TOKENS_PER_S,SEQUENCES:TOKENS_PER_S ({error})"
        ) from error


def _law(text: str) -> LengthLaw:
    try:
        return parse_law(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _failures(text: str) -> Failures:
    try:
        mean_s, restart_s = map(float, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not MEAN,RESTART in seconds") from error
    if not (mean_s > 0 and restart_s >= 0):
        raise argparse.ArgumentTypeError(f"{text!r}: seconds are not negative")
    return Failures(mean_s=mean_s, restart_s=restart_s)
