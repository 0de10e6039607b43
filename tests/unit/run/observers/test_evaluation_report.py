"""The tables and the page of an evaluation, from responses written by hand."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from rlsys.config.evaluation_run import (
    EvaluationGenerationConfig,
    EvaluationOptions,
    EvaluationRunConfig,
)
from rlsys.data.problems import Problem
from rlsys.data.response_files import ResponseFiles, ScoredResponses
from rlsys.evaluation.intervals import Estimate
from rlsys.evaluation.overlap import find_overlap
from rlsys.evaluation.responses import ModelResponses
from rlsys.run.evaluated_model import EvaluatedModel
from rlsys.run.evaluation_directory import EvaluationDirectory
from rlsys.run.evaluation_summary import (
    AnsweredModel,
    EvaluationResults,
    check_breakdown,
    k_values,
    summarize,
)
from rlsys.run.observers.evaluation_console import print_results
from rlsys.run.observers.evaluation_report import TEXT_COLUMNS, ReportedModel, render_evaluation
from rlsys.run.observers.evaluation_text import number, with_interval
from rlsys.run.observers.interval_charts import IntervalRow, interval_chart
from tests.support.rollout_examples import rewards_of, rollouts

HOSTILE = "<script>alert(1)</script>"
PROBLEMS = [
    Problem(
        problem_id=f"p{i}",
        problem=f"{HOSTILE} {i}",
        answer=str(i),
        metadata={"level": i % 2, "topic": HOSTILE},
    )
    for i in range(4)
]
CONFIG = EvaluationRunConfig(generation=EvaluationGenerationConfig(samples_per_prompt=2))


def model(folder: Path, name: str, right: dict[int, list[bool]]) -> ReportedModel:
    """Return a model with these verdicts at these places in the data."""
    files = ResponseFiles(folder / "responses" / name)
    files.create({})
    files.write(0, [group(place, verdicts) for place, verdicts in right.items()])
    table = files.read()
    assert table is not None
    answered = AnsweredModel(
        model=EvaluatedModel(field="compare", path=name, directory=folder / name, step=None),
        prompts_total=4,
        dropped=0,
        responses=ModelResponses.of(table),
    )
    return ReportedModel(answered=answered, texts=table.select(list(TEXT_COLUMNS)))


def group(place: int, verdicts: list[bool]) -> ScoredResponses:
    batch = rollouts([([1, 2], [[3, 4]] * len(verdicts))], first_group=place)
    batch = replace(batch, response_texts=tuple(f"{HOSTILE} {right}" for right in verdicts))
    values = np.array(verdicts, dtype=np.float32)
    rewards = replace(
        rewards_of(batch),
        rewards=values,
        accuracies=values,
        components={"math": values},
        reasons=tuple("correct" if right else "wrong" for right in verdicts),
        extracted_answers=tuple("7" if right else HOSTILE for right in verdicts),
    )
    return ScoredResponses(rollouts=batch, rewards=rewards)


@pytest.fixture
def models(tmp_path: Path) -> list[ReportedModel]:
    """Return two models; the second did not answer problem 0, and the first not problem 3."""
    first = {0: [True, True], 1: [True, False], 2: [False, False]}
    second = {1: [True, True], 2: [False, False], 3: [True, True]}
    return [model(tmp_path, f"first{HOSTILE}", first), model(tmp_path, "second", second)]


def results_of(models: list[ReportedModel], **changes) -> EvaluationResults:
    given = {"origin": "a file", "complete": True, "overlap": None}
    return summarize(CONFIG, [one.answered for one in models], PROBLEMS, **(given | changes))


def test_a_comparison_is_over_the_problems_that_both_answered(models: list[ReportedModel]):
    """Problems 1 and 2: 1/2 -> 1 and 0 -> 0, so the difference is 1/4."""
    results = results_of(models)
    assert [one.estimates["accuracy"].value for one in results.models] == [0.5, 2 / 3]
    comparison = results.comparison
    assert comparison is not None
    assert comparison.prompts == 2
    difference = comparison.differences["accuracy"]
    assert difference.estimate.value == pytest.approx(1 / 4)
    assert (difference.test.higher, difference.test.lower) == (1, 0)
    # Level 0 are problems 0 and 2, of which both answered problem 2 alone.
    assert comparison.by["level"]["0"]["accuracy"].prompts == 1
    assert results.models[0].by["level"]["0"].prompts == 2
    assert results.models[0].by["level"]["0"].estimates["accuracy"].value == 0.5


def test_problems_that_overlap_are_given_apart(models: list[ReportedModel]):
    overlap = find_overlap(PROBLEMS, [replace(PROBLEMS[2], problem_id="t")], 20)
    results = results_of(models[:1], overlap=overlap)
    by = results.models[0].by["overlaps with data.train"]
    assert (by["yes"].prompts, by["yes"].estimates["accuracy"].value) == (1, 0.0)
    assert (by["no"].prompts, by["no"].estimates["accuracy"].value) == (2, 0.75)
    assert results.comparison is None


def test_the_page_escapes_names_texts_answers_and_columns(
    models: list[ReportedModel], tmp_path: Path
):
    overlap = find_overlap(PROBLEMS, [PROBLEMS[1]], 20)
    config = CONFIG.model_copy(update={"evaluation": EvaluationOptions(by=("level", "topic"))})
    results = summarize(
        config,
        [one.answered for one in models],
        PROBLEMS,
        origin=HOSTILE,
        complete=False,
        overlap=overlap,
        notices=[HOSTILE],
    )
    page = render_evaluation(config, results, models, EvaluationDirectory(tmp_path))
    assert HOSTILE not in page
    assert page.count("&lt;script&gt;alert(1)") > 10
    assert page.count("<script>") == 1  # the page's own
    for outside in ('src="http', "href=", "@import", "url("):
        assert outside not in page
    assert "Incomplete" in page
    assert "Problems on which the models differ most" in page


def test_the_table_on_the_console_fits_80_characters(models: list[ReportedModel], tmp_path: Path):
    stream = io.StringIO()
    console = Console(file=stream, width=80)
    print_results(console, results_of(models), EvaluationDirectory(tmp_path), 65.0)
    text = stream.getvalue()
    lines = [line for line in text.splitlines() if line.startswith(("│", "┏", "└"))]
    assert lines
    assert max(map(len, lines)) <= 80
    assert "A: first<script>" in text
    assert "B: second" in text
    assert re.search(r"accuracy +│ 50.0 % +│ 66.7 % +│ \+25.0 %", text)
    assert "1 up, 0 down" in text
    assert "wall time    1 m 05 s" in text


def test_the_default_values_of_k():
    assert k_values(CONFIG) == ((1, 2), ())  # a vote of two is none
    options = EvaluationOptions(pass_at=(4, 1, 4), majority_at=(3, 8))
    eight = EvaluationGenerationConfig(samples_per_prompt=8)
    assert k_values(EvaluationRunConfig(generation=eight)) == ((1, 2, 4, 8), (8,))
    config = EvaluationRunConfig(generation=eight, evaluation=options)
    assert k_values(config) == ((1, 4), (3, 8))


def test_a_column_that_the_data_lack_is_refused_before_anything_starts():
    config = EvaluationRunConfig(evaluation=EvaluationOptions(by=("subject",)))
    with pytest.raises(ValueError, match=r"evaluation\.by: the data have no column 'subject'"):
        check_breakdown(config, PROBLEMS)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("accuracy", 0.125, "12.5 %"),
        ("pass@4", 1.0, "100.0 %"),
        ("length", 31.44, "31.4"),
        ("entropy", 0.4821, "0.482"),
        ("reward/math", 0.5, "0.500"),
    ],
)
def test_numbers_have_the_digits_of_their_measure(name: str, value: float, expected: str):
    assert number(name, value) == expected


def test_an_estimate_without_an_interval_is_a_number():
    assert with_interval("length", Estimate(value=3.0, low=None, high=None)) == "3.0"
    estimate = Estimate(value=-0.1, low=-0.2, high=0.05)
    assert with_interval("accuracy", estimate, signed=True) == "-10.0 % [-20.0, +5.0]"


def whiskers(chart: str) -> list[tuple[float, float]]:
    drawing = chart.partition('class="legend"')[0]
    found = re.findall(r'd="M([\d.]+) [\d.]+H([\d.]+)', drawing)
    return [(float(first), float(last)) for first, last in found]


def test_a_chart_draws_each_interval_on_one_scale():
    """The axis is 0 to 1 between x = 120 and 406, so 1/2 is at 263."""
    rows = [
        IntervalRow(label="a", estimates=(Estimate(value=0.5, low=0.25, high=1.0), None)),
        IntervalRow(label="<b>", estimates=(None, Estimate(value=0.5, low=None, high=None))),
    ]
    chart = interval_chart("title", ["one", "two"], rows)
    assert whiskers(chart) == [(191.5, 406.0)]
    assert re.findall(r'<circle class="dot (c\d)" cx="([\d.]+)"', chart) == [
        ("c0", "263.0"),
        ("c1", "263.0"),
    ]
    assert "&lt;b&gt;" in chart
    assert "a: 50 %, 25 % to 100 %" in chart
    assert interval_chart("title", ["one"], []) == ""


def test_a_chart_of_differences_has_0_in_the_middle():
    rows = [IntervalRow(label="a", estimates=(Estimate(value=0.1, low=-0.1, high=0.2),))]
    chart = interval_chart("title", ["one"], rows, signed=True)
    assert re.findall(r'class="cursor" x1="([\d.]+)"', chart) == ["263.0"]
    ((first, last),) = whiskers(chart)
    assert first == pytest.approx(263 - 143 / 2, abs=0.1)
    assert last == pytest.approx(406, abs=0.1)
