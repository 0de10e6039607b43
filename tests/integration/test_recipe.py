"""The recipe as a user runs it: processes, files, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet
import pytest
import yaml

from docs.generate.metrics import documented
from recipes.grpo_math import grpo_math
from recipes.run_recipe import run_recipe
from rlsys.run.directory import RunDirectory
from rlsys.run.observers.metrics_log import read_metrics
from rlsys.run.observers.run_status import RunStatus, read_status

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "tests" / "plugin_package"

# The tiny model, the reproducible engine, and few small steps.
SMALL = [
    *("--model.path", "tiny", "--generation.engine", "transformers"),
    *("--generation.dtype", "float32", "--policy.compute_dtype", "float32"),
    *("--generation.max_tokens", "8", "--generation.samples_per_prompt", "4"),
    *("--trainer.prompts_per_step", "4"),
    *("--data.synthetic.train_size", "40", "--data.synthetic.eval_size", "4"),
    *("--plugins", "rlsys_example_plugin", "--reward.functions", "[{name: example_digits}]"),
    *("--trainer.checkpoints.every", "2", "--trainer.evaluation.every", "2"),
]


# All that a run's state may hold: a reference, a user's estimator, several updates per batch, and
# a learning-rate schedule.
FULL = [
    *("--trainer.steps", "6", "--policy.ranks", "1", "--policy.optimizer.schedule", "cosine"),
    *("--algorithm.kl.coefficient", "0.01", "--generation.min_tokens", "0"),
    *("--algorithm.advantage.name", "example_sign"),
    *("--algorithm.advantage.parameters.scale", "0.5"),
    *("--policy.num_mini_batches", "2", "--policy.epochs", "2"),
    *("--trainer.evaluation.samples_per_prompt", "2"),
]


def command(directory: Path, *flags: str) -> list[str]:
    recipe = [sys.executable, "-m", "recipes.grpo_math", *SMALL]
    return [*recipe, "--run.directory", str(directory), *flags]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(PLUGINS), "HF_HUB_OFFLINE": "1"}


def run(directory: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return finish(command(directory, *flags))


def resume(directory: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Resume with nothing but the directory and the flags that change."""
    recipe = [sys.executable, "-m", "recipes.grpo_math"]
    return finish([*recipe, "--run.directory", str(directory), "--resume", *flags])


def finish(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400
    )


def training_values(directory: Path) -> dict[int, dict[str, float]]:
    """Return the values of each step that do not depend on the clock or the process."""
    skipped = ("time/", "throughput/", "memory/")
    return {
        record.step: {
            name: value for name, value in record.values.items() if not name.startswith(skipped)
        }
        for record in read_metrics(directory / "metrics.jsonl")
        if record.kind == "train"
    }


def state_of(directory: Path) -> str:
    """Return how a run ended."""
    status = read_status(RunDirectory(directory))
    assert status is not None
    return status.state


# Some of the metrics of a step.
WANTED = {
    *("reward/mean", "reward/std", "reward/accuracy", "reward/format_rate"),
    *("rollout/response_length", "rollout/truncated_fraction", "rollout/frac_reward_zero_std"),
    *("policy/entropy", "policy/kl_ref_k1", "policy/kl_ref_k3"),
    *("policy/ratio_mean", "policy/ratio_max", "policy/clip_fraction"),
    *("policy/effective_sample_size", "policy/grad_norm", "policy/learning_rate"),
    *("policy/logprob_difference_mean", "policy/logprob_difference_max"),
    *("sync/logprob_difference_mean", "advantage/positive_fraction"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Train with the flags of FULL, and return the run's directory and output."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    done = run(directory, *FULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory, done.stdout


def test_reference_several_updates_per_batch_and_a_plugin_estimator(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
):
    directory, output = finished
    assert "held-out accuracy after 0 steps" in output
    assert "\x1b" not in output  # no control characters in a log file
    assert {path.name for path in directory.iterdir()} - {"logs"} == {
        *("config.yaml", "metrics.jsonl", "tensorboard", "rollouts"),
        *("checkpoints", "report.html", "status.json", "run.log"),
    }
    assert state_of(directory) == "finished"
    steps = training_values(directory)
    assert sorted(steps) == [1, 2, 3, 4, 5, 6]

    assert set(steps[6]) >= WANTED
    written = {name for step in steps.values() for name in step} - {"advantage/positive_fraction"}
    assert [name for name in sorted(written) if documented(name) is None] == []
    assert steps[1]["policy/logprob_difference_max"] < 1e-3  # engine and trainer agree
    # With several updates per batch ratios move, as long as the schedule lets them.
    assert abs(steps[5]["policy/ratio_mean"] - 1) > 1e-6

    table = pyarrow.parquet.read_table(directory / "rollouts" / "step_000006.parquet")
    assert table.num_rows == 16
    assert table["old_logprobs"].null_count == table["ref_logprobs"].null_count == 0

    config = yaml.safe_load((directory / "config.yaml").read_text())
    advantage = config["algorithm"]["advantage"]
    assert (advantage["name"], advantage["parameters"]) == ("example_sign", {"scale": 0.5})

    page = (directory / "report.html").read_text()
    assert page.count("<svg") >= 8
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page

    records = read_metrics(directory / "metrics.jsonl")
    evaluations = [record for record in records if record.kind == "eval"]
    assert {"eval/accuracy", "eval/mean@2", "eval/pass@1"} <= set(evaluations[-1].values)

    with pytest.raises(SystemExit) as again:
        run_recipe(grpo_math, ["--model.path", "tiny", "--run.directory", str(directory)])
    assert again.value.code == 2
    refusal = capsys.readouterr().err
    assert "run.directory" in refusal
    assert "--resume" in refusal


def test_chat_messages_without_an_evaluation(tmp_path: Path):
    """Train on conversations of a file without an evaluation: nothing fails or is held out."""
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    row = {"prompt": turns, "reward_model": {"ground_truth": 2}}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    source = ("--data.train", str(tmp_path / "chat.jsonl"), "--data.eval", "off")
    columns = ("--data.columns.problem", "prompt", "--data.columns.answer")
    flags = (*source, *columns, "reward_model.ground_truth", "--data.template", "chat")
    directory = tmp_path / "run"

    done = run(directory, *flags, "--trainer.steps", "2", "--trainer.prompts_per_step", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data: 1 training problems, no evaluation (data.eval is off)" in done.stdout
    assert "WARNING: 2 is more than the 1 training prompts" in done.stdout
    assert "held-out" not in done.stdout
    assert {record.kind for record in read_metrics(directory / "metrics.jsonl")} == {"train"}
    assert (directory / "report.html").read_text().count("<svg") >= 8
    table = pyarrow.parquet.read_table(directory / "rollouts" / "step_000002.parquet")
    assert set(table["ground_truth"].to_pylist()) == {"2"}
    assert "<|im_start|>system\nBe brief.<|im_end|>" in table["prompt"].to_pylist()[0]

    longer = ("--trainer.steps", "3", "--trainer.prompts_per_step", "2", "--resume")
    more = run(directory, *flags, *longer)
    assert more.returncode == 0, more.stdout + more.stderr


def kill_when(
    process: subprocess.Popen[str],
    directory: Path,
    number: signal.Signals,
    reached: Callable[[RunStatus], bool],
    *,
    group: bool = False,
) -> str:
    """Send a signal as soon as the status has `reached` a point, and return the whole output.

    The driver alone receives it, or with `group` its whole process group. Whatever the signal, no
    process of the run is left in the end.
    """
    started: list[psutil.Process] = []
    with ThreadPoolExecutor(1) as reader:  # a full pipe would stop the run
        output = reader.submit(process.communicate, timeout=180)
        while process.poll() is None:
            status = read_status(RunDirectory(directory))
            if status and reached(status):
                started = psutil.Process(process.pid).children(recursive=True)
                send = os.killpg if group else os.kill
                send(process.pid, number)
                break
            time.sleep(0.01)
        printed = output.result()[0]

    deadline = time.monotonic() + 60
    while left := [one for one in started if _lives(one)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    return printed


def _lives(process: psutil.Process) -> bool:
    """Return whether a process runs. A zombie does not: it waits for its parent alone."""
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def start(directory: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(directory, *flags),
        cwd=ROOT,
        env=environment() | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_killed_run_resumes_to_the_same_result(tmp_path: Path, finished: tuple[Path, str]):
    straight = finished[0]
    killed = tmp_path / "killed"
    # After the checkpoint of step 4, and before step 6 is complete.
    kill_when(start(killed, *FULL), killed, signal.SIGKILL, lambda status: status.step == 5)
    assert max(training_values(killed)) < 6
    assert state_of(killed) == "died"

    # The newest checkpoint is damaged as well: the one before it takes over, and the run says so.
    newest = max((killed / "checkpoints").glob("step_??????"))
    with (newest / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        weights.write(b"\x7f")

    resumed = resume(killed)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"step_{int(newest.name[-6:]) - 2:06d}" in resumed.stdout
    assert "damaged" in resumed.stdout + resumed.stderr + (killed / "run.log").read_text()

    expected, got = training_values(straight), training_values(killed)
    assert sorted(got) == [1, 2, 3, 4, 5, 6]
    for step, values in expected.items():
        assert set(got[step]) == set(values)
        for name, value in values.items():
            assert got[step][name] == pytest.approx(value, abs=1e-6, rel=1e-6), (step, name)

    check_a_resume_with_changes(killed)


def check_a_resume_with_changes(directory: Path) -> None:
    """Continue the finished run with another learning rate and batch size.

    Both are printed, and nothing else changes.
    """
    assert "already complete" in resume(directory).stdout

    flags = ["--trainer.steps", "8", "--policy.optimizer.learning_rate", "3e-6"]
    more = resume(directory, *flags, "--trainer.prompts_per_step", "2")
    assert more.returncode == 0, more.stdout + more.stderr
    changed = [line for line in more.stdout.splitlines() if line.startswith("changed: ")]
    assert changed == [
        "changed: policy.optimizer.learning_rate: 1e-05 -> 3e-06",
        "changed: trainer.prompts_per_step: 4 -> 2",
        "changed: trainer.steps: 6 -> 8",
    ]

    config = yaml.safe_load((directory / "config.yaml").read_text())
    assert (config["trainer"]["steps"], config["trainer"]["prompts_per_step"]) == (8, 2)
    values = training_values(directory)
    assert sorted(values) == list(range(1, 9))
    assert values[8]["policy/learning_rate"] < 3e-6
    # 24 prompts were taken in six steps of four; the seventh step takes the next two.
    rows = pyarrow.parquet.read_table(directory / "rollouts" / "step_000007.parquet").to_pylist()
    assert sorted({row["group_id"] for row in rows}) == [24, 25]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_scheduler_that_signals_every_process_save_and_leave(
    number: signal.Signals, tmp_path: Path
):
    directory = tmp_path / "run"
    process = start(directory, "--trainer.steps", "500")
    programs: set[str] = set()

    def reached(status: RunStatus) -> bool:
        if status.step < 1:
            return False
        programs.update(programs_of(process.pid))
        return True

    output = kill_when(process, directory, number, reached, group=True)
    assert process.returncode == 130, output
    assert not of_session(process.pid)
    assert "raylet" in programs
    # Processes of Ray that a run on one machine does not need.
    assert not {"monitor.py", "log_monitor.py", "dashboard.py"} & programs
    assert "stopping after this step" in output
    steps = max(training_values(directory))
    checkpoint = directory / "checkpoints" / f"step_{steps:06d}"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["step"] == steps
    assert "Traceback" not in output
    assert state_of(directory) == "interrupted"
    assert f"Interrupted after {steps} of 500 steps" in (directory / "report.html").read_text()


def test_interrupted_while_actors_start_it_leaves_nothing_behind(tmp_path: Path):
    directory = tmp_path / "run"
    process = start(directory)
    output = kill_when(
        process, directory, signal.SIGTERM, lambda status: status.state == "starting", group=True
    )
    assert process.returncode == 130, output
    assert "interrupted" in output
    assert "Traceback" not in output
    assert not of_session(process.pid)


def of_session(leader: int) -> list[psutil.Process]:
    """Return the processes that a run started, directly or through others."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.Error):
            if os.getsid(process.pid) == leader:
                found.append(process)
    return found


def programs_of(leader: int) -> set[str]:
    """Return the file names in the command lines of the processes that a run started."""
    found = set()
    for process in of_session(leader):
        with suppress(psutil.Error):
            found |= {Path(word).name for word in process.cmdline()}
    return found
