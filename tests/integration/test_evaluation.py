"""The evaluation as a user runs it: processes, files, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from rlsys.evaluation.estimators import pass_at_k
from rlsys.evaluation.intervals import fraction_difference, fraction_estimate, sign_test

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "tests" / "plugin_package"

# The tiny model, the reproducible engine, and a reward that a random model can get: a digit in the
# response is right.
SMALL = [
    *("--model.path", "tiny", "--generation.engine", "transformers"),
    *("--generation.dtype", "float32", "--generation.max_tokens", "8"),
    *("--plugins", "rlsys_example_plugin"),
    *("--reward.functions", "[{name: example_digits, parameters: {per_digit: 0.5}}, {name: math}]"),
]


def finish(module: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *flags],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(PLUGINS), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of twelve problems of three levels and two subjects."""
    file = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    rows = [
        {
            "id": f"row-{i}",
            "problem": f"What is {i} + {i + 1}?",
            "answer": str(2 * i + 1),
            "level": i % 3 + 1,
            "subject": "<b>even</b>" if i % 2 == 0 else "odd",
        }
        for i in range(12)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run of two steps."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    flags = [
        *("--generation.samples_per_prompt", "4", "--trainer.prompts_per_step", "4"),
        *("--policy.compute_dtype", "float32", "--policy.optimizer.learning_rate", "0.01"),
        *("--data.synthetic.train_size", "40", "--data.eval", "off"),
        *("--trainer.steps", "2", "--trainer.checkpoints.every", "2"),
    ]
    done = finish("recipes.grpo_math", *SMALL, *flags, "--run.directory", str(directory))
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


@pytest.fixture(scope="module")
def compared(
    tmp_path_factory: pytest.TempPathFactory, problems: Path, trained: Path
) -> tuple[Path, str]:
    """Compare the tiny model with the run's checkpoint; return the directory and the output."""
    directory = tmp_path_factory.mktemp("compared") / "evaluation"
    flags = [
        *("--compare", str(trained), "--data.eval", str(problems), "--data.train", str(problems)),
        *("--evaluation.overlap_ngram", "3", "--evaluation.prompts_per_part", "5"),
    ]
    done = finish("recipes.evaluate_math", *SMALL, *flags, "--run.directory", str(directory))
    assert done.returncode == 0, done.stdout + done.stderr
    return directory, done.stdout


def rows_of(directory: Path, field: str) -> list[dict]:
    parts = sorted((directory / "responses" / field).glob("part_*.parquet"))
    return [row for part in parts for row in pyarrow.parquet.read_table(part).to_pylist()]


def verdicts_of(directory: Path, field: str) -> np.ndarray:
    """Return [12, 4] whether each response has a digit, from its text."""
    rows = rows_of(directory, field)
    assert [row["group_id"] for row in rows] == [i // 4 for i in range(48)]
    right = [any(c.isdecimal() for c in row["response"]) for row in rows]
    return np.array(right).reshape(12, 4)


def test_two_models_by_level_and_subject(compared: tuple[Path, str], trained: Path):
    """Every number follows from the texts in the Parquet files, computed again here."""
    directory, output = compared
    results = json.loads((directory / "evaluation.json").read_text())
    assert results["complete"]
    first, second = results["models"]
    assert (first["path"], first["step"]) == ("tiny", None)
    assert (second["path"], second["step"]) == (str(trained), 2)
    assert second["directory"] == str(trained / "checkpoints" / "step_000002")

    verdicts = [verdicts_of(directory, field) for field in ("model", "compare")]
    assert 0 < verdicts[0].mean() < 1, "the reward must divide the responses"
    assert (verdicts[0] != verdicts[1]).any(), "training changes the responses"
    for model, right in zip(results["models"], verdicts, strict=True):
        expected = fraction_estimate(right.mean(axis=1), 4, 0.95)
        accuracy = model["estimates"]["accuracy"]
        assert accuracy == pytest.approx(vars(expected))
        chances = [pass_at_k(4, int(count), 2) for count in right.sum(axis=1)]
        assert model["estimates"]["pass@2"]["value"] == pytest.approx(np.mean(chances))
        assert model["by"]["level"]["2"]["prompts"] == 4
        of_level = model["by"]["level"]["2"]["estimates"]["accuracy"]["value"]
        assert of_level == pytest.approx(right[1::3].mean())
        assert model["by"]["subject"]["odd"]["prompts"] == 6

    means = [right.mean(axis=1) for right in verdicts]
    difference = results["comparison"]["differences"]["accuracy"]
    expected = fraction_difference(means[0], means[1], 0.95)
    assert difference["estimate"] == pytest.approx(vars(expected))
    assert difference["test"] == pytest.approx(vars(sign_test(means[1] - means[0])))
    assert results["comparison"]["by"]["level"]["3"]["accuracy"]["prompts"] == 4
    assert f"B: {trained} (step 2)" in output
    assert "by subject" in output


def test_the_training_problems_overlap_with_themselves(compared: tuple[Path, str]):
    directory, output = compared
    overlap = json.loads((directory / "evaluation.json").read_text())["overlap"]
    assert [row["problem_id"] for row in overlap["overlapping"]] == [f"row-{i}" for i in range(12)]
    assert all(row["identical"] for row in overlap["overlapping"])
    assert "12 of 12 problems share at least 50% of their 3-grams" in output


def test_the_page_stands_alone_and_escapes_everything(compared: tuple[Path, str]):
    page = (compared[0] / "report.html").read_text()
    assert "&lt;b&gt;even&lt;/b&gt;" in page
    assert "<b>even</b>" not in page
    assert page.count("<svg") >= 6
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_entropy_is_the_mean_of_the_log_probabilities(compared: tuple[Path, str]):
    """-log p over all sampled tokens of a prompt; the mean over prompts."""
    directory, _ = compared
    sums, counts = np.zeros(12), np.zeros(12)
    for row in rows_of(directory, "model"):
        for logprob, sampled in zip(row["rollout_logprobs"], row["response_mask"], strict=True):
            sums[row["group_id"]] -= logprob * sampled
            counts[row["group_id"]] += sampled
    results = json.loads((directory / "evaluation.json").read_text())
    entropy = results["models"][0]["estimates"]["entropy"]["value"]
    assert entropy == pytest.approx((sums / counts).mean(), rel=1e-6)


@pytest.mark.long
def test_interrupted_and_resumed_it_samples_the_same_responses(
    tmp_path: Path, compared: tuple[Path, str], problems: Path
):
    """Ctrl-C reports what is complete; a resume samples the rest, as an uninterrupted run does."""
    directory = tmp_path / "evaluation"
    flags = ["--data.eval", str(problems), "--evaluation.prompts_per_part", "5"]
    flags += ["--run.directory", str(directory)]
    process = subprocess.Popen(
        [sys.executable, "-m", "recipes.evaluate_math", *SMALL, *flags],
        cwd=ROOT,
        env=environment() | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    first_part = directory / "responses" / "model" / "part_00000.parquet"
    while process.poll() is None and not first_part.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "incomplete: the results are those of the prompts so far" in output
    partial = json.loads((directory / "evaluation.json").read_text())
    assert not partial["complete"]
    assert 5 <= partial["models"][0]["prompts"] < 12
    written = first_part.stat().st_mtime_ns

    resume = ["--run.directory", str(directory), "--resume"]
    refused = finish("recipes.evaluate_math", *resume, "--generation.temperature", "0.5")
    assert refused.returncode == 2
    assert "error: model.path: the responses in run.directory were sampled with" in refused.stderr
    assert "temperature 1.0 -> 0.5" in refused.stderr

    done = finish("recipes.evaluate_math", *resume)
    assert done.returncode == 0, done.stdout + done.stderr
    assert first_part.stat().st_mtime_ns == written, "a complete part is not sampled again"
    whole = rows_of(compared[0], "model")
    assert rows_of(directory, "model") == whole

    again = finish("recipes.evaluate_math", *resume, "--evaluation.confidence", "0.9")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "nothing is started" in again.stdout
    results = json.loads((directory / "evaluation.json").read_text())
    assert results["confidence"] == 0.9


def test_a_checkpoint_greedily(tmp_path: Path, trained: Path, problems: Path):
    directory = tmp_path / "evaluation"
    checkpoint = trained / "checkpoints" / "step_000002"
    flags = [
        *SMALL,
        *("--model.path", str(checkpoint), "--data.eval", str(problems)),
        *("--generation.temperature", "0", "--generation.samples_per_prompt", "1"),
        *("--data.eval_limit", "3", "--run.directory", str(directory)),
    ]
    done = finish("recipes.evaluate_math", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    (model,) = json.loads((directory / "evaluation.json").read_text())["models"]
    assert (model["prompts"], model["samples_per_prompt"], model["step"]) == (3, 1, 2)
    assert "entropy" not in model["estimates"]
    assert "no entropy: greedy sampling" in done.stdout
