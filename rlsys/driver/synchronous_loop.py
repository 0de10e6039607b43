"""The synchronous training loop.

     prompts ---> generate ---group by group--> score -----------+
                     |                                           |
                     +------> old log-probs, ref log-probs ------+--> advantages --> update --> sync weights --> next step
                              (where they are needed)

Everything that is large stays in the object store; this module handles references and small metrics only.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from rlsys.config import RunConfig
from rlsys.data.batches import LogprobBatch, PromptBatch, RewardBatch, SamplingParameters
from rlsys.driver.dynamic_sampling import keeps_group
from rlsys.driver.evaluation import Evaluator
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
    StepHandles,
    WeightSync,
)
from rlsys.metrics import Metric, MetricMap, combine, maximum, total, values
from rlsys.run.checkpoints import Checkpoint, CheckpointStore
from rlsys.run.observers.observer import Observer, Outcome
from rlsys.run.required_inputs import required_inputs
from rlsys.run.resume import (
    advantage_state,
    check_resumable,
    describe_origin,
    differences,
    prompt_state,
)
from rlsys.run.reward_failures import RewardFailureWatch

T = TypeVar("T")

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


@dataclass(frozen=True, kw_only=True)
class ScoredGroup:
    """The responses to one prompt on their way to the update."""

    part: RolloutPart
    rewards: Handle[RewardBatch]
    greedy_rewards: (
        Handle[RewardBatch] | None
    )  # of the greedy response; None: the estimator does not read it
    greedy_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class SampledGroups:
    """Everything that was sampled in one step, in prompt order."""

    kept: Sequence[ScoredGroup]
    dropped: Sequence[ScoredGroup] = ()  # by dynamic sampling
    metrics: MetricMap  # how they came about


class PhaseClock:
    """Seconds spent in each phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
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
        reward_failures: RewardFailureWatch | None = None,
    ) -> None:
        self._reward_failures = reward_failures or RewardFailureWatch()
        self._config = config
        self._workers = workers
        self._prompts = prompts
        self._evaluator = evaluator
        self._checkpoints = checkpoints
        self._observer = observer
        self._rollouts_directory = rollouts_directory
        self._metrics_log = metrics_log
        self._stop_strings = stop
        self._needs = required_inputs(config)
        self._stop_requested = asyncio.Event()
        self._step = 0  # completed steps, which is also the version of the policy's weights
        self._saved_step = 0
        self._evaluated_step = -1
        self._save_time: dict[
            str, float
        ] = {}  # of a checkpoint; reported with the step after it, beyond that step's time/step
        self._place = "start"

    def request_stop(self) -> None:
        """End after the current step, with a checkpoint; a running evaluation is abandoned. Called from a signal handler."""
        self._stop_requested.set()

    async def restore(self, checkpoint: Checkpoint) -> None:
        """Continue where `checkpoint` was written; call before `run`. What has changed since is named in the log.

        Raises:
            ValueError: another model, sharding or data.
        """
        check_resumable(checkpoint, self._config)
        for change in differences(checkpoint, self._config):
            logger.warning("changed since checkpoint %s: %s", checkpoint.path, change)
        self._prompts.load_state(prompt_state(checkpoint))
        await self._workers.policy.load(checkpoint.path)
        await self._workers.advantages.load_state(advantage_state(checkpoint, self._config))
        self._step = self._saved_step = checkpoint.step
        self._evaluated_step = checkpoint.state["evaluated_step"]

    async def run(self) -> Outcome:
        """Train until the last step, or until a stop is requested; the weights that result are always saved.

        Raises:
            Whatever a worker raised, with a note that says in which phase of which step, and from where to resume.
        """
        self._observer.on_start(self._step + 1, self._config.trainer.steps)
        try:
            await self._train()
        except (asyncio.CancelledError, KeyboardInterrupt):
            self._observer.on_end(
                "interrupted", f"left during {self._place}; {self._newest_checkpoint()}"
            )
            raise
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[-1]
            error.add_note(f"This happened during {self._place}; {self._newest_checkpoint()}.")
            self._observer.on_end("failed", f"{self._place}: {type(error).__name__}: {reason}")
            raise
        complete = self._step >= self._config.trainer.steps and not self._evaluation_is_due()
        outcome: Outcome = "finished" if complete else "interrupted"
        self._observer.on_end(outcome, "")
        return outcome

    async def _train(self) -> None:
        trainer = self._config.trainer
        self._enter(self._step, "sync")
        await self._workers.weights.sync(self._step)
        await self._evaluate_if_due()
        while self._step < trainer.steps and not self._stop_requested.is_set():
            report = await self._train_step()
            self._step += 1
            self._observer.on_step(self._step, report | self._save_time)
            self._save_time = {}
            await self._evaluate_if_due()
            if trainer.checkpoints.every and self._step % trainer.checkpoints.every == 0:
                await self._save()
        if self._saved_step < self._step:
            await self._save()

    async def _train_step(self) -> dict[str, float]:
        """One step: the drawing at the top of this file. All handles are dropped when it returns, so the object store is free again."""
        clock, workers, step = PhaseClock(), self._workers, self._step + 1
        with self._timed(clock, step, "generate"):
            sampled = await self._sample_groups()
        groups = sampled.kept
        rollouts = [group.part.rollouts for group in groups]
        rewards = [group.rewards for group in groups]
        greedy = [group.greedy_rewards for group in groups if group.greedy_rewards is not None]
        with self._timed(clock, step, "logprobs"):  # the reward pool works meanwhile
            old, ref = await self._old_and_ref_logprobs(rollouts)
        with self._timed(
            clock, step, "reward"
        ):  # these records are small: a few numbers a response
            scored = await asyncio.gather(*rewards, *greedy)
            self._reward_failures.check(scored, "training")
        with self._timed(clock, step, "advantages"):
            credited = await workers.advantages.credit(
                StepHandles(
                    rollouts=rollouts,
                    rewards=rewards,
                    old=old,
                    ref=ref,
                    greedy=greedy,
                    dropped_rollouts=[group.part.rollouts for group in sampled.dropped],
                    dropped_rewards=[group.rewards for group in sampled.dropped],
                )
            )
        with self._timed(clock, step, "update"):
            update = await self._update(step, credited)
        with self._timed(clock, step, "sync"):
            sync = await workers.weights.sync(step)
        memory = await asyncio.gather(*(worker.metrics() for worker in workers.reporting))
        return _step_values(
            combine([sampled.metrics, credited.metrics, update, sync, _driver_memory(), *memory]),
            clock.values(),
        )

    def _enter(self, step: int, phase: str) -> None:
        self._place = f"{phase} of step {step}"
        self._observer.on_phase(step, phase)

    @contextmanager
    def _timed(self, clock: PhaseClock, step: int, phase: str) -> Iterator[None]:
        self._enter(step, phase)
        with clock.phase(phase):
            yield

    async def _update(self, step: int, credited: CreditedBatch) -> MetricMap:
        """Train, and write what was sampled: meanwhile, or afterwards where the update itself estimates the advantages."""
        policy = self._workers.policy
        if not self._config.algorithm.advantage.recompute:
            metrics, _ = await asyncio.gather(
                policy.update(credited.batch), self._write_rollouts(step, credited)
            )
            return metrics
        metrics = await policy.update(credited.batch)
        await self._write_rollouts(step, credited, await policy.estimated_advantages())
        return metrics

    async def _sample_groups(self) -> SampledGroups:
        """The groups of one step, in prompt order, and how they came about.

        With dynamic sampling (`algorithm.dynamic_sampling`), groups that teach nothing are replaced by those of further prompts; after the last
        allowed round such groups fill what is still missing, so that the batch always has its size. They do not enter the loss.
        """
        dynamic, wanted = (
            self._config.algorithm.dynamic_sampling,
            self._config.trainer.prompts_per_step,
        )
        rounds = dynamic.max_rounds
        prompts = self._prompts.next_batch()
        if rounds == 1:
            groups = await self._generate_and_score(prompts, round_number=0)
            return SampledGroups(kept=groups, metrics=_greedy_tokens(groups))
        useful: list[ScoredGroup] = []
        equal: list[ScoredGroup] = []
        number = 0
        for number in range(rounds):
            # The later rounds belong to the batch of the first.
            batch = (
                prompts
                if number == 0
                else replace(self._prompts.next_batch(), batch_id=prompts.batch_id)
            )
            groups = await self._generate_and_score(batch, round_number=number)
            scored = await asyncio.gather(*(group.rewards for group in groups))  # a few numbers
            self._reward_failures.check(scored, "training")
            for group, rewards in zip(groups, scored, strict=True):
                (useful if keeps_group(rewards, dynamic.by) else equal).append(group)
            if len(useful) >= wanted:
                break
        groups = useful + equal
        counts = {
            "sampling/rounds": total(number + 1),
            "sampling/replaced_groups": total(min(len(equal), len(groups) - wanted)),
            "sampling/surplus_groups": total(max(0, len(useful) - wanted)),
            "sampling/missing_groups": total(max(0, wanted - len(useful))),
        }
        return SampledGroups(
            kept=groups[:wanted], dropped=groups[wanted:], metrics=counts | _greedy_tokens(groups)
        )

    async def _generate_and_score(
        self, prompts: PromptBatch, *, round_number: int
    ) -> list[ScoredGroup]:
        """Sample responses; each group goes to the reward worker the moment it is there. In prompt order.

        A generation group that lost a prompt would silently bias the update, hence the check.
        """
        sampling = self._sampling(prompts.batch_id, round_number)
        scored = await self._stream(prompts, sampling)
        greedy: dict[int, tuple[RolloutPart, Handle[RewardBatch]]] = {}
        if "greedy_rewards" in self._needs:
            greedy = await self._stream(
                prompts,
                replace(sampling, samples_per_prompt=1, temperature=0.0, top_p=1.0, top_k=0),
            )
        return [
            ScoredGroup(
                part=part,
                rewards=rewards,
                greedy_rewards=greedy[index][1] if greedy else None,
                greedy_tokens=greedy[index][0].num_response_tokens if greedy else 0,
            )
            for index, (part, rewards) in sorted(scored.items())
        ]

    async def _stream(
        self, prompts: PromptBatch, sampling: SamplingParameters
    ) -> dict[int, tuple[RolloutPart, Handle[RewardBatch]]]:
        """Parts and their rewards by the index of the prompt."""
        scored: dict[int, tuple[RolloutPart, Handle[RewardBatch]]] = {}
        async for part in self._workers.generator.generate(prompts, sampling):
            scored[part.prompt_index] = part, self._workers.scorer.score(part.rollouts)
        assert sorted(scored) == list(range(len(prompts))), (
            "the generation group must answer each prompt once"
        )
        return scored

    def _sampling(self, batch_id: int, round_number: int) -> SamplingParameters:
        """The seed depends on the run's seed and the batch alone, so that a resumed run samples what the uninterrupted one would."""
        generation = self._config.generation
        entropy = [self._config.trainer.seed, batch_id, *([round_number] if round_number else [])]
        return SamplingParameters(
            samples_per_prompt=generation.samples_per_prompt,
            temperature=generation.temperature,
            top_p=generation.top_p,
            top_k=generation.top_k,
            min_tokens=generation.min_tokens,
            max_tokens=generation.max_tokens,
            stop=self._stop_strings,
            seed=int(np.random.SeedSequence(entropy).generate_state(1)[0]),
        )

    async def _old_and_ref_logprobs(
        self, rollouts: Sequence[Handle]
    ) -> tuple[Sequence[Handle[LogprobBatch]], Sequence[Handle[LogprobBatch]]]:
        """Side by side, and only where they are needed; the reward pool works meanwhile."""

        async def none() -> Sequence[Handle[LogprobBatch]]:
            return ()

        policy, reference = self._workers.policy, self._workers.reference
        return await asyncio.gather(
            policy.logprobs(rollouts) if "old_logprobs" in self._needs else none(),
            reference.logprobs(rollouts) if reference else none(),
        )

    async def _write_rollouts(
        self,
        step: int,
        credited: CreditedBatch,
        advantages: Handle[NDArray[np.float32]] | None = None,
    ) -> None:
        every = self._config.trainer.save_rollouts_every
        if step in (1, self._config.trainer.steps) or (every and step % every == 0):
            await self._workers.advantages.write_rollouts(
                credited.batch,
                self._rollouts_directory / f"step_{step:06d}.parquet",
                dropped=credited.dropped,
                advantages=advantages,
            )

    def _evaluation_is_due(self) -> bool:
        return self._evaluator is not None and self._config.trainer.evaluation_is_due(
            self._step, self._evaluated_step
        )

    async def _evaluate_if_due(self) -> None:
        if (
            self._evaluator is None
            or not self._evaluation_is_due()
            or self._stop_requested.is_set()
        ):
            return
        self._enter(self._step, "evaluate")
        start = time.perf_counter()
        report = await _unless_stopped(self._evaluator.evaluate(), self._stop_requested)
        if report is not None:
            self._observer.on_evaluation(
                self._step, report | {"time/evaluate": time.perf_counter() - start}
            )
            self._evaluated_step = self._step

    async def _save(self) -> None:
        self._enter(self._step, "checkpoint")
        start = time.perf_counter()
        state: dict[str, Any] = {
            "step": self._step,
            "evaluated_step": self._evaluated_step,
            "prompts": self._prompts.state(),
            "metrics_position": self._metrics_log.position(),
            "advantages": await self._workers.advantages.state(),
            **describe_origin(self._config),
        }
        path = await self._checkpoints.save(self._step, self._workers.policy.save, state)
        self._saved_step = self._step
        self._save_time = {"time/checkpoint": time.perf_counter() - start}
        self._observer.on_checkpoint(self._step, str(path))

    def _newest_checkpoint(self) -> str:
        if not self._saved_step:
            return "there is no checkpoint yet"
        return f"the newest checkpoint is that of step {self._saved_step}, from which --resume continues"


async def _unless_stopped(work: Coroutine[Any, Any, T], stop: asyncio.Event) -> T | None:
    """The result of `work`, or None when `stop` was set first; then `work` is cancelled."""
    task, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        stopped.cancel()


def _driver_memory() -> MetricMap:
    """Peak memory of this process, in GiB: it must not grow with the batch."""
    return {"memory/driver": maximum(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2)}


def _greedy_tokens(groups: Sequence[ScoredGroup]) -> dict[str, Metric]:
    """Tokens of the greedy responses, where an estimator compares with them."""
    if all(group.greedy_rewards is None for group in groups):
        return {}
    return {"rollout/greedy_tokens": total(sum(group.greedy_tokens for group in groups))}


def _step_values(metrics: Mapping[str, Metric], times: Mapping[str, float]) -> dict[str, float]:
    """Plain numbers of one step, with the throughput of its phases: of every token that the engines sampled."""
    numbers = values(metrics) | dict(times)
    tokens = numbers.get("rollout/tokens", 0.0) + numbers.get("rollout/greedy_tokens", 0.0)
    numbers["throughput/generate"] = tokens / max(times["time/generate"], 1e-9)
    numbers["throughput/update"] = numbers.get("policy/tokens", 0.0) / max(
        times["time/update"], 1e-9
    )
    numbers["throughput/step"] = tokens / max(times["time/step"], 1e-9)
    return numbers
