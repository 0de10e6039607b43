"""The recipe grpo_math as a user runs it: Ray, all actors, vLLM where it is installed.

The model has random weights and 0.1 M parameters; the reward is the share of digits.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.catalogue import Place
from benchmarks.gpu_check.grpo import COMPARED, LEAST_RISE, SETTINGS
from benchmarks.gpu_check.results import Figure, Finding, at_least
from benchmarks.gpu_check.runner import ROOT, last_lines

STEPS = 20
# Less than the check may take, so that the run can end its processes.
SECONDS = {"cuda": 160, "cpu": 540}
# Metrics of a step that the report shows, with the unit of each.
SHOWN = {
    "sync/logprob_difference_mean": "nats",
    "time/step": "s",
    "memory/policy": "GiB",
    "memory/generation": "GiB",
}


def configuration(engine: str, directory: Path) -> dict[str, Any]:
    """Return what the run changes of the recipe's defaults."""
    return {
        "plugins": ["benchmarks.gpu_check.digit_reward"],
        "model": {"path": "tiny"},
        "data": {"synthetic": {"train_size": 64, "eval_size": 8}, "max_prompt_tokens": 256},
        "generation": {
            "engine": engine,
            "samples_per_prompt": 16,
            "min_tokens": 0,
            "max_tokens": 12,
            "compile": False,
        },
        "policy": {"optimizer": {"learning_rate": SETTINGS.learning_rate}},
        "reward": {"functions": [{"name": "digit_share"}]},
        "trainer": {
            "steps": STEPS,
            "prompts_per_step": 4,
            "evaluation": {"every": 0},
            "checkpoints": {"every": 0},
        },
        "run": {"directory": str(directory)},
    }


def learns(place: Place) -> Finding:
    """Run the recipe and compare the rewards of its last steps with those of its first."""
    engine = "vllm" if find_spec("vllm") and not place.small else "transformers"
    directory, log = place.folder / "run", place.folder / "log"
    file = place.folder / "run.yaml"
    # JSON is YAML as well.
    file.write_text(json.dumps(configuration(engine, directory)))
    command = [sys.executable, "-m", "recipes.grpo_math", "--config", str(file)]
    with log.open("wb") as output:
        run = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = run.wait(SECONDS[place.device.type])
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGINT)  # it ends its actors
            code = run.wait()
    print(log.read_text(errors="replace"))
    if code:
        return Finding(faults=(f"the recipe ended with exit code {code}: {last_lines(log)}",))

    lines = (directory / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if "reward/mean" in record]
    rewards = [step["reward/mean"] for step in steps]
    first, last = statistics.mean(rewards[:COMPARED]), statistics.mean(rewards[-COMPARED:])
    figures = [
        Figure(name=f"mean reward of the first {COMPARED} steps", value=first),
        Figure(name=f"mean reward of the last {COMPARED} of {len(steps)} steps", value=last),
    ]
    for name, unit in SHOWN.items():
        if all(name in one for one in steps):
            median = statistics.median(one[name] for one in steps)
            figures.append(Figure(name=f"median of {name}", value=median, unit=unit))
    faults = at_least("rise of the mean reward", last - first, LEAST_RISE)
    return Finding(figures=tuple(figures), faults=faults, facts={"engine": engine})
