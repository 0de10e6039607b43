"""Bad input of an evaluation is refused before anything starts, in one message for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.evaluate_math import evaluate_math
from recipes.run_evaluation import run_evaluation
from rlsys.config import ConfigError
from rlsys.config.command_line import parse
from rlsys.config.hardware import detect_hardware
from rlsys.run.evaluated_model import EvaluatedModel
from rlsys.run.evaluation_checks import check_origin, ineffective_evaluation_options

TRANSFORMERS = ("--generation.engine", "transformers", "--generation.dtype", "float32")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with data files, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    row = {"problem": "1 + 1", "answer": "2", "level": 1}
    Path("good.jsonl").write_text(json.dumps(row) + "\n")
    Path("columns.jsonl").write_text('{"question": "1", "answer": "1"}\n')
    Path("taken").mkdir()
    Path("taken/file").write_text("something")
    Path("empty_run/checkpoints").mkdir(parents=True)
    Path("empty_run/config.yaml").write_text("recipe: grpo_math\n")
    return tmp_path


def command(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    """Return exit code, output and messages of the command with the tiny model."""
    with pytest.raises(SystemExit) as ended:
        run_evaluation(evaluate_math, ["--model.path", "tiny", *TRANSFORMERS, *flags])
    captured = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, captured.out, captured.err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--compare", "smollm-135m"], ["compare: 'smollm-135m' is neither", "smollm2-135m"]),
        (["--model.path", "empty_run"], ["model.path: the run 'empty_run' has no complete"]),
        (["--data.eval", "missing.parquet"], ["data.eval: no such file 'missing.parquet'"]),
        (["--data.eval", "columns.jsonl"], ["has no column 'problem'", "answer, question"]),
        (
            ["--data.eval", "good.jsonl", "--data.train", "nothing.jsonl"],
            ["data.train: no such file"],
        ),
        (["--data.eval", "synthetic", "--data.train", "good.jsonl"], ["'synthetic' problems do"]),
        (["--evaluation.by", "subject"], ["evaluation.by: the data have no column", "level"]),
        (["--data.template", "r1-zero"], ["data.template: 'r1-zero'", "r1_zero"]),
        (["--reward.functions", "maths"], ["unknown reward function 'maths'", "math?"]),
        (["--run.directory", "taken"], ["run.directory: 'taken' exists already. It holds"]),
        (["--resume"], ["run.directory: --resume needs the directory of the run"]),
        (["--data.max_prompt_tokens", "5"], ["data.max_prompt_tokens: 64 of 64 prompts"]),
        (["--generation.max_tokens", "4000"], ["generation.max_tokens: ", "2048 positions"]),
        (["--generation.workers", "999"], ["generation.workers: 999 workers need 999 CPUs"]),
        (["--trainer.steps", "5"], ["--trainer.steps: no such flag"]),
        (["--evaluation.confidence", "1"], ["evaluation.confidence: 1 does not fit"]),
    ],
)
def test_a_mistake_is_one_message_with_field_value_and_remedy(
    flags: list[str], expected: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
):
    code, _, errors = command(capsys, *flags)
    lines = errors.splitlines()
    assert code == 2, errors
    own = [line for line in lines if expected[0] in line]
    assert len(own) == 1, errors
    assert own[0].startswith("error: ")
    for part in expected:
        assert part in own[0]
    assert not (folder / "runs").exists()


def test_all_mistakes_are_reported_together(folder: Path, capsys: pytest.CaptureFixture[str]):
    flags = ["--compare", "nothing", "--data.eval", "missing.jsonl", "--evaluation.pass_at", "9"]
    code, _, errors = command(capsys, *flags)
    assert code == 2
    assert [line.split(":")[1].strip() for line in errors.splitlines()] == [
        "compare",
        "evaluation.pass_at",
        "data.eval",
    ]


def test_a_dry_run_prints_configuration_and_plan_and_starts_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    flags = ["--compare", "tiny", "--data.eval", "good.jsonl", "--dry-run"]
    code, output, errors = command(capsys, *flags)
    assert code == 0, errors
    assert "compare: tiny" in output  # the configuration
    assert "1 prompts x 4 = 4 responses" in output
    assert "1 x transformers, temperature 1, at most 16 tokens" in output
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "option"),
    [
        (["--evaluation.overlap_ngram", "5"], "evaluation.overlap_ngram"),
        (["--data.held_out", "0.2"], "data.held_out"),
        (["--data.synthetic.train_size", "5"], "data.synthetic.train_size"),
        (["--data.columns.problem", "question"], "data.columns.problem"),
        (["--data.eval", "file.jsonl", "--data.synthetic.seed", "1"], "data.synthetic.seed"),
        (["--generation.engine", "transformers", "--generation.compile"], "generation.compile"),
        (
            [
                *("--generation.temperature", "0", "--generation.samples_per_prompt", "1"),
                *("--generation.top_p", "0.9"),
            ],
            "generation.top_p",
        ),
    ],
)
def test_an_option_without_an_effect_is_named(flags: list[str], option: str):
    hardware = detect_hardware()
    invocation = parse(evaluate_math(hardware), flags)
    (warning,) = ineffective_evaluation_options(invocation.config, invocation.explicit, hardware)
    assert warning.startswith(f"{option}: ")
    assert "has no effect because" in warning


@pytest.mark.parametrize(
    "flags",
    [
        ["--data.train", "synthetic", "--evaluation.overlap_ngram", "5"],
        ["--data.train", "f.jsonl", "--data.eval", "auto", "--data.held_out", "0.2"],
        ["--data.train", "synthetic", "--data.synthetic.train_size", "5"],
        ["--data.eval", "f.jsonl", "--data.columns.problem", "question"],
        ["--generation.top_p", "0.9", "--evaluation.seed", "3", "--compare", "tiny"],
    ],
)
def test_an_option_with_an_effect_is_not(flags: list[str]):
    hardware = detect_hardware()
    invocation = parse(evaluate_math(hardware), flags)
    warnings = ineffective_evaluation_options(invocation.config, invocation.explicit, hardware)
    assert list(warnings) == []


def test_responses_of_other_settings_are_not_mixed(tmp_path: Path):
    model = EvaluatedModel(field="compare", path="tiny", directory=tmp_path, step=None)
    origin = {"model": "a", "temperature": 1.0}
    check_origin(None, origin, model)
    check_origin(dict(origin), origin, model)
    with pytest.raises(ConfigError, match=r"compare: .*\(temperature 0\.5 -> 1\.0\)"):
        check_origin({"model": "a", "temperature": 0.5}, origin, model)
    with pytest.raises(ConfigError, match=r"compare: .*\(other files of the model\)"):
        check_origin({"model": "b", "temperature": 1.0}, origin, model)
