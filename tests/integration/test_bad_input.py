"""Bad input is refused before anything starts.

The exit code is 2, with one message for each mistake, no traceback, and no Ray.
"""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.dapo_math import dapo_math
from recipes.grpo_math import grpo_math
from recipes.run_recipe import run_recipe
from rlsys.config.command_line import evolve
from rlsys.config.hardware import detect_hardware
from rlsys.data.prompt_stream import load_prompts
from rlsys.models import resolve_model
from rlsys.models.loading import load_tokenizer
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.directory import RunDirectory
from rlsys.run.resume import describe_origin

pytestmark = pytest.mark.slow  # a hundred command lines
ROOT = Path(__file__).resolve().parents[2]
# Fails loudly if Ray or vLLM is even imported.
CRITIC = ["--critic.enabled", "true", "--algorithm.advantage.name", "gae"]
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
    """Return what the command prints to stderr; it must exit with code 2."""
    import ray

    with pytest.raises(SystemExit) as exit_:
        run_recipe(grpo_math, ["--model.path", model, *flags])

    captured = capsys.readouterr()
    assert exit_.value.code == 2, captured.out + captured.err
    assert not ray.is_initialized()
    return captured.err


def in_a_process(*flags: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process that cannot import Ray or vLLM."""
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
    """Write data files, plug-ins, run directories and models, each with its own defect."""
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

    for name in ("weightless", "unreadable", "other_tokens"):
        shutil.copytree(resolve_model("tiny"), folder / name)
    for file in (folder / "weightless").glob("*.safetensors"):
        file.unlink()
    (folder / "unreadable" / "config.json").write_text("{")

    settings = json.loads((folder / "other_tokens" / "config.json").read_text())
    settings["vocab_size"] += 1
    (folder / "other_tokens" / "config.json").write_text(json.dumps(settings))

    return folder


@pytest.mark.parametrize(
    ("flags", "field", "remedy"),
    [
        (["--data.train", "/no/such.parquet"], "data.train", "Give the path"),
        (["--data.train", "{files}/columns.jsonl"], "data.train", "data.columns.problem"),
        (
            ["--data.train", "{files}/good.jsonl", "--data.where", "{level: 5}"],
            "data.where",
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
        (["--data.where.level", "2"], "data.where", "data.synthetic.levels"),
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
            "takes (completion, ground_truth)",
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
        (["--plugins", "broken"], "plugins: 'broken' failed", "broken.py line 1. Fix it"),
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
        (["--policy.num_mini_batches", "3"], "policy.num_mini_batches", "choose a divisor"),
        (["--policy.ranks", "60"], "policy.ranks", "this machine has"),
        (
            ["--generation.samples_per_prompt", "1"],
            "generation.samples_per_prompt",
            "Sample at least 2",
        ),
        (["--generation.max_tokens", "5000"], "generation.max_tokens", "2048 positions"),
        (["--run.directory", "{files}/used"], "run.directory", "holds other files and no run"),
        (["--run.directory", "{files}/none", "--resume"], "run.directory", "holds no run"),
        (["--resume"], "run.directory", "Add --run.directory"),
        (["--plugins", "no_such_module"], "plugins", "PYTHONPATH"),
        (["--trainer.evaluation.pass_at", "8"], "trainer.evaluation.pass_at", "Raise the samples"),
        (["--cluster.address", "nowhere"], "cluster.address", "host:port"),
        (["--cluster.address", "localhost:99999"], "cluster.address", "host:port"),
        (["--cluster.address", "a..b:6379"], "cluster.address", "ray start --head"),
        (
            ["--trainer.evaluation.pass_at", "0"],
            "trainer.evaluation.pass_at",
            "Values of k for pass@k",
        ),
        (
            ["--trainer.evaluation.pass_at", "[]"],
            "trainer.evaluation.pass_at",
            "Values of k for pass@k",
        ),
        (["--policy.optimizer.betas", "1.5,0.9"], "policy.optimizer.betas", "each in [0, 1)"),
        (["--policy.optimizer.eps", "-1"], "policy.optimizer.eps", "AdamW's epsilon"),
        (["--generation.temperature", ".inf"], "generation.temperature", "at least 0.01"),
        (["--algorithm.kl.coefficient", ".nan"], "algorithm.kl.coefficient", "0: no KL"),
        (["--algorithm.kl.target", ".inf"], "algorithm.kl.target", "null: the coefficient"),
        (["--model.attention", "flash_attention_2"], "model.attention", "Choose sdpa or auto"),
        (["--model.attention", "flex_attention"], "model.attention", "Choose sdpa or auto"),
        (["--reference.path", "/no/model"], "reference.path", "nor an existing directory"),
        (
            ["--reference.path", "{files}/other_tokens", "--algorithm.kl.coefficient", "0.1"],
            "reference.path",
            "same tokenizer",
        ),
        ([*CRITIC, "--critic.path", "/no/model"], "critic.path", "nor an existing directory"),
        ([*CRITIC, "--critic.path", "{files}/mute"], "critic.path", "tokenizer.save_pretrained"),
        (CRITIC[:2], "critic.enabled", "does not read"),
        (
            ["--algorithm.advantage.parameters.eps", "-1"],
            "algorithm.advantage.parameters.eps",
            "1e-6",
        ),
        (
            ["--algorithm.advantage.parameters.eps", ".inf"],
            "algorithm.advantage.parameters.eps",
            "finite",
        ),
        (
            ["--algorithm.objective.parameters.clip_low", ".nan"],
            "algorithm.objective.parameters.clip_low",
            "finite",
        ),
        (["--reward.functions", "[]"], "reward.functions", "Reward functions"),
        (["--data.where", "{level: []}"], "data.where", "Keep only the rows of train"),
        (["--run.directory", "{files}/good.jsonl"], "run.directory", "is a file"),
        (["--run.directory", "{files}/good.jsonl/below"], "run.directory", "another directory"),
        (["--run.directory", "/proc/runs/a"], "run.directory", "where you may write"),
        (["--run.directory", ""], "run.directory", "--run.directory VALUE"),
        (["--generation.tensor_parallel", "2"], "generation.tensor_parallel", "Set it to 1"),
        (["--generation.kv_cache_gib", "0.5"], "generation.kv_cache_gib", "Give 1"),
        (
            ["--generation.workers", "9", "--generation.cpus_per_worker", "0"],
            "generation.workers",
            "raise trainer.prompts_per_step",
        ),
        (["--cluster.object_store_gib", "1e6"], "cluster.object_store_gib", "Lower it"),
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
    ("path", "message"),
    [
        ("mute", "has no tokenizer"),
        ("empty", "has no config.json"),
        ("weightless", "has no weights"),
        ("unreadable", "config.json of"),
    ],
)
def test_incomplete_model_directories(
    capsys: pytest.CaptureFixture[str], files: Path, path: str, message: str
):
    assert message in refused(capsys, model=str(files / path))


def test_several_mistakes_are_reported_together(capsys: pytest.CaptureFixture[str]):
    flags = ["--algorithm.advantage.name", "x", "--policy.num_mini_batches", "3"]
    message = refused(capsys, *flags, "--data.train", "/none.jsonl")
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
    """Return what --dry-run prints."""
    with pytest.raises(SystemExit) as exit_:
        run_recipe(grpo_math, ["--model.path", "tiny", "--dry-run", *flags])
    captured = capsys.readouterr()
    assert exit_.value.code == 0, captured.err
    return captured.out


def test_the_plan_says_which_problems_are_evaluated(
    capsys: pytest.CaptureFixture[str], files: Path
):
    many = str(files / "many.jsonl")
    plan = planned(capsys, "--data.train", many, "--data.held_out", "0.75")
    assert "5 training and 15 held-out problems (held out of data.train by a hash" in plan
    assert "trainer.prompts_per_step: WARNING: 8 is more than the 5 training prompts" in plan

    plan = planned(capsys, "--data.train", many, "--data.eval", "off")
    assert "20 training problems, no evaluation (data.eval is off)" in plan

    plan = planned(capsys, "--data.train", many, "--data.eval", many)
    assert "data.eval: WARNING: 20 of its 20 problems are also in data.train" in plan

    chat = ("--data.train", str(files / "chat.json"), "--data.template", "chat")
    plan = planned(capsys, *chat, "--data.eval", "off")
    assert "1 training problems, no evaluation" in plan
    assert "1000 training and 64 held-out problems (synthetic)" in planned(capsys)


def test_data_that_are_refused_with_the_tokenizer_leave_no_run_behind(
    capsys: pytest.CaptureFixture[str], files: Path, tmp_path: Path
):
    flags = ("--data.train", str(files / "many.jsonl"), "--data.max_prompt_tokens", "3")
    refused(capsys, *flags, "--run.directory", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Write what a run of 20 steps with its own learning rate leaves behind."""
    config = evolve(
        grpo_math(detect_hardware()),
        {
            "generation.dtype": "float32",  # the file of a run names its dtypes
            "policy.compute_dtype": "float32",
            "model.path": "tiny",
            "trainer.steps": 20,
            "policy.optimizer.learning_rate": 3e-4,
            "data.synthetic.train_size": 50,
        },
    )

    directory = RunDirectory(tmp_path / "run")
    directory.create(config)
    directory.metrics.write_text("".join(f'{{"line": {i}}}\n' for i in range(30)))
    directory.log.write_text("began\n")

    stream = load_prompts(config, load_tokenizer(resolve_model("tiny"))).train
    for _ in range(20):
        stream.next_batch()
    state = {
        "step": 20,
        "evaluated_step": 20,
        "prompts": stream.state(),
        "metrics_position": 22,
        "advantages": {},
        **describe_origin(config),
    }

    async def write(path: Path) -> None:
        (path / "model.safetensors").write_text("weights")

    asyncio.run(CheckpointStore(directory.checkpoints, keep=2).save(20, write, state))
    return directory


def files_of(directory: RunDirectory) -> dict[Path, tuple[bytes, int]]:
    """Return content and modification time of every file."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in directory.path.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("flags", "field", "remedy"),
    [
        (["--model.path", "smollm2-135m"], "model.path", "Resume with --model.path tiny"),
        (["--trainer.seed", "7"], "trainer.seed", "Resume with --trainer.seed 0"),
        (["--data.shuffle", "false"], "data.shuffle", "Resume with --data.shuffle True"),
        (["--data.synthetic.train_size", "51"], "data.train", "the same data and filters"),
        (["--data.synthetic.levels", "2"], "data.train", "are not those"),  # as many as before
        (["--policy.num_mini_batches", "3"], "policy.num_mini_batches", "choose a divisor"),
        (["--trainer.evaluation.pass_at", "0"], "trainer.evaluation.pass_at", "pass@k"),
    ],
)
def test_a_refused_resume_says_why_and_changes_no_file(
    capsys: pytest.CaptureFixture[str],
    run: RunDirectory,
    flags: list[str],
    field: str,
    remedy: str,
):
    before = files_of(run)
    resume = ["--run.directory", str(run.path), "--resume", "--trainer.steps", "30"]
    with pytest.raises(SystemExit) as exit_:
        run_recipe(grpo_math, [*resume, *flags])

    message = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message.startswith(f"error: {field}")
    assert remedy in message
    assert message.count("\n") == 1
    assert files_of(run) == before


def test_another_recipe_does_not_resume_the_run(
    capsys: pytest.CaptureFixture[str], run: RunDirectory
):
    before = files_of(run)
    with pytest.raises(SystemExit) as exit_:
        run_recipe(dapo_math, ["--run.directory", str(run.path), "--resume"])
    assert exit_.value.code == 2
    assert "--recipe grpo_math" in capsys.readouterr().err
    assert files_of(run) == before


def test_a_complete_run_says_so_and_starts_nothing(
    capsys: pytest.CaptureFixture[str], run: RunDirectory
):
    import ray

    before = files_of(run)
    with pytest.raises(SystemExit) as exit_:
        run_recipe(grpo_math, ["--run.directory", str(run.path), "--resume"])
    assert exit_.value.code == 0

    printed = capsys.readouterr().out
    assert printed.startswith("already complete: ")
    assert "step 20, and trainer.steps is 20" in printed
    assert not ray.is_initialized()
    assert files_of(run) == before


def test_a_dry_run_of_a_resume_shows_each_change_and_starts_nothing(
    capsys: pytest.CaptureFixture[str], run: RunDirectory
):
    before = files_of(run)
    flags = ["--trainer.steps", "30", "--policy.optimizer.learning_rate", "1e-4"]
    flags += ["--trainer.prompts_per_step", "4"]
    with pytest.raises(SystemExit) as exit_:
        run_recipe(grpo_math, ["--run.directory", str(run.path), "--resume", "--dry-run", *flags])
    assert exit_.value.code == 0

    printed = capsys.readouterr().out
    changed = [line for line in printed.splitlines() if line.startswith("changed: ")]
    assert changed == [
        "changed: policy.optimizer.learning_rate: 0.0003 -> 0.0001",
        "changed: trainer.prompts_per_step: 8 -> 4",
        "changed: trainer.steps: 20 -> 30",
    ]
    assert f"resuming from {run.checkpoints / 'step_000020'}" in printed
    assert files_of(run) == before
