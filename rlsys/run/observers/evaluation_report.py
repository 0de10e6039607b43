"""report.html of an evaluation: a self-contained page with tables, charts and responses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rlsys.config.command_line import flat
from rlsys.config.evaluation_run import EvaluationRunConfig
from rlsys.evaluation.intervals import Estimate
from rlsys.run.directory import write_whole
from rlsys.run.evaluation_directory import EvaluationDirectory
from rlsys.run.evaluation_summary import AnsweredModel, EvaluationResults
from rlsys.run.observers.charts import Series, line_chart, stacked_bars
from rlsys.run.observers.evaluation_text import (
    METHODS,
    breakdown_heads,
    breakdown_rows,
    broken_down,
    difference_cells,
    is_fraction,
    meaning_of,
    measure_names,
    number,
    overlap_line,
    title_of,
    with_interval,
)
from rlsys.run.observers.html_report import render_page
from rlsys.run.observers.interval_charts import IntervalRow, interval_chart

SAMPLES_OF_A_KIND = 3  # responses that are shown: right, wrong, without an answer, truncated
DISAGREEMENTS = 10  # problems on which two models differ
MOST_OVERLAPPING = 100  # problems in the table of the overlap; evaluation.json has all
LENGTH_BARS = 24
LONGEST_QUESTION = 300  # characters in the summary of a prompt


@dataclass(frozen=True, kw_only=True)
class ReportedModel:
    """A model with its numbers, and the table of its responses."""

    answered: AnsweredModel
    texts: pa.Table  # prompt, response, extracted_answer, ground_truth, ...; by group_id

    @property
    def name(self) -> str:
        return self.answered.model.name


TEXT_COLUMNS = (
    "group_id",
    "prompt",
    "response",
    "extracted_answer",
    "ground_truth",
    "correct",
    "reason",
    "stop_reason",
)


def write_evaluation_report(
    config: EvaluationRunConfig,
    results: EvaluationResults,
    models: Sequence[ReportedModel],
    directory: EvaluationDirectory,
) -> None:
    """Write report.html atomically."""
    write_whole(directory.report, render_evaluation(config, results, models, directory))


def render_evaluation(
    config: EvaluationRunConfig,
    results: EvaluationResults,
    models: Sequence[ReportedModel],
    directory: EvaluationDirectory,
) -> str:
    """Return the page."""
    tree = config.model_dump(mode="json")
    shown = broken_down(results)
    return render_page(
        "evaluation_template.html",
        name=directory.path.resolve().name,
        title=title_of(results),
        status=_status(results),
        tiles=list(_tiles(results)),
        results=_results_table(results),
        notices=results.notices,
        charts=[chart for chart in _charts(results, models) if chart],
        breakdowns=[
            {
                "column": column,
                "heads": breakdown_heads(results, shown, [model.name for model in results.models]),
                "rows": list(breakdown_rows(results, column, shown)),
            }
            for column in (results.models[0].by if results.models else ())
        ],
        overlap=_overlap(results),
        disagreements=_disagreements(models) if len(models) == 2 else None,
        samples=[{"model": one.name, "rows": _samples(one)} for one in models],
        methods=METHODS,
        config=[(name, json.dumps(v, ensure_ascii=False)) for name, v in flat(tree).items()],
    )


def _status(results: EvaluationResults) -> tuple[str, str]:
    if results.complete:
        return "finished", "Complete"
    return "interrupted", "Incomplete: these are the results of the prompts so far"


def _tiles(results: EvaluationResults) -> Iterator[tuple[str, str, str]]:
    """Yield the figures at the top of the page: label, value, and interval or remark."""
    for model in results.models:
        accuracy = model.estimates["accuracy"]
        shown = with_interval("accuracy", accuracy)
        value, _, interval = shown.partition(" [")
        yield f"accuracy, {model.name}", value, f"[{interval}" if interval else ""
    if results.comparison is not None:
        difference = results.comparison.differences["accuracy"]
        value, _, interval = with_interval("accuracy", difference.estimate, signed=True).partition(
            " ["
        )
        yield "difference of accuracy", value, f"[{interval}; p {difference.test.p_value:.2g}"
    responses = sum(model.prompts * model.samples_per_prompt for model in results.models)
    tokens = sum(model.tokens for model in results.models)
    yield "responses", f"{responses:,}", f"{tokens:,} tokens"


def _results_table(results: EvaluationResults) -> Mapping[str, Any]:
    heads = ["", *(model.name for model in results.models)]
    if results.comparison is not None:
        heads += ["difference", "p (sign test over prompts)"]
    rows = []
    for name in measure_names(results.models):
        cells = [
            with_interval(name, model.estimates[name]) if name in model.estimates else "–"
            for model in results.models
        ]
        if results.comparison is not None:
            cells += difference_cells(name, results.comparison.differences)
        rows.append({"name": name, "cells": cells, "meaning": meaning_of(name)})
    return {"heads": [*heads, ""], "rows": rows}


def _charts(results: EvaluationResults, models: Sequence[ReportedModel]) -> Iterator[str]:
    names = [model.name for model in results.models]
    fractions = [name for name in measure_names(results.models) if is_fraction(name)]
    yield interval_chart(
        "Fractions of the responses and prompts",
        names,
        [
            IntervalRow(
                label=name, estimates=tuple(model.estimates.get(name) for model in results.models)
            )
            for name in fractions
        ],
    )
    yield _differences_chart(results, fractions)
    yield _curves_over_k(results)
    for column in results.models[0].by if results.models else ():
        yield _breakdown_chart(results, column)
    for one in models:
        yield _length_chart(one, several=len(models) > 1)


def _differences_chart(results: EvaluationResults, names: Sequence[str]) -> str:
    if results.comparison is None:
        return ""
    differences = results.comparison.differences
    first, second = (model.name for model in results.models)
    rows = [
        IntervalRow(label=name, estimates=(differences[name].estimate,))
        for name in names
        if name in differences
    ]
    return interval_chart(
        "Differences, prompt by prompt", [f"{second} − {first}"], rows, signed=True
    )


def _curves_over_k(results: EvaluationResults) -> str:
    """Return pass@k and majority@k over k, where there are at least two values of k."""
    lines = []
    for model in results.models:
        suffix = f", {model.name}" if len(results.models) > 1 else ""
        for kind in ("pass", "majority"):
            points = [(1.0, model.estimates["accuracy"].value)]
            points += [
                (float(name.removeprefix(f"{kind}@")), estimate.value)
                for name, estimate in model.estimates.items()
                if name.startswith(f"{kind}@")
            ]
            if len(points) > 1:
                lines.append(Series(f"{kind}@k{suffix}", tuple(sorted(set(points))), markers=True))
    return line_chart("Accuracy of k samples", lines, percent=True, at="k = {}")


def _breakdown_chart(results: EvaluationResults, column: str) -> str:
    values = dict.fromkeys(v for model in results.models for v in model.by.get(column, {}))

    def accuracy(by: Mapping[str, Any], value: str) -> Estimate | None:
        found = by.get(column, {}).get(value)
        return found.estimates["accuracy"] if found else None

    rows = [
        IntervalRow(
            label=value, estimates=tuple(accuracy(model.by, value) for model in results.models)
        )
        for value in values
    ]
    names = [model.name for model in results.models]
    return interval_chart(f"Accuracy by {column}", names, rows)


def _length_chart(one: ReportedModel, *, several: bool) -> str:
    """Return a histogram of the lengths, right and wrong responses apart."""
    responses = one.answered.responses
    lengths, correct = responses.lengths.ravel(), responses.correct.ravel()
    width = max(1, -(-int(lengths.max()) // LENGTH_BARS))
    bins = np.arange(0, int(lengths.max()) + width + 1, width)
    right, _ = np.histogram(lengths[correct], bins)
    wrong, _ = np.histogram(lengths[~correct], bins)
    bars = [
        (int(start), (float(r), float(w)))
        for start, r, w in zip(bins[:-1], right, wrong, strict=True)
    ]
    suffix = f", {one.name}" if several else ""
    at = "{} tokens" if width == 1 else f"{{}} to {{}}+{width - 1} tokens"
    return stacked_bars(
        f"Responses by length in tokens{suffix}",
        ("right", "wrong"),
        bars,
        "responses",
        at=at,
        cuts_tall=False,
    )


def _overlap(results: EvaluationResults) -> Mapping[str, Any] | None:
    if results.overlap is None:
        return None
    shown = results.overlap.overlapping[:MOST_OVERLAPPING]
    return {"line": overlap_line(results), "rows": [asdict(problem) for problem in shown]}


def _samples(one: ReportedModel) -> list[dict[str, Any]]:
    """Return the first few responses of each kind: right, wrong, no answer, truncated."""
    correct = np.array(one.texts["correct"].to_pylist(), dtype=np.bool_)
    silent = np.array([reason == "no_answer" for reason in one.texts["reason"].to_pylist()])
    cut = np.array([reason == "length" for reason in one.texts["stop_reason"].to_pylist()])
    kinds = (correct, ~correct & ~silent, silent & ~cut, cut & ~correct)
    chosen: dict[int, None] = {}
    for kind in kinds:
        for row in np.flatnonzero(kind)[:SAMPLES_OF_A_KIND].tolist():
            chosen[row] = None
    lengths = one.answered.responses.lengths.ravel()
    rows = one.texts.take(list(chosen)).to_pylist()
    return [
        _shown_prompt(row)
        | {
            "response": row["response"],
            "answer": row["extracted_answer"],
            "right": row["correct"],
            "verdict": row["reason"] + (", truncated" if row["stop_reason"] == "length" else ""),
            "tokens": int(lengths[place]),
        }
        for place, row in zip(chosen, rows, strict=True)
    ]


def _shown_prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt": row["prompt"],
        "question": row["prompt"].rstrip().split("\n\n")[-1][-LONGEST_QUESTION:],
        "truth": row["ground_truth"],
    }


def _disagreements(models: Sequence[ReportedModel]) -> Mapping[str, Any] | None:
    """Return the problems on which the accuracies of two models differ most.

    Of the better model a right response is shown, of the other a wrong one.
    """
    first, second = (one.answered.responses for one in models)
    places, a, b = np.intersect1d(first.places, second.places, return_indices=True)
    if not len(places):
        return None
    scores = np.stack([first.correct[a].mean(axis=1), second.correct[b].mean(axis=1)])
    sizes = np.abs(scores[1] - scores[0])
    order = np.argsort(-sizes, kind="stable")[:DISAGREEMENTS]

    rows = []
    for place in order[sizes[order] > 0].tolist():
        prompt: dict[str, Any] = {}
        cells = []
        for one, own, index in zip(models, scores[:, place], (a[place], b[place]), strict=True):
            verdicts = one.answered.responses.correct[index]
            is_better = own == scores[:, place].max()
            sample = int(np.argmax(verdicts == is_better))
            row = one.texts.slice(int(index) * len(verdicts) + sample, 1).to_pylist()[0]
            prompt = prompt or _shown_prompt(row)
            cells.append(
                {
                    "right": row["correct"],
                    "score": f"{number('accuracy', own)} right",
                    "response": row["response"],
                }
            )
        rows.append(prompt | {"cells": cells})
    return {"models": [one.name for one in models], "rows": rows} if rows else None
