"""Golden numbers: three steps of every preset on the tiny model.

A change of structure must not change them. After a change that is meant to, record them again:

    python -m tests.support.golden_runs tests/data/golden

The runs are real (Ray, all actors, the transformers engine, float32). The instruction set is fixed,
so that another x86 CPU computes the same numbers up to rounding.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlsys.config import RunConfig

# Set before torch is imported, here and in every actor.
PORTABLE = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
NOT_REPRODUCIBLE = ("time/", "memory/", "throughput/", "faults/")  # measured, not computed
STEPS = 3


def run_preset(
    name: str, directory: Path, changes: Mapping[str, Any] | None = None
) -> dict[str, list[float]]:
    """Train the preset `name` on the running Ray, and return each metric's value at each step.

    Args:
        changes: fields that differ from those of the numbers on record.
    """
    from recipes.run_recipe import run_recipe
    from rlsys.config.command_line import evolve
    from rlsys.run.observers.metrics_log import read_metrics

    config = evolve(preset_config(name, directory), changes or {})
    try:
        run_recipe(lambda _: config, [])
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"preset {name} ended with exit code {end.code}") from end

    records = read_metrics(directory / "metrics.jsonl")
    steps = [record.values for record in records if record.kind == "train"]
    names = sorted({key for step in steps for key in step})
    return {
        key: [step[key] for step in steps if key in step]
        for key in names
        if not key.startswith(NOT_REPRODUCIBLE)
    }


def preset_config(name: str, directory: Path) -> RunConfig:
    """Return a small run of the preset `name`."""
    from rlsys.config import RunConfig
    from rlsys.config.presets import PRESETS

    return RunConfig.model_validate(
        {
            "recipe": f"golden_{name}",
            "plugins": ["tests.plugin_package.rlsys_example_plugin"],
            "model": {"path": "tiny"},
            "data": {"synthetic": {"train_size": 64, "eval_size": 8}, "max_prompt_tokens": 256},
            "generation": {
                "engine": "transformers",
                "dtype": "float32",
                "samples_per_prompt": 6,
                "max_tokens": 8,
                "cpus_per_worker": 0,
            },
            "policy": {
                "compute_dtype": "float32",
                "threads_per_rank": 1,
                "num_mini_batches": 2,
                "optimizer": {"learning_rate": 1e-3},
            },
            "critic": {"enabled": PRESETS[name].critic, "optimizer": {"learning_rate": 1e-3}},
            "algorithm": PRESETS[name].algorithm.model_dump(),
            "reward": {"functions": [{"name": "example_digits"}]},
            "trainer": {
                "steps": STEPS,
                "prompts_per_step": 4,
                "evaluation": {"every": 0},
                "checkpoints": {"every": 0},
            },
            "run": {"directory": str(directory)},
        }
    )


def main(target: Path, presets: list[str]) -> None:
    """Run the named presets (by default all) one after the other, and write a file for each."""
    import ray

    from rlsys.config.presets import PRESETS
    from workers.local_ray import needed_processes_only

    with needed_processes_only():
        ray.init(
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=256 * 1024**2,
            log_to_driver=False,
            configure_logging=False,
        )

    target.mkdir(parents=True, exist_ok=True)

    try:
        for name in presets or sorted(PRESETS):
            with tempfile.TemporaryDirectory() as directory:
                metrics = run_preset(name, Path(directory) / "run")
            (target / f"{name}.json").write_text(json.dumps(metrics, indent=1) + "\n")
            logging.getLogger().handlers.clear()  # those of the run that has ended
    finally:
        ray.shutdown()


if __name__ == "__main__":
    if any(os.environ.get(key) != value for key, value in PORTABLE.items()):
        os.execve(
            sys.executable,
            [sys.executable, "-m", "tests.support.golden_runs", *sys.argv[1:]],
            os.environ | PORTABLE,
        )
    asyncio.set_event_loop(asyncio.new_event_loop())
    main(Path(sys.argv[1]), sys.argv[2:])
