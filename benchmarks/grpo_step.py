"""Seconds of one GRPO step by phase, on the real actors.

SmolLM2-135M, float32 and bfloat16, KL 0 and 0.04:

    python -m benchmarks.grpo_step

The control plane alone:

    python -m benchmarks.grpo_step --cases tiny,float32,0

Each step samples 4 prompts x 8 responses, each forced to 32 new tokens (`--tokens`), and
makes one update. The first two steps warm up and are not counted; the figures are medians over the
remaining ones. Results are recorded in docs/measurements.md and docs/measurements_log.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
from pathlib import Path

from recipes.grpo_math import on_cpu
from recipes.wiring import probe_tokens, start_workers
from rlsys.config import RunConfig
from rlsys.config.command_line import evolve
from rlsys.config.hardware import detect_hardware
from rlsys.data.prompt_stream import load_prompts
from rlsys.driver.sampling import Sampler
from rlsys.driver.session import Session
from rlsys.driver.synchronous_loop import SynchronousLoop
from rlsys.models import resolve_model
from rlsys.models.loading import load_tokenizer
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.directory import RunDirectory
from rlsys.run.model_checks import ModelDirectories
from rlsys.run.observers.metrics_log import MetricsLog, read_metrics
from rlsys.run.observers.observer import PHASES
from workers.cluster import Cluster

WARM_UP = 2
CASES = (
    "smollm2-135m,bfloat16,0",
    "smollm2-135m,bfloat16,0.04",
    "smollm2-135m,float32,0",
    "smollm2-135m,float32,0.04",
    "tiny,float32,0",
)


def case_config(case: str, steps: int, tokens: int, more: dict[str, object]) -> RunConfig:
    """Return the configuration of `model,dtype,KL coefficient`."""
    model, dtype, coefficient = case.split(",")
    return evolve(
        on_cpu(detect_hardware()),
        {
            "model.path": model,
            "generation.dtype": dtype,
            "policy.compute_dtype": dtype,
            "algorithm.kl.coefficient": float(coefficient),
            "generation.min_tokens": tokens,  # every response has its full length
            "generation.max_tokens": tokens,
            "generation.stop": ["never-sampled"],
            "generation.samples_per_prompt": 8,
            "plugins": ["benchmarks.varied_reward"],
            "reward.functions": ["text_length"],
            "trainer.prompts_per_step": 4,
            "trainer.steps": steps + WARM_UP,
            "trainer.evaluation.every": 0,
            "trainer.checkpoints.every": 0,
            "trainer.save_rollouts_every": 0,
            **more,
        },
    )


async def measure(config: RunConfig) -> dict[str, float]:
    """Run a case and return medians over the counted steps."""
    model = resolve_model(config.model.path)
    prompts = load_prompts(config, load_tokenizer(model))

    with tempfile.TemporaryDirectory() as scratch:
        directory = RunDirectory(Path(scratch))
        directory.create(config)
        cluster = Cluster.connect(config)
        try:
            probe = probe_tokens(config, prompts, model)
            models = ModelDirectories.same(model)
            workers = await start_workers(cluster, config, models, probe, notify=print)
            store = CheckpointStore(directory.checkpoints, keep=1)
            session = Session(config, store, [MetricsLog(directory)])
            sampler = Sampler(config, workers.generator, workers.scorer)
            loop = SynchronousLoop(
                config, workers, prompts.train, sampler, session, directory.rollouts
            )
            await loop.run()
        finally:
            cluster.shutdown()
        steps = [record.values for record in read_metrics(directory.metrics)[WARM_UP:]]

    names = {name for step in steps for name in step if name.startswith(("time/", "memory/"))}
    medians = {}
    for name in sorted(names | {"rollout/tokens"}):
        medians[name] = statistics.median(step[name] for step in steps if name in step)
    return medians


def main() -> None:
    """Measure each case and print its row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", default=CASES, help="model,dtype,KL coefficient")
    parser.add_argument("--steps", type=int, default=5, help="counted steps")
    parser.add_argument("--tokens", type=int, default=32, help="of each response")
    parser.add_argument(
        "--json", action="store_true", help="print the medians of each case as JSON"
    )
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="FIELD=VALUE",
        help="further fields of the configuration",
    )
    arguments = parser.parse_args()
    more: dict[str, object] = dict(item.split("=", 1) for item in arguments.set)

    configs = {
        case: case_config(case, arguments.steps, arguments.tokens, more) for case in arguments.cases
    }
    if arguments.json:
        for config in configs.values():
            print(json.dumps(asyncio.run(measure(config))), flush=True)
        return

    phases = " | ".join(PHASES)
    print(f"| model, precision, KL | step | {phases} | tokens | policy GiB | engine GiB |")
    print("|---" * (len(PHASES) + 5) + "|")
    for case, config in configs.items():
        figures = asyncio.run(measure(config))
        cells = [case, f"**{figures['time/step']:.3f}**"]
        cells += [f"{figures.get(f'time/{phase}', 0.0):.3f}" for phase in PHASES]
        cells.append(f"{figures['rollout/tokens']:.0f}")
        cells += [f"{figures.get(f'memory/{role}', 0.0):.2f}" for role in ("policy", "generation")]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
