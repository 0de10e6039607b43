"""The loop of expert iteration: fine-tuning on the policy's own correct responses.

    prompts --> generate --group by group--> score --> keep the correct, each once
                   ^                                             |
                   +------ sync weights <-- update (SFT epochs) <+

A step is one iteration. It samples from the current policy and goes on training that policy; it
does not start again from the initial weights. With every correct sample kept, the expected loss has
its minimum at the policy restricted to correct responses, pi(y) r(y) / Z with Z = E[r]: for each
problem that the policy solves at all, a policy that always solves it. Where copies are left out,
the minimum is uniform over the correct responses that were found.

Source: Anthony et al. 2017 (arXiv:1705.08439); for language models Zelikman et al. 2022
(arXiv:2203.14465) and Singh et al. 2023 (arXiv:2312.06585).

Large records stay in the object store; this module handles references and small metrics only.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from rlsys.config.expert_iteration import ExpertIterationRunConfig
from rlsys.driver.ports import ExpertIterationWorkers, KeptResponses, PromptSource
from rlsys.driver.sampling import Sampler
from rlsys.driver.session import Session
from rlsys.driver.synchronous_loop import with_throughput
from rlsys.metrics import MetricMap, combine, values
from rlsys.run.observers.observer import Outcome


class NothingLearnedError(RuntimeError):
    """Several steps in a row in which no response was kept."""


class ExpertIterationLoop:
    """Expert iteration of one policy. `run` is the whole of it."""

    def __init__(
        self,
        config: ExpertIterationRunConfig,
        workers: ExpertIterationWorkers,
        prompts: PromptSource,
        sampler: Sampler,
        session: Session,
        rollouts_directory: Path,
    ) -> None:
        self._config = config
        self._workers = workers
        self._prompts = prompts
        self._sampler = sampler
        self._session = session
        self._rollouts_directory = rollouts_directory
        self._empty_steps = 0  # in a row, up to now
        session.register("prompts", prompts)
        session.register("expert", self)
        session.register_model(workers.policy)

    def state(self) -> dict[str, Any]:
        """Return what outlives a step, ready for JSON."""
        return {"empty_steps": self._empty_steps}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._empty_steps = state["empty_steps"]

    async def run(self) -> Outcome:
        """Train until the last step or a stop request; the resulting weights are always saved.

        Raises:
            NothingLearnedError: no response was kept in `expert.max_empty_steps` steps in a row.
        """
        return await self._session.run(self._train)

    async def _train(self) -> None:
        session = self._session
        with session.phase("sync"):
            await self._workers.weights.sync(session.step)
        await session.evaluate_if_due()
        while session.goes_on():
            self._refuse_to_learn_nothing()
            await session.end_step(await self._train_step())

    async def _train_step(self) -> dict[str, float]:
        """Run one step: the drawing at the top of this file."""
        session, workers = self._session, self._workers
        step = session.begin_step()

        with session.phase("generate"):
            sampled = await self._sampler.sample_step(self._prompts)
        with session.phase("reward"):
            await self._sampler.rewards(sampled.kept, "training")
            kept = await workers.filter.choose(
                [group.part.rollouts for group in sampled.kept],
                [group.rewards for group in sampled.kept],
            )
        self._empty_steps = 0 if kept.responses else self._empty_steps + 1

        with session.phase("update"):
            update = await self._update(step, kept)
        with session.phase("sync"):
            sync = await workers.weights.sync(step)

        memory = await asyncio.gather(*(worker.metrics() for worker in workers.reporting))
        metrics = combine([sampled.metrics, kept.metrics, update, sync, *memory])
        return with_throughput(values(metrics) | session.measurements())

    async def _update(self, step: int, kept: KeptResponses) -> MetricMap:
        """Train on the kept responses, and meanwhile write all samples of the step.

        Where none was kept the policy stays as it is, but the step counts in its schedule.
        """
        update, _ = await asyncio.gather(
            self._workers.policy.update(kept.batch), self._write_rollouts(step, kept)
        )
        return update

    async def _write_rollouts(self, step: int, kept: KeptResponses) -> None:
        trainer = self._config.trainer
        every = trainer.save_rollouts_every
        if step in (1, trainer.steps) or (every and step % every == 0):
            path = self._rollouts_directory / f"step_{step:06d}.parquet"
            await self._workers.filter.write_rollouts(kept.sampled, path)

    def _refuse_to_learn_nothing(self) -> None:
        limit = self._config.expert.max_empty_steps
        if not limit or self._empty_steps < limit:
            return
        trainer, samples = self._config.trainer, self._config.generation.samples_per_prompt
        raise NothingLearnedError(
            f"expert.max_empty_steps: in {self._empty_steps} steps in a row none of the "
            f"{trainer.prompts_per_step} x {samples} responses was correct, so nothing was "
            "learned. Read some in the report: the template or the reward may not fit the model. "
            "Raise generation.samples_per_prompt or trainer.prompts_per_step, choose easier "
            "problems (data.where), or start from a fine-tuned model (recipes.sft_math)."
        )
