"""Metrics with their reductions over microbatches, mini-batches, ranks and workers.

A worker reports `{"policy/entropy": mean(2.1, count=512)}`; `combine` merges any number of such
reports into one, and `values` returns the plain numbers that are written and shown.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Reduction = Literal["sum", "mean", "max"]


@dataclass(frozen=True)
class Metric:
    """One number with its reduction.

    `count` is the number of things that a mean is over, and its weight when means are merged.
    """

    value: float
    reduction: Reduction
    count: float = 1.0


MetricMap = Mapping[str, Metric]


def total(value: float) -> Metric:
    """Return a quantity that adds up: tokens, seconds of work, timeouts."""
    return Metric(float(value), "sum")


def mean(value: float, count: float = 1.0) -> Metric:
    """Return an average over `count` things; averages are merged as the weighted mean."""
    return Metric(float(value), "mean", float(count))


def maximum(value: float) -> Metric:
    """Return a largest value: ratio, log-prob difference, peak memory."""
    return Metric(float(value), "max")


def _combine_pair(name: str, left: Metric, right: Metric) -> Metric:
    if left.reduction != right.reduction:
        raise ValueError(
            f"metric {name!r} was reported both as {left.reduction} and as {right.reduction}"
        )
    if left.reduction == "sum":
        return total(left.value + right.value)
    if left.reduction == "max":
        unknown = math.isnan(left.value) or math.isnan(right.value)
        return maximum(math.nan if unknown else max(left.value, right.value))

    # A mean over nothing has no value.
    if right.count == 0:
        return left
    if left.count == 0:
        return right
    count = left.count + right.count
    return mean((left.value * left.count + right.value * right.count) / count, count)


def combine(reports: Iterable[MetricMap]) -> dict[str, Metric]:
    """Merge reports.

    Sums are added, means averaged with their counts as weights, and of maxima the largest is taken.
    NaN in one report makes the result NaN.

    Raises:
        ValueError: two reports declare different reductions for one name.
    """
    merged: dict[str, Metric] = {}
    for report in reports:
        for name, metric in report.items():
            if name in merged:
                metric = _combine_pair(name, merged[name], metric)
            merged[name] = metric
    return merged


def values(report: MetricMap) -> dict[str, float]:
    """Return the plain numbers; means over nothing are left out."""
    return {name: metric.value for name, metric in report.items() if metric.count > 0}


def peak_memory_gib() -> float:
    """Return the largest resident memory that this process has had so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
