"""The driver on real actors: the contracts of the ports, a death and a resume, and the driver's own memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio
import ray
from ray.exceptions import RayActorError

from recipes.run_recipe import probe_tokens, start_workers
from rlsys.config import RunConfig
from rlsys.data.batches import PromptBatch, RewardBatch, RolloutBatch, SamplingParameters, TrainBatch
from rlsys.data.prompt_stream import LoadedPrompts, load_prompts
from rlsys.driver.checkpoints import CheckpointStore
from rlsys.driver.evaluation import Evaluator
from rlsys.driver.metrics_log import MetricsLog, read_metrics
from rlsys.driver.observer import Observers
from rlsys.driver.run_directory import RunDirectory
from rlsys.driver.synchronous_loop import SynchronousLoop, Workers
from rlsys.models import resolve_model
from rlsys.models.loading import load_tokenizer
from tests.port_contracts import WITH_FILES, WITHOUT_FILES, System
from workers.advantage_controller import AdvantageController, AdvantageControllerClient
from workers.cluster import Cluster
from workers.generation.group import GenerationGroup

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def make_config(**trainer: object) -> RunConfig:
    """The tiny model, the transformers engine, two generation workers, and a reward that random text can earn."""
    return RunConfig.model_validate(
        {
            "plugins": ["tests.plugin_package.rlsys_example_plugin"],
            "model": {"path": "tiny"},
            "data": {"synthetic": {"train_size": 64, "eval_size": 8}, "max_prompt_tokens": 256},
            "generation": {"engine": "transformers", "workers": 2, "samples_per_prompt": 4, "min_tokens": 0, "max_tokens": 12},
            "policy": {"threads_per_rank": 1, "mini_batches": 2, "optimizer": {"learning_rate": 1e-3}},
            "algorithm": {"kl": {"coefficient": 0.01}},
            "reward": {"functions": [{"name": "example_digits"}]},
            "trainer": {"prompts_per_step": 4, **trainer},
        }
    )


@dataclass(frozen=True)
class Parts:
    workers: Workers
    prompts: LoadedPrompts
    cluster: Cluster


@asynccontextmanager
async def started(config: RunConfig) -> AsyncIterator[Parts]:
    """All actors of a run, killed at the end."""
    directory = resolve_model("tiny")
    prompts = load_prompts(config, load_tokenizer(directory))
    cluster = Cluster.connect(config)
    try:
        yield Parts(await start_workers(cluster, config, directory, directory, probe_tokens(prompts)), prompts, cluster)
    finally:
        cluster.shutdown()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(ray_cluster: None) -> AsyncIterator[System]:
    async with started(make_config()) as parts:

        async def open_handle(handle: Any) -> Any:
            return await handle

        made = System(
            workers=parts.workers,
            prompts=parts.prompts.train.next_batch(),
            sampling=SamplingParameters(samples_per_prompt=4, temperature=1.0, max_tokens=12, seed=11),
            open=open_handle,
            tolerance=1e-4,
        )
        await made.sync()
        yield made


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("contract", WITHOUT_FILES, ids=lambda contract: contract.__name__)
async def test_contract_of_the_real_parts(contract: Callable, system: System) -> None:
    await contract(system)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("contract", WITH_FILES, ids=lambda contract: contract.__name__)
async def test_contract_with_files_of_the_real_parts(contract: Callable, system: System, tmp_path: Path) -> None:
    await contract(system, tmp_path)


class Killer:
    """Observer that kills an actor when a phase of a step begins."""

    def __init__(self, cluster: Cluster, actor: str, step: int, phase: str) -> None:
        self._victim, self._moment = cluster.actors[actor], (step, phase)

    def on_phase(self, step: int, phase: str) -> None:
        if (step, phase) == self._moment:
            ray.kill(self._victim)  # SIGKILL to its process

    def on_start(self, *_: Any) -> None: ...
    def on_step(self, *_: Any) -> None: ...
    def on_evaluation(self, *_: Any) -> None: ...
    def on_checkpoint(self, *_: Any) -> None: ...
    def on_end(self, *_: Any) -> None: ...


async def train(path: Path, config: RunConfig, *, resume: bool = False, kill: tuple[str, int, str] | None = None) -> None:
    """One process's share of a run, with actors of its own."""
    directory = RunDirectory(path)
    directory.create(config)
    store = CheckpointStore(directory.checkpoints, keep=1)
    checkpoint = store.latest() if resume else None
    assert (checkpoint is not None) == resume
    async with started(config) as parts:
        log = MetricsLog(directory, keep_lines=checkpoint.state["metrics_position"] if checkpoint else None)
        workers = parts.workers
        loop = SynchronousLoop(
            config,
            workers,
            parts.prompts.train,
            Evaluator(config, parts.prompts.evaluation, workers.generator, workers.scorer, ()),
            store,
            Observers([log, *([Killer(parts.cluster, *kill)] if kill else [])]),
            rollouts_directory=directory.rollouts,
            metrics_log=log,
            stop=(),
        )
        if checkpoint:
            await loop.restore(checkpoint)
        assert await loop.run() == "finished"


async def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """Killed twice, a policy rank during an update and a generation worker while it generates; every metric to 1e-6."""
    config = make_config(steps=5, evaluation={"every": 2}, checkpoints={"every": 2})
    await train(tmp_path / "whole", config)
    with pytest.raises(RayActorError) as caught:
        await train(tmp_path / "killed", config, kill=("policy-0", 3, "update"))
    assert "the newest checkpoint is that of step 2" in caught.value.__notes__[0]
    with pytest.raises(RayActorError):
        await train(tmp_path / "killed", config, resume=True, kill=("generation-1", 4, "generate"))
    await train(tmp_path / "killed", config, resume=True)

    whole, killed = (read_metrics(RunDirectory(tmp_path / name).metrics) for name in ("whole", "killed"))
    assert [(record.kind, record.step) for record in killed] == [(record.kind, record.step) for record in whole]
    for expected, found in zip(whole, killed, strict=True):
        compared = [name for name in expected.values if not name.startswith(("time/", "throughput/", "memory/"))]
        assert len(compared) > (20 if expected.kind == "train" else 1)
        for name in compared:
            assert found.values[name] == pytest.approx(expected.values[name], abs=1e-6), (expected.step, name)
    rewards = [record.values["reward/std"] for record in whole if record.kind == "train"]
    assert min(rewards) > 0, "equal rewards would teach nothing, and any two such runs are equal"


class LargeRollouts:
    """Generation actor whose batches hold `tokens` tokens: 9 bytes each."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def generate(self, prompts: PromptBatch, first_prompt: int, sampling: SamplingParameters) -> Any:
        sequences = np.ones((2, self._tokens // 2), dtype=np.int32)
        batch = RolloutBatch.from_sequences(sequences, temperature=1.0)
        yield (first_prompt, batch.num_response_tokens)
        yield batch


class Zeros:
    """Reward and policy actor that touches what it gets and returns next to nothing."""

    def score(self, rollouts: RolloutBatch) -> RewardBatch:
        zeros = np.zeros(len(rollouts), dtype=np.float32)
        none = ("",) * len(rollouts)
        return RewardBatch(
            batch_id=rollouts.batch_id, rewards=zeros, accuracies=zeros, components={}, reasons=none, extracted_answers=none
        )

    def update(self, batch: TrainBatch) -> int:
        return len(batch.advantages)


class ZerosClient:
    """The ports that the test below does not look at."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self.tokens: list[int] = []

    def score(self, rollouts: Any) -> Any:
        return self._actor.score.remote(rollouts)

    async def update(self, batch: Any) -> dict:
        self.tokens.append(await self._actor.update.remote(batch))
        return {}

    async def logprobs(self, rollouts: Any) -> tuple:
        return ()

    async def sync(self, version: int) -> dict:
        return {}

    async def save(self, directory: Path) -> None: ...
    async def load(self, directory: Path) -> None: ...
    async def metrics(self) -> dict:
        return {}


async def test_the_drivers_memory_does_not_grow_with_the_batch(tmp_path: Path) -> None:
    """Batches of 1 token and of 8 million (72 MB of rollouts, 104 MB as a train batch): the driver's own memory must not tell."""
    growth = {}
    for tokens in (4, 8_000_000):
        config = make_config(steps=3, save_rollouts_every=0, evaluation={"every": 0}, prompts_per_step=1)
        actors = [ray.remote(made).options(num_cpus=0).remote(*arguments) for made, arguments in ACTORS(config, tokens)]  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        generation, zeros, controller = actors
        await asyncio.gather(*(actor.__ray_ready__.remote() for actor in actors))
        client = ZerosClient(zeros)
        directory = RunDirectory(tmp_path / str(tokens))
        directory.create(config)
        log = MetricsLog(directory)
        advantages = AdvantageControllerClient(controller)
        advantages.write_rollouts = lambda batch, path: asyncio.sleep(0)  # type: ignore[method-assign]
        loop = SynchronousLoop(
            config,
            Workers(
                generator=GenerationGroup([generation]),
                scorer=client,
                policy=client,
                reference=None,
                advantages=advantages,
                weights=client,
            ),
            load_prompts(config, load_tokenizer(resolve_model("tiny"))).train,
            None,
            CheckpointStore(directory.checkpoints, keep=1),
            log,
            rollouts_directory=directory.rollouts,
            metrics_log=log,
            stop=(),
        )
        before = psutil.Process().memory_full_info().uss
        await loop.run()
        growth[tokens] = psutil.Process().memory_full_info().uss - before
        assert client.tokens == [tokens] * 3
        for actor in actors:
            ray.kill(actor)
    assert growth[8_000_000] < growth[4] + 8 * 1024**2


def ACTORS(config: RunConfig, tokens: int) -> list[tuple[type, tuple]]:  # noqa: N802
    return [(LargeRollouts, (tokens,)), (Zeros, ()), (AdvantageController, (config,))]
