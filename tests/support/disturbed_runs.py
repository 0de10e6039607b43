"""Tiny runs as processes of their own, whose parts are killed, and what their files say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlsys.run.directory import RunDirectory
from rlsys.run.observers.metrics_log import MetricsRecord, read_metrics
from rlsys.run.observers.run_status import RunStatus, read_status

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "tests" / "plugin_package"
MARK = "RLSYS_TEST_RUN"  # in the environment of all processes of a run
STARTED_S = 0.005  # between two looks at the status of a run

# A policy, a reference and a critic of the tiny model, two generation workers, and the engine whose
# responses do not depend on the worker.
FLAGS = (
    *("--model.path", "tiny", "--generation.engine", "transformers"),
    *("--generation.dtype", "float32", "--policy.compute_dtype", "float32"),
    *("--generation.workers", "2", "--generation.cpus_per_worker", "0"),
    *("--generation.max_tokens", "8", "--generation.samples_per_prompt", "4"),
    *("--generation.min_tokens", "0", "--trainer.prompts_per_step", "4"),
    *("--data.synthetic.train_size", "40", "--data.synthetic.eval_size", "4"),
    *("--plugins", "rlsys_example_plugin", "--reward.functions", "[{name: example_digits}]"),
    *("--trainer.evaluation.every", "3", "--trainer.checkpoints.every", "2"),
    *("--policy.optimizer.learning_rate", "1e-3", "--critic.optimizer.learning_rate", "3e-3"),
    *("--critic.warmup_steps", "1"),
)

# How Ray names the processes of actors, by the role that they play.
ACTORS = {
    "generation worker": "ray::GenerationWorker",
    "reward worker": "ray::RewardWorker",
    "advantage controller": "ray::AdvantageController",
    "policy rank": "ray::PolicyWorker",
    "reference rank": "ray::ReferenceWorker",
    "critic rank": "ray::CriticWorker",
}
DAEMONS = {"raylet": "raylet", "head": "gcs_server"}
KINDS = (*ACTORS, "reward process", "driver", *DAEMONS)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A run whose process has ended."""

    code: int
    output: str
    seconds: float


class DisturbedRun:
    """A run of a recipe in a process of its own."""

    def __init__(self, directory: Path, *flags: str, recipe: str = "recipes.ppo_math") -> None:
        """Start it; use it in `with`, which ends what is left of it."""
        self.directory = RunDirectory(directory)
        self.mark = uuid.uuid4().hex
        self._began = time.monotonic()
        self._output = directory.with_name(f"{directory.name}-{self.mark[:6]}.out").open("w+")
        words = [sys.executable, "-m", recipe, "--run.directory", str(directory)]
        own = {"PYTHONPATH": f"{ROOT}:{PLUGINS}", "HF_HUB_OFFLINE": "1", MARK: self.mark}
        self.process = subprocess.Popen(
            [*words, *flags],
            cwd=ROOT,
            env=os.environ | own | {"PYTHONUNBUFFERED": "1"},
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> DisturbedRun:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.left_over():
            with suppress(psutil.Error):
                process.kill()
        self.process.wait()
        self._output.close()

    def wait_until(self, reached: Callable[[RunStatus], bool], timeout_s: float) -> bool:
        """Wait for a status; return False where the run ended before it."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            status = read_status(self.directory)
            if status and reached(status):
                return True
            assert time.monotonic() < deadline, "the run did not come to that point in time"
            time.sleep(STARTED_S)
        return False

    def end(self, timeout_s: float) -> Ended:
        """Wait for the end of the driver, and return what it printed."""
        code = self.process.wait(timeout_s)
        seconds = time.monotonic() - self._began
        self._output.seek(0)
        return Ended(code=code, output=self._output.read(), seconds=seconds)

    def processes(self, kind: str) -> list[psutil.Process]:
        """Return the living processes of a kind, see `KINDS`."""
        driver = psutil.Process(self.process.pid)
        if kind == "driver":
            return [driver]
        children = driver.children(recursive=True)
        if kind in DAEMONS:
            return [process for process in children if _name(process) == DAEMONS[kind]]
        if kind == "reward process":
            workers = [one for one in children if _title(one).startswith(ACTORS["reward worker"])]
            return [process for worker in workers for process in _children(worker)]
        return [process for process in children if _title(process).startswith(ACTORS[kind])]

    def left_over(self, after_s: float = 0.0) -> list[psutil.Process]:
        """Return all processes of the run that live; those that still do after some seconds."""
        deadline = time.monotonic() + after_s
        while (left := self._living()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def _living(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                living = process.status() != psutil.STATUS_ZOMBIE
                if living and process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return process.name()
    return ""


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _children(process: psutil.Process) -> Sequence[psutil.Process]:
    with suppress(psutil.Error):
        return process.children()
    return ()


@contextmanager
def undisturbed(
    directory: Path, *flags: str, timeout_s: float, recipe: str = "recipes.ppo_math"
) -> Iterator[Ended]:
    """Run to the end, and yield what it printed."""
    with DisturbedRun(directory, *flags, recipe=recipe) as run:
        ended = run.end(timeout_s)
        assert ended.code == 0, ended.output
        yield ended


def strike(run: DisturbedRun, kind: str, number: signal.Signals = signal.SIGKILL) -> str | None:
    """Send a signal to a process of a kind; return its title, or None where there is none."""
    for process in run.processes(kind):
        title = _title(process) or kind
        with suppress(psutil.Error):
            process.send_signal(number)
            return title
    return None


MEASURED = ("time/", "throughput/", "memory/", "faults/")  # what differs from run to run


def differences(directory: Path, whole: Path, tolerance: float = 1e-6) -> list[str]:
    """Return how the files of a run differ from those of an undisturbed one, a line each.

    Every step and evaluation must be there once, with the same metrics.
    """
    found, expected = (read_metrics(path / "metrics.jsonl") for path in (directory, whole))
    lines = []
    counts, wanted = Counter(map(_moment, found)), Counter(map(_moment, expected))
    if counts != wanted:
        lines.append(f"records {dict(counts - wanted)} too many, {dict(wanted - counts)} missing")
    values = {_moment(record): record.values for record in found}
    for record in expected:
        own = values.get(_moment(record), {})
        for name, value in record.values.items():
            if name.startswith(MEASURED):
                continue
            if name not in own or not abs(own[name] - value) <= tolerance:
                lines.append(f"{_moment(record)} {name}: {own.get(name)} instead of {value}")

    files = [{file.name for file in (path / "rollouts").iterdir()} for path in (directory, whole)]
    if files[0] != files[1]:
        lines.append(f"rollout files {sorted(files[0] ^ files[1])} differ")
    return lines


def _moment(record: MetricsRecord) -> tuple[str, int]:
    return record.kind, record.step


def faults_of(directory: Path) -> list[dict[str, object]]:
    """Return the events that a run recorded."""
    path = RunDirectory(directory).faults
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]
