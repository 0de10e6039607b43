"""The results of an evaluation: estimates, breakdowns, the comparison of two models, the overlap.

They are computed from the Parquet files of the responses, so that an interrupted evaluation has the
results of the prompts that are complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsys.config.evaluation_run import EvaluationRunConfig
from rlsys.data.problems import Problem
from rlsys.evaluation.estimators import default_k_values
from rlsys.evaluation.intervals import Estimate
from rlsys.evaluation.measures import (
    LEAST_MAJORITY,
    Difference,
    Measure,
    columns_to_break_down,
    difference_of,
    measures_of,
    prompts_by_value,
)
from rlsys.evaluation.overlap import Overlap
from rlsys.evaluation.responses import ModelResponses
from rlsys.run.evaluated_model import EvaluatedModel

OVERLAP_COLUMN = "overlaps with data.train"
Estimates = Mapping[str, Estimate]


@dataclass(frozen=True, kw_only=True)
class ValueResults:
    """The results on the prompts that have one value of a column."""

    prompts: int
    estimates: Estimates


@dataclass(frozen=True, kw_only=True)
class ModelResults:
    """The results of one model."""

    name: str
    path: str
    directory: str
    step: int | None  # of a checkpoint
    prompts: int  # answered
    prompts_total: int
    dropped: int  # longer than data.max_prompt_tokens
    samples_per_prompt: int
    tokens: int  # sampled
    estimates: Estimates
    by: Mapping[str, Mapping[str, ValueResults]]  # column -> value


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The second model against the first, over the prompts that both answered."""

    prompts: int
    differences: Mapping[str, Difference]
    by: Mapping[str, Mapping[str, Mapping[str, Difference]]]  # column -> value -> measure


@dataclass(frozen=True, kw_only=True)
class EvaluationResults:
    """Everything that evaluation.json holds."""

    complete: bool
    origin: str  # of the problems
    problems: int
    confidence: float
    models: tuple[ModelResults, ...]
    comparison: Comparison | None
    overlap: Overlap | None
    notices: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return nested plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class AnsweredModel:
    """A model with its responses so far."""

    model: EvaluatedModel
    prompts_total: int
    dropped: int
    responses: ModelResponses


def k_values(config: EvaluationRunConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the values of k of pass@k and of majority@k, each once and in order."""
    samples = config.generation.samples_per_prompt
    chances, votes = config.evaluation.pass_at, config.evaluation.majority_at
    if chances is None:
        chances = default_k_values(samples)
    if votes is None:
        votes = (samples,) if samples >= LEAST_MAJORITY else ()
    return tuple(sorted(set(chances))), tuple(sorted(set(votes)))


def estimates_entropy(config: EvaluationRunConfig) -> bool:
    """Return whether the tokens are drawn from the whole distribution."""
    generation = config.generation
    return (
        generation.temperature > 0
        and generation.top_p == 1
        and generation.top_k == 0
        and generation.min_tokens == 0
    )


def summarize(
    config: EvaluationRunConfig,
    answered: Sequence[AnsweredModel],
    problems: Sequence[Problem],
    *,
    origin: str,
    complete: bool,
    overlap: Overlap | None,
    notices: Sequence[str] = (),
) -> EvaluationResults:
    """Return the results of all models that have responses.

    Raises:
        ValueError: a column of evaluation.by that the data do not have.
    """
    pass_at, majority_at = k_values(config)
    with_entropy = estimates_entropy(config)
    columns = _columns(config, problems, overlap)
    confidence = config.evaluation.confidence
    measures = [
        measures_of(
            one.responses,
            pass_at=pass_at,
            majority_at=majority_at,
            with_entropy=with_entropy,
        )
        for one in answered
    ]
    comparison = None
    if len(answered) == 2:
        comparison = _compare(answered, measures, columns, confidence)
    return EvaluationResults(
        complete=complete,
        origin=origin,
        problems=len(problems),
        confidence=confidence,
        models=tuple(
            _results(one, own, columns, confidence)
            for one, own in zip(answered, measures, strict=True)
        ),
        comparison=comparison,
        overlap=overlap,
        notices=(*notices, *_notices(config, measures)),
    )


Columns = Mapping[str, Mapping[str, NDArray[np.bool_]]]  # column -> value -> [problems]


def _columns(
    config: EvaluationRunConfig, problems: Sequence[Problem], overlap: Overlap | None
) -> Columns:
    """Return which problems have which value of each column of the breakdown."""
    metadata = [problem.metadata for problem in problems]
    names = columns_to_break_down(metadata, config.evaluation.by)
    columns: dict[str, Mapping[str, NDArray[np.bool_]]] = {}
    for name in names:
        values = _values_of(config, metadata, name)
        if values is not None:
            columns[name] = values
    if overlap is not None and overlap.overlapping:
        overlaps = np.zeros(len(problems), dtype=np.bool_)
        overlaps[[problem.place for problem in overlap.overlapping]] = True
        columns[OVERLAP_COLUMN] = {"yes": overlaps, "no": ~overlaps}
    return columns


def _values_of(
    config: EvaluationRunConfig, metadata: Sequence[Mapping[str, Any]], column: str
) -> Mapping[str, NDArray[np.bool_]] | None:
    """Return which problems have which value; None for a usual column that divides nothing."""
    try:
        values = prompts_by_value(metadata, column)
    except ValueError:
        if config.evaluation.by is not None:
            raise
        return None
    return values if len(values) > 1 or config.evaluation.by is not None else None


def check_breakdown(config: EvaluationRunConfig, problems: Sequence[Problem]) -> None:
    """Refuse columns of evaluation.by that the data do not have, before anything is sampled.

    Raises:
        ValueError: see `columns_to_break_down` and `prompts_by_value`.
    """
    _columns(config, problems, None)


def _results(
    one: AnsweredModel, measures: Sequence[Measure], columns: Columns, confidence: float
) -> ModelResults:
    responses = one.responses
    by: dict[str, dict[str, ValueResults]] = {}
    for column, values in columns.items():
        by[column] = {}
        for value, problems in values.items():
            chosen = problems[responses.places]
            if chosen.any():
                by[column][value] = ValueResults(
                    prompts=int(chosen.sum()), estimates=_estimates(measures, confidence, chosen)
                )
    return ModelResults(
        name=one.model.name,
        path=one.model.path,
        directory=str(one.model.directory),
        step=one.model.step,
        prompts=len(responses),
        prompts_total=one.prompts_total,
        dropped=one.dropped,
        samples_per_prompt=responses.samples,
        tokens=int(responses.lengths.sum()),
        estimates=_estimates(measures, confidence),
        by=by,
    )


def _estimates(
    measures: Sequence[Measure], confidence: float, chosen: NDArray[np.bool_] | None = None
) -> dict[str, Estimate]:
    """Return the estimates of the measures that have a value for any of the prompts."""
    return {
        measure.name: measure.estimate(confidence, chosen)
        for measure in measures
        if not np.isnan(measure.values if chosen is None else measure.values[chosen]).all()
    }


def _compare(
    answered: Sequence[AnsweredModel],
    measures: Sequence[Sequence[Measure]],
    columns: Columns,
    confidence: float,
) -> Comparison | None:
    """Compare two models on the prompts that both answered; None where there are none."""
    first, second = (one.responses for one in answered)
    places, of_first, of_second = np.intersect1d(first.places, second.places, return_indices=True)
    if not len(places):
        return None
    others = {measure.name: _at(measure, of_second) for measure in measures[1]}
    pairs = [
        (_at(measure, of_first), others[measure.name])
        for measure in measures[0]
        if measure.name in others
    ]

    def differences(chosen: NDArray[np.bool_] | None) -> dict[str, Difference]:
        found = [difference_of(a, b, confidence, chosen) for a, b in pairs]
        return {one.name: one for one in found if one is not None}

    return Comparison(
        prompts=len(places),
        differences=differences(None),
        by={
            column: {
                value: differences(problems[places])
                for value, problems in values.items()
                if problems[places].any()
            }
            for column, values in columns.items()
        },
    )


def _at(measure: Measure, indices: NDArray[np.int64]) -> Measure:
    return Measure(name=measure.name, values=measure.values[indices], trials=measure.trials)


def _notices(config: EvaluationRunConfig, measures: Sequence[Sequence[Measure]]) -> list[str]:
    """Return remarks on measures that cannot be given."""
    notices = []
    if not estimates_entropy(config):
        notices.append(
            "no entropy: greedy sampling, top_p, top_k and min_tokens draw from another "
            "distribution than the one that the log-probabilities are of"
        )
    _, majority_at = k_values(config)
    names = {measure.name for own in measures for measure in own}
    if majority_at and measures and not any(name.startswith("majority@") for name in names):
        notices.append("no majority@k: the first reward function does not extract answers")
    return notices
