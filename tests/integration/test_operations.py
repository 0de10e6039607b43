"""What the people see who run a cluster: gauges, names and output of actors, and the doctor."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import ray._private.state
from ray._private import ray_constants

from recipes.grpo_math import grpo_math
from recipes.run_recipe import run_recipe
from rlsys.doctor.checks import MACHINE_CHECKS
from workers.local_ray import LocalRay

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *("--model.path", "tiny", "--generation.engine", "transformers"),
    *("--generation.dtype", "float32", "--policy.compute_dtype", "float32"),
    *("--generation.max_tokens", "8", "--generation.samples_per_prompt", "2"),
    *("--trainer.prompts_per_step", "2", "--trainer.steps", "1", "--trainer.evaluation.every", "0"),
    *("--data.synthetic.train_size", "8", "--data.synthetic.eval_size", "2"),
    *("--plugins", "talkative"),
]


@pytest.fixture
def _ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run a Ray that outlives the run, with a plug-in that prints when it is imported."""
    (tmp_path / "talkative.py").write_text("print('the plug-in speaks')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A Ray of `LocalRay` is on the loopback, where the doctor looks for it with the same setting.
    monkeypatch.setenv(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "0")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    root = logging.getLogger()
    loggers, level = list(root.handlers), root.level
    local = LocalRay()
    try:
        local.start(num_cpus=2, object_store_memory=256 * 1024**2, log_to_driver=False)
        yield
    finally:
        local.stop()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        root.handlers, root.level = loggers, level


def gauges() -> dict[str, float]:
    """Return the gauges of rlsys that the node exports, by name and recipe and run."""
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        lines = [line for line in answer.read().decode().splitlines() if line.startswith("ray_rl")]
    found = {}
    for line in lines:
        name, value = line.partition("{")[0], line.rpartition(" ")[2]
        labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
        found[f"{name} {labels['recipe']} {labels['run']}"] = float(value)
    return found


class SeenGauges:
    """The newest value of each gauge that the node exported inside of the context."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def _read(self) -> None:
        while not self._end.wait(0.3):
            self.values.update(gauges())

    def __enter__(self) -> SeenGauges:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def wait_for(self, names: set[str], values: dict[str, float]) -> None:
        """Wait until gauges were seen, with these as their newest values."""
        end = time.monotonic() + 20
        while not (names <= set(self.values) and values.items() <= self.values.items()):
            assert time.monotonic() < end, f"wanted {names} and {values}, seen {self.values}"
            time.sleep(0.1)


def doctor(address: str, **environment: str) -> tuple[int, dict]:
    """Run the doctor on a cluster, and return its exit code and its answer."""
    done = subprocess.run(
        [sys.executable, "-m", "rlsys.doctor", "--address", address, "--json"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, json.loads(done.stdout)["findings"]


@pytest.mark.usefixtures("_ray")
def test_gauges_names_output_and_doctor(tmp_path: Path):
    directory = tmp_path / "run"
    label = "grpo_math run"
    with SeenGauges() as seen:
        with pytest.raises(SystemExit) as ended:
            run_recipe(grpo_math, [*SMALL, "--run.directory", str(directory)])
        assert ended.value.code == 0
        seen.wait_for(
            {f"ray_rlsys_reward_mean {label}", f"ray_rlsys_time_step {label}"},
            {
                f"ray_rlsys_run_step {label}": 1,
                f"ray_rlsys_run_steps {label}": 1,
                f"ray_rlsys_run_active {label}": 0,
            },
        )

    # Ray's head keeps no record of each call, with which it would grow.
    accessor = ray._private.state.state._connect_and_get_accessor()
    assert accessor.get_task_events() == []

    names = {"policy-0", "generation-0", "reward-0", "advantage-0"}
    assert names <= {actor["Name"] for actor in ray._private.state.actors().values()}
    for name in names - {"generation-0"}:  # an engine has no use for plug-ins
        assert "the plug-in speaks" in (directory / "logs" / f"{name}.out").read_text()

    address = ray.get_runtime_context().gcs_address
    _, findings = doctor(address)
    assert [(one["check"], one["status"]) for one in findings["cluster"]] == [("Ray", "ok")]
    assert len(findings[ray.nodes()[0]["NodeManagerAddress"]]) == len(MACHINE_CHECKS)

    code, findings = doctor(address, RAY_AUTH_TOKEN="another-token")
    assert code == 1
    assert "refuses the token" in findings["cluster"][0]["text"]
