"""The GPU check in its reduced form on the CPU, with real models and engines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# One of its seven processes takes 5 to 10 s on a quiet core, most of it for imports.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
RUN = {
    "machine",
    "fsdp2_update",
    "attention_sdpa",
    "attention_flex",
    "weight_sync_transformers",
    "grpo",
    "throughput_tiny",
}


def test_all_checks_that_a_cpu_can_run_pass(tmp_path: Path):
    page = tmp_path / "page.md"
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--seconds", "840"]
    done = subprocess.run(
        [*command, "--out", str(page)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=880,
    )
    assert done.returncode == 0, done.stdout + done.stderr

    results = json.loads(page.with_suffix(".json").read_text())["results"]
    outcomes = {result["name"]: result for result in results}
    assert {name for name, one in outcomes.items() if one["status"] == "passed"} == RUN
    for name, result in outcomes.items():
        if name not in RUN:
            assert result["status"] == "skipped"
            assert result["reason"].startswith(("needs a GPU: ", "not implemented: "))

    text = page.read_text()
    assert "| `grpo` |" in text
    assert "| update |" in text  # of the table of phases
