"""All actors of a run on the tiny model, for tests that need the real thing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from recipes.wiring import probe_tokens, start_workers
from rlsys.config import RunConfig
from rlsys.data.prompt_stream import LoadedPrompts, load_prompts
from rlsys.driver.ports import Workers
from rlsys.models import resolve_model
from rlsys.models.loading import load_tokenizer
from rlsys.run.model_checks import ModelDirectories
from workers.cluster import Cluster


def make_config(**trainer: object) -> RunConfig:
    """Return a configuration of a small run, in which random text can earn a reward.

    It has the tiny model, the transformers engine and two generation workers.
    """
    return RunConfig.model_validate(
        {
            "plugins": ["tests.plugin_package.rlsys_example_plugin"],
            "model": {"path": "tiny"},
            "data": {"synthetic": {"train_size": 64, "eval_size": 8}, "max_prompt_tokens": 256},
            "generation": {
                "engine": "transformers",
                "dtype": "float32",
                "workers": 2,
                "samples_per_prompt": 4,
                "min_tokens": 0,
                "max_tokens": 12,
            },
            "policy": {
                "compute_dtype": "float32",
                "threads_per_rank": 1,
                "num_mini_batches": 2,
                "optimizer": {"learning_rate": 1e-3},
            },
            "algorithm": {"kl": {"coefficient": 0.01}},
            "reward": {"functions": [{"name": "example_digits"}]},
            "trainer": {"prompts_per_step": 4, **trainer},
        }
    )


@dataclass(frozen=True)
class Parts:
    """The workers of a run, the prompts, and the cluster that holds the actors."""

    workers: Workers
    prompts: LoadedPrompts
    cluster: Cluster


@asynccontextmanager
async def started(config: RunConfig) -> AsyncIterator[Parts]:
    """Start all actors of a run, and kill them at the end."""
    directory = resolve_model("tiny")
    prompts = load_prompts(config, load_tokenizer(directory))
    cluster = Cluster.connect(config)
    try:
        probe = probe_tokens(config, prompts, directory)
        workers = await start_workers(
            cluster, config, ModelDirectories.same(directory), probe, notify=print
        )
        yield Parts(workers, prompts, cluster)
    finally:
        cluster.shutdown()
