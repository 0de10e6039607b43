"""The synchronous training loop.

    prompts --> generate --group by group--> score ---------+
                   |                                        |
                   +----> old log-probs, ref log-probs, ----+--> advantages --> update --+
                          values (where they are needed)               critic, policy    |
                                                           next step <-- sync weights <--+

The critic is updated before the policy, not beside it: they share cores or a GPU, and so neither
has to fit beside the activations of the other. In the first `critic.warmup_steps` steps only the
critic is updated.

With `ptx.coefficient` each update of the policy also gets the next batch of pretraining texts.

Large records stay in the object store; this module handles references and small metrics only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlsys.config import RunConfig
from rlsys.data.batches import LogprobBatch, ValueBatch
from rlsys.data.example_stream import ExampleBatch
from rlsys.data.hidden_states import HiddenStates
from rlsys.driver.ports import (
    CreditedBatch,
    ExampleSource,
    Handle,
    PromptSource,
    StepHandles,
    Workers,
)
from rlsys.driver.sampling import SampledGroups, Sampler
from rlsys.driver.session import HasState, Session
from rlsys.metrics import MetricMap, combine, values
from rlsys.run.observers.observer import Outcome
from rlsys.run.required_inputs import required_inputs

CRITIC_DIRECTORY = "critic"  # in a checkpoint, beside the files of the policy


class _ModelOutputs(NamedTuple):
    """One handle per rank; empty where a model does not compute them."""

    old: Sequence[Handle[LogprobBatch]]
    ref: Sequence[Handle[LogprobBatch]]
    values: Sequence[Handle[ValueBatch]]
    ref_hidden: Sequence[Handle[HiddenStates | None]] = ()


class SynchronousLoop:
    """Training of one policy on its own latest samples. `run` is the whole of it."""

    def __init__(
        self,
        config: RunConfig,
        workers: Workers,
        prompts: PromptSource,
        sampler: Sampler,
        session: Session,
        rollouts_directory: Path,
        texts: ExampleSource | None = None,
    ) -> None:
        """Create a loop; `texts` are pretraining texts for the policy's updates."""
        self._config = config
        self._workers = workers
        self._prompts = prompts
        self._sampler = sampler
        self._session = session
        self._rollouts_directory = rollouts_directory
        self._texts = texts
        self._needs = required_inputs(config)
        session.register("prompts", self._resumable_prompts())
        if texts is not None:
            session.register("texts", texts)
        session.register("advantages", workers.advantages)
        session.register_model(workers.policy)
        if workers.critic:
            session.register_model(workers.critic, CRITIC_DIRECTORY)

    def _resumable_prompts(self) -> HasState:
        """Return what keeps the position in the prompts in a checkpoint."""
        return self._prompts

    async def run(self) -> Outcome:
        """Train until the last step or a stop request; the resulting weights are always saved."""
        return await self._session.run(self._train)

    async def _train(self) -> None:
        session = self._session
        with session.phase("sync"):
            await self._workers.weights.sync(session.step)
        await session.evaluate_if_due()
        while session.goes_on():
            await session.end_step(await self._train_step())

    async def _train_step(self) -> dict[str, float]:
        """Run one step: the drawing at the top of this file.

        All handles are dropped when it returns, so the object store is free again.
        """
        session, workers = self._session, self._workers
        step = session.begin_step()

        with session.phase("generate"):
            sampled = await self._sample_step(step)
        groups = sampled.kept
        rollouts = [group.part.rollouts for group in groups]
        rewards = [group.rewards for group in groups]
        greedy = [group.greedy for group in groups if group.greedy is not None]

        with session.phase("logprobs"):  # the reward pool works meanwhile
            outputs = await self._model_outputs(rollouts)
        with session.phase("reward"):
            await self._sampler.rewards([*groups, *greedy], "training")

        with session.phase("advantages"):
            credited = await workers.advantages.credit(
                StepHandles(
                    rollouts=rollouts,
                    rewards=rewards,
                    old=outputs.old,
                    ref=outputs.ref,
                    values=outputs.values,
                    greedy=[group.rewards for group in greedy],
                    dropped_rollouts=[group.part.rollouts for group in sampled.dropped],
                    dropped_rewards=[group.rewards for group in sampled.dropped],
                    weight_version=session.step,
                )
            )

        updates = await self._updates(step, credited, outputs.ref_hidden)
        with session.phase("sync"):
            sync = await self._sync_weights(step)

        memory = await self._memory()
        metrics = combine([sampled.metrics, credited.metrics, *updates, sync, *memory])
        return with_throughput(values(metrics) | session.measurements())

    async def _sample_step(self, step: int) -> SampledGroups:
        """Return the groups to train on in this step, with rewards that may still be pending."""
        return await self._sampler.sample_step(self._prompts)

    async def _sync_weights(self, step: int) -> MetricMap:
        """Give the weights after this step to the engines."""
        return await self._workers.weights.sync(step)

    async def _memory(self) -> list[MetricMap]:
        """Return what the workers report about themselves."""
        return await asyncio.gather(*(worker.metrics() for worker in self._workers.reporting))

    async def _model_outputs(self, rollouts: Sequence[Handle]) -> _ModelOutputs:
        """Compute each output that is needed; concurrently unless one needs another."""
        policy, reference = self._workers.policy, self._workers.reference
        critic = self._workers.critic
        needs_old = "old_logprobs" in self._needs
        if reference and self._config.algorithm.kl.estimator == "exact":
            ref, hidden = await reference.logprobs_and_hidden(rollouts)
            old, state_values = await asyncio.gather(
                policy.logprobs(rollouts, hidden) if needs_old else _none(),
                critic.values(rollouts) if critic else _none(),
            )
            return _ModelOutputs(old, ref, state_values, hidden)

        old, ref, state_values = await asyncio.gather(
            policy.logprobs(rollouts) if needs_old else _none(),
            reference.logprobs(rollouts) if reference else _none(),
            critic.values(rollouts) if critic else _none(),
        )
        return _ModelOutputs(old, ref, state_values)

    async def _updates(
        self,
        step: int,
        credited: CreditedBatch,
        ref_hidden: Sequence[Handle[HiddenStates | None]],
    ) -> list[MetricMap]:
        """Update the critic, and after its warm-up the policy; write the samples of the step."""
        critic, found = self._workers.critic, []
        if critic:
            with self._session.phase("critic"):
                batch: Handle[Any] = credited.batch  # with a critic always a `TrainBatch`
                found.append(await critic.update(batch))
            if step <= self._config.critic.warmup_steps:
                await self._write_rollouts(step, credited)
                return found

        with self._session.phase("update"):
            found.append(await self._update(step, credited, ref_hidden))
        return found

    async def _update(
        self,
        step: int,
        credited: CreditedBatch,
        ref_hidden: Sequence[Handle[HiddenStates | None]],
    ) -> MetricMap:
        """Train on a batch, and write the samples of the step.

        They are written meanwhile, or afterwards where the update itself estimates the advantages.
        """
        policy = self._workers.policy
        update = policy.update(credited.batch, ref_hidden, self._next_texts())
        if not self._config.algorithm.advantage.recompute:
            metrics, _ = await asyncio.gather(update, self._write_rollouts(step, credited))
            return metrics

        metrics = await update
        await self._write_rollouts(step, credited, await policy.estimated_advantages())
        return metrics

    def _next_texts(self) -> Handle[ExampleBatch] | None:
        """Put the next pretraining texts into the object store; None where none are trained on."""
        if self._texts is None:
            return None
        assert self._workers.put is not None, "workers of a run with texts can store them"
        return self._workers.put(self._texts.next_batch())

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


async def _none() -> Sequence[Handle[Any]]:
    return ()


def with_throughput(numbers: Mapping[str, float]) -> dict[str, float]:
    """Add tokens per second: those that the engines sampled, and those that the update read."""
    sampled = numbers.get("rollout/tokens", 0.0) + numbers.get("rollout/greedy_tokens", 0.0)
    trained = numbers.get("policy/tokens", 0.0)
    return {
        **numbers,
        "throughput/generate": sampled / max(numbers["time/generate"], 1e-9),
        "throughput/update": trained / max(numbers.get("time/update", 0.0), 1e-9),
        "throughput/step": sampled / max(numbers["time/step"], 1e-9),
    }
