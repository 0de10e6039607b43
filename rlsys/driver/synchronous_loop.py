"""The synchronous training loop.

     prompts ---> generate ---part by part---> score ------------+
                     |                                           |
                     +------> old log-probs, ref log-probs ------+--> advantages --> update --> sync weights --> next step
                              (where they are needed)

Everything that is large stays in the object store; this module handles references and small metrics only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rlsys.config import RunConfig
from rlsys.data.batches import LogprobBatch, PromptBatch, SamplingParameters
from rlsys.driver.checkpoints import Checkpoint, CheckpointStore
from rlsys.driver.evaluation import Evaluator
from rlsys.driver.metrics import Metric, MetricMap, combine, values
from rlsys.driver.observer import Observer, Outcome
from rlsys.driver.ports import (
    AdvantageComputer,
    CreditedBatch,
    Generator,
    Handle,
    LogprobSource,
    Policy,
    PromptSource,
    RewardScorer,
    RolloutPart,
    WeightSync,
)

logger = logging.getLogger(__name__)


class HasMetrics(Protocol):
    """A worker that reports its peak memory and the like."""

    async def metrics(self) -> MetricMap: ...


class MetricsPosition(Protocol):
    """The metrics log, as far as checkpoints need it."""

    def position(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The other side of the ports."""

    generator: Generator
    scorer: RewardScorer
    policy: Policy
    reference: LogprobSource | None  # None where no KL term is asked for
    advantages: AdvantageComputer
    weights: WeightSync
    reporting: Sequence[HasMetrics] = ()


class PhaseClock:
    """Seconds spent in each phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def values(self) -> dict[str, float]:
        """time/<phase>, time/other and time/step."""
        total = time.perf_counter() - self._start
        phases = {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        return phases | {"time/other": total - sum(self.seconds.values()), "time/step": total}


class SynchronousLoop:
    """One policy, trained on what it just sampled. `run` is the whole of it."""

    def __init__(
        self,
        config: RunConfig,
        workers: Workers,
        prompts: PromptSource,
        evaluator: Evaluator | None,
        checkpoints: CheckpointStore,
        observer: Observer,
        *,
        rollouts_directory: Path,
        metrics_log: MetricsPosition,
        stop: tuple[str, ...],
        needs_old_logprobs: bool = False,
    ) -> None:
        """`needs_old_logprobs`: the estimator reads them. They are computed anyway where one batch is updated on more than once."""
        self._config = config
        self._workers = workers
        self._prompts = prompts
        self._evaluator = evaluator
        self._checkpoints = checkpoints
        self._observer = observer
        self._rollouts_directory = rollouts_directory
        self._metrics_log = metrics_log
        self._stop_strings = stop
        self._needs_old = needs_old_logprobs or config.policy.epochs * config.policy.mini_batches > 1
        self._stop_requested = asyncio.Event()
        self._step = 0  # completed steps, which is also the version of the policy's weights
        self._saved_step = 0

    def request_stop(self) -> None:
        """End after the current step, with a checkpoint. Called from a signal handler."""
        self._stop_requested.set()

    async def restore(self, checkpoint: Checkpoint) -> None:
        """Continue where `checkpoint` was written; call before `run`."""
        self._prompts.load_state(checkpoint.state["prompts"])
        await self._workers.policy.load(checkpoint.path)
        self._step = self._saved_step = checkpoint.step

    async def run(self) -> Outcome:
        """Train until the last step, or until a stop is requested; the weights that result are always saved."""
        steps = self._config.trainer.steps
        self._observer.on_start(self._step + 1, steps)
        try:
            await self._workers.weights.sync(self._step)
            if self._step == 0:
                await self._evaluate()
            while self._step < steps and not self._stop_requested.is_set():
                report = await self._train_step()
                self._step += 1
                self._observer.on_step(self._step, report)
                if not self._stop_requested.is_set():
                    await self._evaluate_and_save_if_due()
            if self._saved_step < self._step:
                await self._save()
        except BaseException as error:
            self._observer.on_end("failed", f"{type(error).__name__}: {error}")
            raise
        outcome: Outcome = "finished" if self._step >= steps else "interrupted"
        self._observer.on_end(outcome, "")
        return outcome

    async def _train_step(self) -> dict[str, float]:
        """One step: the drawing at the top of this file."""
        clock, workers, step = PhaseClock(), self._workers, self._step + 1
        with self._timed(clock, step, "generate"):
            parts, rewards = await self._generate_and_score(self._prompts.next_batch())
        rollouts = [part.rollouts for part in parts]
        with self._timed(clock, step, "logprobs"):
            old, ref = await self._old_and_ref_logprobs(rollouts)
        with self._timed(clock, step, "advantages"):  # waits for the last rewards too
            credited = await workers.advantages.credit(rollouts, rewards, old, ref)
        with self._timed(clock, step, "update"):
            update, _ = await asyncio.gather(workers.policy.update(credited.batch), self._write_rollouts(step, credited))
        with self._timed(clock, step, "sync"):
            sync = await workers.weights.sync(step)
        memory = await asyncio.gather(*(worker.metrics() for worker in workers.reporting))
        return _step_values(combine([credited.metrics, update, sync, *memory]), clock.values())

    @contextmanager
    def _timed(self, clock: PhaseClock, step: int, phase: str):
        self._observer.on_phase(step, phase)
        with clock.phase(phase):
            yield

    async def _generate_and_score(self, prompts: PromptBatch) -> tuple[list[RolloutPart], list[Handle]]:
        """Sample responses; each part goes to the reward worker the moment it is there. Both lists are in prompt order."""
        scored: list[tuple[RolloutPart, Handle]] = []
        async for part in self._workers.generator.generate(prompts, self._sampling(prompts.batch_id)):
            scored.append((part, self._workers.scorer.score(part.rollouts)))
        scored.sort(key=lambda pair: pair[0].first_prompt)
        return [part for part, _ in scored], [reward for _, reward in scored]

    def _sampling(self, batch_id: int) -> SamplingParameters:
        """The seed depends on the run's seed and the batch alone, so that a resumed run samples what the uninterrupted one would."""
        generation = self._config.generation
        return SamplingParameters(
            samples_per_prompt=generation.samples_per_prompt,
            temperature=generation.temperature,
            top_p=generation.top_p,
            top_k=generation.top_k,
            min_tokens=generation.min_tokens,
            max_tokens=generation.max_tokens,
            stop=self._stop_strings,
            seed=int(np.random.SeedSequence([self._config.trainer.seed, batch_id]).generate_state(1)[0]),
        )

    async def _old_and_ref_logprobs(
        self, rollouts: Sequence[Handle]
    ) -> tuple[Sequence[Handle[LogprobBatch]], Sequence[Handle[LogprobBatch]]]:
        """Side by side, and only where they are needed; the reward pool works meanwhile."""

        async def none() -> Sequence[Handle[LogprobBatch]]:
            return ()

        policy, reference = self._workers.policy, self._workers.reference
        return await asyncio.gather(
            policy.logprobs(rollouts) if self._needs_old else none(), reference.logprobs(rollouts) if reference else none()
        )

    async def _write_rollouts(self, step: int, credited: CreditedBatch) -> None:
        every = self._config.trainer.save_rollouts_every
        if step in (1, self._config.trainer.steps) or (every and step % every == 0):
            await self._workers.advantages.write_rollouts(credited.batch, self._rollouts_directory / f"step_{step:06d}.parquet")

    async def _evaluate_and_save_if_due(self) -> None:
        trainer = self._config.trainer
        last = self._step == trainer.steps
        if trainer.evaluation.every and (last or self._step % trainer.evaluation.every == 0):
            await self._evaluate()
        if trainer.checkpoints.every and self._step % trainer.checkpoints.every == 0:
            await self._save()

    async def _evaluate(self) -> None:
        if self._evaluator is None or not self._config.trainer.evaluation.every:
            return
        self._observer.on_phase(self._step, "evaluate")
        start = time.perf_counter()
        report = await self._evaluator.evaluate()
        self._observer.on_evaluation(self._step, report | {"time/evaluate": time.perf_counter() - start})

    async def _save(self) -> None:
        self._observer.on_phase(self._step, "checkpoint")
        state: dict[str, Any] = {
            "step": self._step,
            "prompts": self._prompts.state(),
            "metrics_position": self._metrics_log.position(),
        }
        path = await self._checkpoints.save(self._step, self._workers.policy.save, state)
        self._saved_step = self._step
        self._observer.on_checkpoint(self._step, str(path))


def _step_values(metrics: Mapping[str, Metric], times: Mapping[str, float]) -> dict[str, float]:
    """Plain numbers of one step, with the throughput of its phases."""
    numbers = values(metrics) | dict(times)
    tokens = numbers.get("rollout/tokens", 0.0)
    numbers["throughput/generate"] = tokens / max(times["time/generate"], 1e-9)
    numbers["throughput/update"] = numbers.get("policy/tokens", 0.0) / max(times["time/update"], 1e-9)
    numbers["throughput/step"] = tokens / max(times["time/step"], 1e-9)
    return numbers
