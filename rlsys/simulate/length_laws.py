"""Laws of response lengths: how many tokens a simulated response has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray


class LengthLaw(Protocol):
    """A distribution of response lengths."""

    def draw(self, generator: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Return [count] numbers of tokens, each at least 1."""
        ...


@dataclass(frozen=True, kw_only=True)
class LogNormalLengths:
    """Lengths whose logarithm is normal: exp(log(median) + sigma z), cut at `longest`.

    Without the cut the mean is median * exp(sigma^2 / 2). With a sigma of 1 one response in a
    hundred is more than ten times as long as the median.
    """

    median: float
    sigma: float
    longest: int

    def draw(self, generator: np.random.Generator, count: int) -> NDArray[np.int64]:
        """See `LengthLaw`."""
        drawn = np.exp(math.log(self.median) + self.sigma * generator.standard_normal(count))
        return np.clip(np.rint(drawn), 1, self.longest).astype(np.int64)


@dataclass(frozen=True)
class MeasuredLengths:
    """Lengths that were measured, each as likely as the others."""

    lengths: Sequence[int]

    def draw(self, generator: np.random.Generator, count: int) -> NDArray[np.int64]:
        """See `LengthLaw`."""
        return generator.choice(np.asarray(self.lengths, dtype=np.int64), size=count)


def parse_law(text: str) -> LengthLaw:
    """Return the law that a command line names.

    `lognormal:MEDIAN,SIGMA,LONGEST`, `constant:TOKENS`, or the path of a Parquet file of rollouts,
    whose responses are the law.

    Raises:
        ValueError: it names none.
    """
    kind, _, numbers = text.partition(":")
    try:
        if kind == "constant":
            tokens = int(numbers)
            _check_positive(tokens)
            return MeasuredLengths((tokens,))
        if kind == "lognormal":
            median, sigma, longest = (float(number) for number in numbers.split(","))
            _check_positive(median, sigma, longest)
            return LogNormalLengths(median=median, sigma=sigma, longest=int(longest))
    except ValueError as error:
        raise ValueError(f"lengths: {text!r}: {error}. {FORMS}") from error
    if text.endswith(".parquet") and Path(text).is_file():
        return MeasuredLengths(_lengths_of_rollouts(Path(text)))
    raise ValueError(f"lengths: {text!r} is no law of lengths. {FORMS}")


FORMS = (
    "Give lognormal:MEDIAN,SIGMA,LONGEST, constant:TOKENS, or a Parquet file of a run's rollouts."
)


def _check_positive(*numbers: float) -> None:
    for number in numbers:
        if not 0 < number < math.inf:
            raise ValueError(f"{number:g} is not a number above 0")


def _lengths_of_rollouts(path: Path) -> Sequence[int]:
    """Return the number of response tokens of each row of a file of rollouts."""
    masks = pyarrow.parquet.read_table(path, columns=["response_mask"])["response_mask"]
    lengths = [sum(mask) for mask in masks.to_pylist() if mask]
    found = [length for length in lengths if length]
    if not found:
        raise ValueError(f"lengths: {path} has no response with a token")
    return found
