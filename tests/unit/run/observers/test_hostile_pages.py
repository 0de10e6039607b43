"""No text of a model, a data file or a user changes a report page: only its words are shown.

Each page is written with harmless and with hostile texts in every place that can hold one. Both
must have the same elements with the same attributes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from recipes.rlhf import rlhf
from rlsys.config import RunConfig
from rlsys.config.evaluation_run import (
    EvaluationGenerationConfig,
    EvaluationOptions,
    EvaluationRunConfig,
)
from rlsys.config.expert_grid import Cell
from rlsys.config.hardware import Hardware
from rlsys.data.batches import RewardBatch, RewardFailure, RolloutBatch, ScoredBatch
from rlsys.data.examples import Ranking
from rlsys.data.problems import Problem
from rlsys.data.ranking_files import write_rankings
from rlsys.data.response_files import ResponseFiles, ScoredResponses
from rlsys.data.rollout_files import write_rollouts
from rlsys.evaluation.overlap import find_overlap
from rlsys.evaluation.responses import ModelResponses
from rlsys.run.directory import RunDirectory
from rlsys.run.evaluated_model import EvaluatedModel
from rlsys.run.evaluation_directory import EvaluationDirectory
from rlsys.run.evaluation_summary import AnsweredModel, summarize
from rlsys.run.expert_grid_summary import result_of
from rlsys.run.observers.evaluation_report import TEXT_COLUMNS, ReportedModel, render_evaluation
from rlsys.run.observers.expert_grid_report import PAGE, write_page
from rlsys.run.observers.html_report import render_report
from rlsys.run.observers.pipeline_report import render_pipeline
from rlsys.run.observers.run_status import StatusWriter
from rlsys.run.pipeline_directory import PipelineDirectory
from tests.support.rollout_examples import random_rollouts, rewards_of, rollouts
from tests.support.step_values import STEP

ACTING = "\x1b]0;t\x07 \x9b2J \x00 \r \u202ertl \u2066 \u2028 \ud800"
MARKUP = "<script>alert(1)</script></pre></td><img src=x onerror=alert(2)>\"'><svg onload=a()>"
HOSTILE = f"{MARKUP} {{{{ 7 * 191 }}}} ${{x}} &lt;b&gt; <!-- {ACTING}"
HARMLESS = "a text"


class Elements(HTMLParser):
    """Counts elements with the names of their attributes, and comments."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: Counter[tuple[str, ...]] = Counter()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found[tag, *(name for name, _ in attrs)] += 1

    def handle_endtag(self, tag: str) -> None:
        self.found[f"/{tag}",] += 1

    def handle_comment(self, data: str) -> None:
        self.found["comment",] += 1


def readable(text: str) -> str:
    """Return a text without lone surrogates, which configurations and Parquet refuse."""
    return text.encode(errors="ignore").decode()


def file_name(text: str) -> str:
    """Return the part of a text that the name of a directory can have."""
    return readable(text).replace("/", "").replace("\x00", "")


def write_metrics(directory: RunDirectory, text: str) -> None:
    """Write metrics of a step and an evaluation, of a reward function with the name `text`."""
    values = {**STEP, f"reward/{text}": 0.5, f"reward/failed/{text}": 1.0, "reward/errors": 1.0}
    lines = [
        {"kind": kind, "step": step, "time": 0.0, "values": values | {"eval/accuracy": 0.5}}
        for step in (1, 2)
        for kind in ("train", "eval")
    ]
    directory.metrics.write_text("\n".join(map(json.dumps, lines)))


def rewards_with(text: str, batch: RolloutBatch) -> RewardBatch:
    return replace(
        rewards_of(batch),
        reasons=(text,) * len(batch),
        extracted_answers=(text,) * len(batch),
        failures=(RewardFailure(row=0, function=text, kind="error", message=text, traceback=""),),
    )


def with_texts(text: str, batch: RolloutBatch) -> RolloutBatch:
    """Return a batch whose prompts and responses are `text`."""
    prompts = tuple(
        replace(prompt, problem_id=text, text=text, problem=text, ground_truth=text)
        for prompt in batch.prompts.prompts
    )
    return replace(
        batch,
        prompts=replace(batch.prompts, prompts=prompts),
        response_texts=(text,) * len(batch),
    )


def run_page(text: str, path: Path) -> str:
    directory = RunDirectory(path / file_name(text))
    field = readable(text)
    config = {"recipe": field, "model": {"path": field}, "run": {"note": field}}
    directory.create(RunConfig.model_validate(config | {"plugins": [field]}))
    write_metrics(directory, text)
    StatusWriter(directory).fail(text)

    batch = with_texts(text, random_rollouts(4))
    scored = ScoredBatch(rollouts=batch, rewards=rewards_with(text, batch))
    write_rollouts(scored, directory.rollouts / "step_000001.parquet")
    return render_report(directory)


def evaluation_page(text: str, path: Path) -> str:
    problems = [
        Problem(problem_id=text, problem=f"{text} {i} " * 30, answer=text, metadata={"topic": text})
        for i in range(4)
    ]
    models = [evaluated(text, path, name, right) for name, right in (("a", True), ("b", False))]
    options = EvaluationOptions(by=("topic",))
    generation = EvaluationGenerationConfig(samples_per_prompt=2)
    config = EvaluationRunConfig(recipe=readable(text), generation=generation, evaluation=options)
    results = summarize(
        config,
        [one.answered for one in models],
        problems,
        origin=text,
        complete=True,
        overlap=find_overlap(problems, problems, 20),
        notices=[text],
    )
    directory = EvaluationDirectory(path / file_name(text))
    return render_evaluation(config, results, models, directory)


def evaluated(text: str, path: Path, name: str, right: bool) -> ReportedModel:
    """Return a model with the same verdict on all responses to four problems."""
    files = ResponseFiles(path / f"{name} {len(text)}")
    files.create({})
    groups = []
    for place in range(4):
        batch = with_texts(text, rollouts([([1, 2], [[3, 4]] * 2)], first_group=place))
        values = np.full(2, right, dtype=np.float32)
        rewards = replace(rewards_with(text, batch), rewards=values, accuracies=values)
        groups.append(ScoredResponses(rollouts=batch, rewards=rewards))
    files.write(0, groups)

    table = files.read()
    assert table is not None
    answered = AnsweredModel(
        model=EvaluatedModel(field="compare", path=f"{name} {text}", directory=path, step=None),
        prompts_total=4,
        dropped=0,
        responses=ModelResponses.of(table),
    )
    return ReportedModel(answered=answered, texts=table.select(list(TEXT_COLUMNS)))


def pipeline_page(text: str, path: Path) -> str:
    recipe = rlhf(Hardware(cpus=2, memory_gib=16, gpus=0, gpu_memory_gib=0))
    model = recipe.model.model_copy(update={"path": text})
    config = recipe.model_copy(update={"recipe": text, "model": model})
    directory = PipelineDirectory(RunDirectory(path / file_name(text)))
    (path / file_name(text)).mkdir()
    ranking = Ranking(
        example_id="x",
        prompt=readable(text),
        responses=(readable(text), readable(f"{text}."), readable(f"{text}!")),
        ranks=(0, 1, 1),
        answer=readable(text),
    )
    write_rankings([ranking], directory.rankings)
    return render_pipeline(config, directory)


def grid_page(text: str, path: Path) -> str:
    cell = Cell(samples=4, epochs=2, problems=64)
    directory = RunDirectory(path / cell.name)
    directory.create(RunConfig())
    write_metrics(directory, text)
    status = StatusWriter(directory)
    status.fail(text)
    write_page(text, text, [(cell, result_of(cell, directory))], path)
    return (path / PAGE).read_text(encoding="utf-8")


@pytest.mark.parametrize("page_of", [run_page, evaluation_page, pipeline_page, grid_page])
def test_hostile_texts_change_no_element(page_of: Callable[[str, Path], str], tmp_path: Path):
    (tmp_path / "harmless").mkdir()
    (tmp_path / "hostile").mkdir()
    harmless = page_of(HARMLESS, tmp_path / "harmless")
    hostile = page_of(HOSTILE, tmp_path / "hostile")

    assert Elements(hostile).found == Elements(harmless).found
    assert "&lt;script&gt;alert(1)" in hostile
    assert "{{ 7 * 191 }}" in hostile  # and not its result
    assert str(7 * 191) not in hostile
    assert r"\u001b]0;t\u0007 \u009b2J" in hostile
    assert r"\u202ertl" in hostile
    for character in set(ACTING) - set("0;tJrl ]2"):
        assert character not in hostile
    hostile.encode()  # it can be written


def test_what_the_page_shows_under_the_pointer_is_the_same(tmp_path: Path):
    """The script reads labels from an attribute, as JSON, and writes them as text."""
    page = run_page(HOSTILE, tmp_path)
    labels = []

    class Labels(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            series = dict(attrs).get("data-series")
            labels.extend(line["label"] for line in json.loads(series or "[]"))

    Labels().feed(page)
    assert labels
    assert not set("".join(labels)) & set("\x1b\x9b\x00\u202e\ud800")
    script = page.rpartition("<script>")[2]
    assert "innerHTML" not in script
    assert "textContent" in script
