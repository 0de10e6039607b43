"""Bad input is refused before anything starts: exit code 2, one message for each mistake, no traceback, no Ray."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.grpo_math import grpo_math
from recipes.run_recipe import run_recipe
from rlsys.models import resolve_model

ROOT = Path(__file__).resolve().parents[2]
# Fails loudly if Ray is even imported.
RUNNER = """
import sys, importlib.abc
class NoRay(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "ray" or name == "vllm":
            raise AssertionError("RAY WAS IMPORTED")
sys.meta_path.insert(0, NoRay())
from recipes.grpo_math import grpo_math
from recipes.run_recipe import run_recipe
run_recipe(grpo_math, sys.argv[1:])
"""


def refused(capsys: pytest.CaptureFixture[str], *flags: str, model: str = "tiny") -> str:
    """What the command says on stderr; it must exit with 2."""
    import ray

    with pytest.raises(SystemExit) as exit_:
        run_recipe(grpo_math, ["--model.path", model, *flags])
    captured = capsys.readouterr()
    assert exit_.value.code == 2, captured.out + captured.err
    assert not ray.is_initialized()
    return captured.err


def in_a_process(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUNNER, "--model.path", "tiny", *flags],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "columns.jsonl").write_text('{"question": "1", "answer": "1"}\n')
    (folder / "good.jsonl").write_text('{"problem": "1 + 1", "answer": "2", "level": 1}\n')
    (folder / "many.jsonl").write_text(
        "".join(f'{{"problem": "{i} + 1", "answer": {i + 1}}}\n' for i in range(20))
    )
    (folder / "lists.jsonl").write_text(
        '{"problem": "1 + 1", "answer": "2"}\n{"problem": "2 + 2", "answer": ["4"]}\n'
    )
    (folder / "chat.json").write_text(
        '[{"problem": [{"role": "user", "content": "1 + 1"}], "answer": "2"}]'
    )
    (folder / "broken.py").write_text("value = 1 / 0\n")
    (folder / "used").mkdir()
    (folder / "used" / "metrics.jsonl").write_text("")
    (folder / "empty").mkdir()
    shutil.copytree(resolve_model("tiny"), folder / "mute")
    for file in (folder / "mute").glob("tokenizer*"):
        file.unlink()
    return folder


@pytest.mark.parametrize(
    ("flags", "field", "remedy"),
    [
        (["--data.train", "/no/such.parquet"], "data.train", "Give the path"),
        (["--data.train", "{files}/columns.jsonl"], "data.train", "data.columns.problem"),
        (
            ["--data.train", "{files}/good.jsonl", "--data.levels", "5"],
            "data.train",
            "widen the filters",
        ),
        (["--data.train", "{files}/lists.jsonl"], "data.train", "Write one answer as text"),
        (["--data.train", "{files}/good.jsonl"], "data.eval", "or set it to off"),
        (
            ["--data.train", "{files}/many.jsonl", "--data.eval", "synthetic"],
            "data.eval",
            "Set it to auto",
        ),
        (
            ["--data.train", "{files}/chat.json", "--data.eval", "off"],
            "data.template",
            "Use chat",
        ),
        (
            ["--data.train", "{files}/many.jsonl", "--data.max_prompt_tokens", "3"],
            "data.max_prompt_tokens",
            "Raise the limit",
        ),
        (["--data.levels", "2"], "data.levels", "data.synthetic.levels"),
        (["--algorithm.advantage.name", "grop"], "algorithm.advantage.name", "Did you mean grpo"),
        (
            ["--algorithm.objective.weight", "ppo_clipp"],
            "algorithm.objective.weight",
            "Did you mean ppo_clip",
        ),
        (
            ["--algorithm.objective.ratio", "tokn"],
            "algorithm.objective.ratio",
            "Did you mean token",
        ),
        (["--reward.functions", "[{name: mth}]"], "reward.functions.name", "Did you mean math"),
        (
            ["--plugins", "failing_rewards", "--reward.functions", "math,is_async"],
            "reward.functions.name: 'is_async'",
            "Write it as a plain function",
        ),
        (
            ["--plugins", "failing_rewards", "--reward.functions", "takes_one"],
            "reward.functions.name: 'takes_one'",
            "called with (completion, ground_truth)",
        ),
        (
            ["--reward.functions", "[{name: repetition, parameters: {ngram: 0}}]"],
            "reward.functions.parameters.ngram",
            "at least 1",
        ),
        (
            ["--reward.functions", "[{name: math, weight: .nan}]"],
            "reward.functions.0.weight",
            "finite number",
        ),
        (["--plugins", "broken"], "plugins: 'broken' failed", "broken.py line 1. Repair it"),
        (["--data.template", "few_shots"], "data.template", "Did you mean few_shot"),
        (
            ["--algorithm.advantage.parameters.std_dof", "1"],
            "algorithm.advantage.parameters.std_dof",
            "Did you mean std_ddof",
        ),
        (
            ["--algorithm.advantage.parameters.eps", "small"],
            "algorithm.advantage.parameters.eps",
            "expects float",
        ),
        (
            [
                "--algorithm.advantage.name",
                "hierarchical",
                "--algorithm.advantage.parameters.solver",
                "network",
            ],
            "algorithm.advantage.parameters.solver",
            "recompute true",
        ),
        (["--policy.mini_batches", "3"], "policy.mini_batches", "choose a divisor"),
        (["--policy.ranks", "60"], "policy.ranks", "this machine has"),
        (
            ["--generation.samples_per_prompt", "1"],
            "generation.samples_per_prompt",
            "Sample at least 2",
        ),
        (["--generation.max_tokens", "5000"], "generation.max_tokens", "2048 positions"),
        (["--run.directory", "{files}/used"], "run.directory", "--resume"),
        (["--run.directory", "{files}/none", "--resume"], "run.directory", "holds no run"),
        (["--resume"], "run.directory", "Add --run.directory"),
        (["--plugins", "no_such_module"], "plugins", "PYTHONPATH"),
        (["--trainer.evaluation.pass_at", "8"], "trainer.evaluation.pass_at", "Raise the samples"),
        (["--cluster.address", "nowhere"], "cluster.address", "host:port"),
    ],
)
def test_one_message_with_field_and_remedy(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    files: Path,
    flags: list[str],
    field: str,
    remedy: str,
):
    for folder in (files, ROOT / "tests" / "plugin_package"):
        monkeypatch.syspath_prepend(str(folder))
    message = refused(capsys, *(flag.replace("{files}", str(files)) for flag in flags))
    assert f"error: {field}" in message
    assert remedy in message
    assert message.count("\n") == 1


def test_an_unreachable_cluster(capsys: pytest.CaptureFixture[str]):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    message = refused(capsys, "--cluster.address", f"127.0.0.1:{port}")
    assert f"error: cluster.address: nothing answers at '127.0.0.1:{port}'" in message


@pytest.mark.parametrize(
    ("path", "message"), [("mute", "has no tokenizer"), ("empty", "has no config.json")]
)
def test_incomplete_model_directories(
    capsys: pytest.CaptureFixture[str], files: Path, path: str, message: str
):
    assert message in refused(capsys, model=str(files / path))


def test_several_mistakes_are_reported_together(capsys: pytest.CaptureFixture[str]):
    message = refused(
        capsys,
        "--algorithm.advantage.name",
        "x",
        "--policy.mini_batches",
        "3",
        "--data.train",
        "/none.jsonl",
    )
    assert message.count("error: ") == 3


def test_a_mistake_ends_the_process_without_a_traceback_and_without_ray():
    done = in_a_process("--algorithm.advantage.name", "grop")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: algorithm.advantage.name: unknown advantage estimator 'grop'. Did you mean grpo"
    )
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_dry_run_starts_nothing_and_prints_the_plan(tmp_path: Path):
    done = in_a_process("--dry-run", "--run.directory", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "learning_rate: 1.0e-05" in done.stdout
    assert "generation   1 x vllm" in done.stdout
    assert not (tmp_path / "run").exists()


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What --dry-run prints."""
    with pytest.raises(SystemExit) as exit_:
        run_recipe(grpo_math, ["--model.path", "tiny", "--dry-run", *flags])
    captured = capsys.readouterr()
    assert exit_.value.code == 0, captured.err
    return captured.out


def test_the_plan_says_what_is_evaluated_on(capsys: pytest.CaptureFixture[str], files: Path):
    many = str(files / "many.jsonl")
    plan = planned(capsys, "--data.train", many, "--data.held_out", "0.75")
    assert "5 training and 15 held-out problems (held out of data.train by a hash" in plan
    assert "trainer.prompts_per_step: WARNING: 8 is more than the 5 training prompts" in plan
    plan = planned(capsys, "--data.train", many, "--data.eval", "off")
    assert "20 training problems, no evaluation (data.eval is off)" in plan
    plan = planned(capsys, "--data.train", many, "--data.eval", many)
    assert "data.eval: WARNING: 20 of its 20 problems are also in data.train" in plan
    plan = planned(
        capsys,
        "--data.train",
        str(files / "chat.json"),
        "--data.eval",
        "off",
        "--data.template",
        "chat",
    )
    assert "1 training problems, no evaluation" in plan
    assert "1000 training and 64 held-out problems (synthetic)" in planned(capsys)


def test_data_that_are_refused_with_the_tokenizer_leave_no_run_behind(
    capsys: pytest.CaptureFixture[str], files: Path, tmp_path: Path
):
    flags = ("--data.train", str(files / "many.jsonl"), "--data.max_prompt_tokens", "3")
    refused(capsys, *flags, "--run.directory", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
