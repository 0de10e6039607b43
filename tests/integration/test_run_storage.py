"""A recipe whose files go to a real S3 server, and a resume in another directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlsys.run.observers.metrics_log import read_metrics
from tests.support.s3_server import s3_server

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]

# Examples of a generator, the tiny model, and nothing that samples.
SMALL = [
    *("--model.path", "tiny", "--policy.compute_dtype", "float32"),
    *("--data.synthetic.train_size", "40", "--data.eval", "off"),
    *("--trainer.examples_per_step", "4", "--trainer.checkpoints.every", "1"),
    *("--trainer.checkpoints.keep", "1"),
]


def recipe(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "recipes.sft_math", *flags],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_a_run_continues_from_s3_on_a_machine_that_has_nothing(tmp_path: Path):
    with s3_server() as server:
        uri = server.uri("runs/first")
        first = tmp_path / "first"
        places = ("--run.storage", uri, "--run.directory")
        done = recipe(*SMALL, *places, str(first), "--trainer.steps", "2")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "stored       s3://rlsys-tests/runs/first" in done.stdout
        keys = server.keys("runs/first")
        assert {"config.yaml", "metrics.jsonl", "report.html", "run.log", "status.json"} <= {*keys}
        local = sorted(
            path.relative_to(first).as_posix() for path in first.rglob("*") if path.is_file()
        )
        assert keys == sorted({*local, "owner.json"} - {"storage.json"})

        second = tmp_path / "second"
        more = recipe(*places, str(second), "--resume", "--trainer.steps", "3")
        assert more.returncode == 0, more.stdout + more.stderr
        assert f"fetching the run from s3://rlsys-tests/runs/first into {second}" in more.stdout
        assert f"resuming from {second}/checkpoints/step_000002" in more.stdout
        steps = [record.step for record in read_metrics(second / "metrics.jsonl")]
        assert steps == [1, 2, 3]
        stored = [key for key in server.keys("runs/first") if key.endswith("manifest.json")]
        assert stored == ["checkpoints/step_000003/manifest.json"]

        again = recipe(*SMALL, *places, str(tmp_path / "third"), "--trainer.steps", "2")
        assert again.returncode == 2
        assert "run.storage" in again.stderr
        assert "--resume" in again.stderr

        config = yaml.safe_load((second / "config.yaml").read_text())
        assert config["run"]["storage"] == uri
        for path in second.rglob("*"):
            assert not path.is_file() or b"planted-secret-key" not in path.read_bytes(), path

    complete = recipe(*places, str(second), "--resume")
    assert complete.returncode == 2
    assert "run.storage" in complete.stderr
    assert "cannot be used" in complete.stderr
