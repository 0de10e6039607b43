"""The driver on real actors: a death and a resume, and the driver's own memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray.exceptions import RayActorError

from rlsys.config import RunConfig
from rlsys.data.batches import (
    Prompt,
    PromptBatch,
    RewardBatch,
    RolloutBatch,
    SamplingParameters,
    TrainBatch,
)
from rlsys.data.prompt_stream import PromptStream
from rlsys.data.sequences import TokenSequences
from rlsys.driver.evaluation import Evaluator
from rlsys.driver.ports import CreditedBatch, StepHandles, Workers
from rlsys.driver.sampling import Sampler
from rlsys.driver.session import Session
from rlsys.driver.synchronous_loop import SynchronousLoop
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.directory import RunDirectory
from rlsys.run.observers.metrics_log import MetricsLog, read_metrics
from rlsys.run.observers.observer import Observer
from tests.support.real_parts import make_config, started
from tests.support.saved_at_once import SavedAtOnce
from workers.cluster import Cluster
from workers.generation.group import GenerationGroup

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


class Killer(Observer):
    """Kills an actor when a phase of a step begins."""

    def __init__(self, cluster: Cluster, actor: str, step: int, phase: str) -> None:
        self._victim = cluster.actors[actor]
        self._moment = (step, phase)

    def on_phase(self, step: int, phase: str) -> None:
        if (step, phase) == self._moment:
            ray.kill(self._victim)  # SIGKILL to its process


async def train(
    path: Path, config: RunConfig, *, resume: bool = False, kill: tuple[str, int, str] | None = None
) -> None:
    """Train with new actors until the run ends or an actor dies, as one process does."""
    directory = RunDirectory(path)
    directory.create(config)
    store = CheckpointStore(directory.checkpoints, keep=1)
    checkpoint = store.latest() if resume else None
    assert (checkpoint is not None) == resume

    async with started(config) as parts:
        workers = parts.workers
        log = MetricsLog(directory)
        observers: list[Observer] = [log]
        if kill:
            observers.append(Killer(parts.cluster, *kill))

        sampler = Sampler(config, workers.generator, workers.scorer)
        evaluator = Evaluator(config, parts.prompts.evaluation, sampler)
        session = Session(config, store, observers, evaluator)
        session.register("metrics_position", log)

        loop = SynchronousLoop(
            config, workers, parts.prompts.train, sampler, session, directory.rollouts
        )
        if checkpoint:
            await session.restore(checkpoint)
        assert await loop.run() == "finished"


async def test_a_resumed_run_repeats_the_steps_after_its_checkpoint_with_the_same_result(
    tmp_path: Path,
) -> None:
    """Kill a policy rank during an update, and resume: every metric agrees to 1e-6.

    The last checkpoint is two steps and an evaluation old by then.
    """
    config = make_config(steps=6, evaluation={"every": 2}, checkpoints={"every": 3})
    metrics = RunDirectory(tmp_path / "run").metrics
    with pytest.raises(RayActorError) as caught:
        await train(tmp_path / "run", config, kill=("policy-0", 6, "update"))
    assert "update of step 6; the newest checkpoint is that of step 3" in caught.value.__notes__[0]

    before = {(record.kind, record.step): record for record in read_metrics(metrics)}
    await train(tmp_path / "run", config, resume=True)

    after = {(record.kind, record.step): record for record in read_metrics(metrics)}
    uninterrupted = [
        ("eval", 0),
        ("train", 1),
        ("train", 2),
        ("eval", 2),
        ("train", 3),
        ("train", 4),
        ("eval", 4),
        ("train", 5),
    ]

    assert list(before) == uninterrupted
    assert list(after) == [*uninterrupted, ("train", 6), ("eval", 6)]
    assert len(read_metrics(metrics)) == len(after)

    for moment, expected in before.items():
        found = after[moment]
        repeated = moment in uninterrupted[-3:]
        assert (found.time > expected.time) == repeated, moment

        compared = [
            name
            for name in expected.values
            if not name.startswith(("time/", "throughput/", "memory/"))
        ]
        assert len(compared) > (20 if expected.kind == "train" else 1)
        for name in compared:
            value = pytest.approx(expected.values[name], abs=1e-6)
            assert found.values[name] == value, (moment, name)

    rewards = [record.values["reward/std"] for record in after.values() if record.kind == "train"]
    assert min(rewards) > 0, "equal rewards would teach nothing, and any two such runs are equal"


class LargeRollouts:
    """A generation actor whose batches hold `sampling.max_tokens` tokens of 9 bytes each."""

    def generate(
        self,
        prompts: PromptBatch,
        positions: Sequence[int],
        sampling: SamplingParameters,
        version: int | None,
    ) -> Any:
        sequences = np.ones((2, sampling.max_tokens // 2), dtype=np.int32)
        batch = RolloutBatch(
            prompts=prompts,
            sequences=TokenSequences.of_texts(list(sequences)),
            rollout_logprobs=np.zeros(sequences.size, dtype=np.float32),
            oldest_weight_version=np.zeros(2, dtype=np.int32),
            newest_weight_version=np.zeros(2, dtype=np.int32),
            stop_reasons=np.zeros(2, dtype=np.int8),
            response_texts=("",) * 2,
            temperature=1.0,
        )
        yield batch
        yield (positions[0], batch.num_response_tokens)


class Trainer:
    """All other actors in one, which receives large records and answers with small ones."""

    def score(self, rollouts: RolloutBatch) -> RewardBatch:
        zeros = np.zeros(len(rollouts), dtype=np.float32)
        none = ("",) * len(rollouts)
        return RewardBatch(
            batch_id=rollouts.batch_id,
            rewards=zeros,
            accuracies=zeros,
            components={},
            reasons=none,
            extracted_answers=none,
        )

    def credit(self, rollouts: RolloutBatch, rewards: RewardBatch) -> list:
        batch = TrainBatch(
            rollouts=rollouts,
            rewards=rewards,
            advantages=np.zeros(len(rollouts.token_ids), np.float32),
        )
        return [ray.put(batch)]

    def update(self, batch: TrainBatch) -> int:
        return len(batch.rollouts.token_ids)


class TrainerClient(SavedAtOnce):
    """The ports over a `Trainer`."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self.tokens: list[int] = []

    def score(self, rollouts: Any) -> Any:
        return self._actor.score.remote(rollouts)

    async def credit(self, step: StepHandles) -> CreditedBatch:
        (batch,) = await self._actor.credit.remote(*step.rollouts, *step.rewards)
        return CreditedBatch(batch=batch)

    async def update(self, batch: Any, ref_hidden: Any = (), texts: Any = None) -> dict:
        self.tokens.append(await self._actor.update.remote(batch))
        return {}

    async def logprobs(self, rollouts: Any) -> tuple:
        return ()

    async def sync(self, version: int) -> dict:
        return {}

    async def metrics(self) -> dict:
        return {}

    async def state(self) -> dict:
        return {}

    async def load_state(self, state: dict) -> None: ...
    async def estimated_advantages(self) -> None: ...
    async def write_rollouts(
        self, batch: Any, path: Path, *, dropped: Any = None, advantages: Any = None
    ) -> None: ...
    async def save(self, directory: Path) -> None: ...
    async def load(self, directory: Path) -> None: ...


async def test_the_drivers_memory_does_not_grow_with_the_batch(tmp_path: Path) -> None:
    """Train three steps on batches of 4 tokens, and three on batches of 8 million.

    The large ones have 72 MB of rollouts, 104 MB as train batches.
    """
    remote: Any = ray.remote
    generation = remote(LargeRollouts).options(num_cpus=0).remote()
    trainer = remote(Trainer).options(num_cpus=0).remote()

    growth = {}
    for tokens in (4, 8_000_000):
        client = TrainerClient(trainer)
        loop = _loop_over(client, GenerationGroup([generation]), tmp_path / str(tokens), tokens)

        before = psutil.Process().memory_info().rss
        assert await loop.run() == "finished"
        growth[tokens] = psutil.Process().memory_info().rss - before
        assert client.tokens == [tokens] * 3

    for actor in (generation, trainer):
        ray.kill(actor)
    assert growth[8_000_000] < 16 * 1024**2, growth


def _loop_over(
    client: TrainerClient, generator: GenerationGroup, path: Path, tokens: int
) -> SynchronousLoop:
    """Return a loop of three steps with one prompt."""
    config = RunConfig.model_validate(
        {
            "generation": {"max_tokens": tokens},
            "trainer": {"steps": 3, "evaluation": {"every": 0}, "prompts_per_step": 1},
        }
    )
    directory = RunDirectory(path)
    directory.create(config)

    prompt = Prompt(problem_id="0", token_ids=(1,), text="", problem="", ground_truth="")
    stream = PromptStream([prompt], prompts_per_step=1, seed=0, shuffle=False)
    # `Any`, since no class implements all ports at once for the type checker.
    ports: Any = {"scorer": client, "policy": client, "advantages": client, "weights": client}
    workers = Workers(generator=generator, reference=None, **ports)
    store = CheckpointStore(directory.checkpoints, keep=1)
    session = Session(config, store, [MetricsLog(directory)])
    sampler = Sampler(config, workers.generator, workers.scorer)
    return SynchronousLoop(config, workers, stream, sampler, session, directory.rollouts)
