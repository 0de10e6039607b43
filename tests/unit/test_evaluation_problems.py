"""The problems of an evaluation: which source they come from, and their prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.evaluate_math import evaluate_math
from rlsys.config import DataConfig, RunConfig, TrainerConfig
from rlsys.config.command_line import parse
from rlsys.config.evaluation_run import EvaluationRunConfig, evaluation_contradictions
from rlsys.config.hardware import detect_hardware
from rlsys.data.evaluation_problems import evaluation_prompts, load_evaluation_problems
from rlsys.data.prompt_stream import load_problems
from rlsys.models import resolve_model
from rlsys.models.loading import load_tokenizer


def configured(*flags: str) -> EvaluationRunConfig:
    return parse(evaluate_math(detect_hardware()), flags).config


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a file of twenty problems, every second of level 1."""
    path = tmp_path / "problems.jsonl"
    rows = [
        {"problem": f"What is {i} + 1?", "answer": i + 1, "level": i % 2, "id": f"f{i}"}
        for i in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("seed", [0, 3])
def test_the_default_problems_are_those_that_a_training_run_holds_out(seed: int):
    trained = load_problems(RunConfig(trainer=TrainerConfig(seed=seed))).evaluation
    config = configured("--data.synthetic.seed", str(seed), "--evaluation.seed", "9")
    found = load_evaluation_problems(config)
    assert [p.problem for p in found.problems] == [p.problem for p in trained]
    assert found.train is None
    assert (found.origin, len(found.problems)) == ("synthetic", 64)


def test_the_generated_training_problems_follow_their_own_seed(file: Path):
    """Not that of sampling, whichever the other source is."""
    train = load_problems(RunConfig(trainer=TrainerConfig(seed=3))).train
    for source in ("synthetic", str(file)):
        flags = ["--data.eval", source, "--data.train", "synthetic"]
        flags += ["--data.synthetic.seed", "3", "--evaluation.seed", "9"]
        found = load_evaluation_problems(configured(*flags))
        assert found.train is not None
        assert [p.problem for p in found.train] == [p.problem for p in train]


def test_a_file_is_filtered_limited_and_keeps_its_columns(file: Path):
    flags = ["--data.eval", str(file), "--data.where", "{level: 1}", "--data.eval_limit", "4"]
    found = load_evaluation_problems(configured(*flags))
    assert [p.problem_id for p in found.problems] == ["f1", "f3", "f5", "f7"]
    assert found.problems[0].metadata == {"level": 1}
    assert found.origin == str(file)


def test_auto_is_what_a_training_run_on_the_same_file_holds_out(file: Path):
    data = DataConfig(train=str(file), eval="auto", held_out=0.2)
    trained = load_problems(RunConfig(data=data))
    flags = ["--data.eval", "auto", "--data.train", str(file), "--data.held_out", "0.2"]
    found = load_evaluation_problems(configured(*flags))
    assert len(found.problems) == 4
    assert [p.problem_id for p in found.problems] == [p.problem_id for p in trained.evaluation]
    assert found.train is not None
    assert [p.problem_id for p in found.train] == [p.problem_id for p in trained.train]


def test_group_ids_are_places_in_the_data(tmp_path: Path):
    """The second problem is too long, so the third keeps place 2."""
    path = tmp_path / "problems.jsonl"
    texts = ["short", "word " * 300, "also short"]
    path.write_text("".join(json.dumps({"problem": t, "answer": 1}) + "\n" for t in texts))
    flags = ["--data.eval", str(path), "--data.max_prompt_tokens", "300"]
    config = configured(*flags, "--model.path", "tiny")
    problems = load_evaluation_problems(config).problems
    tokenizer = load_tokenizer(resolve_model("tiny"))

    found = evaluation_prompts(config, problems, tokenizer)
    assert found.prompts.group_ids.tolist() == [0, 2]
    assert found.dropped == 1
    assert "1 of 3 prompts are longer than data.max_prompt_tokens 300" in found.notices[0]
    other = evaluation_prompts(config, problems[:1], tokenizer)
    assert other.digest != found.digest
    assert evaluation_prompts(config, problems, tokenizer).digest == found.digest


def test_a_filter_needs_a_file():
    for train in ("off", "synthetic"):
        config = configured("--data.where", "{level: 1}", "--data.train", train)
        (line,) = evaluation_contradictions(config)
        assert line.startswith("data.where: level filters the rows of files")
