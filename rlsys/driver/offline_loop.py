"""The training loop on examples: supervised fine-tuning, preferences, reward models.

examples --batch--> update            every so many steps: held-out loss, and, where answers of
                                      held-out prompts are known, sync --> generate --> reward
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from rlsys.data.example_stream import ExampleBatch, ReferenceLogprobs
from rlsys.driver.evaluation import Evaluator
from rlsys.driver.ports import ExampleSource, Handle, OfflineWorkers, WeightSync
from rlsys.driver.session import Session
from rlsys.metrics import combine, values
from rlsys.run.observers.observer import Outcome


class OfflineLoop:
    """Training of one model on examples. `run` is the whole of it."""

    def __init__(self, workers: OfflineWorkers, examples: ExampleSource, session: Session) -> None:
        self._workers = workers
        self._examples = examples
        self._session = session
        session.register("examples", examples)
        session.register_model(workers.trained)

    async def run(self) -> Outcome:
        """Train until the last step or a stop request; the resulting weights are always saved."""
        return await self._session.run(self._train)

    async def _train(self) -> None:
        session = self._session
        await session.evaluate_if_due()
        while session.goes_on():
            await session.end_step(await self._train_step())

    async def _train_step(self) -> dict[str, float]:
        session, workers = self._session, self._workers
        session.begin_step()
        batch = self._examples.next_batch()
        handle = workers.put(batch)
        reference = ()
        if workers.reference is not None:
            with session.phase("logprobs"):
                reference = await workers.reference.logprobs(handle)
        with session.phase("update"):
            update = await workers.trained.update(handle, reference)

        memory = await asyncio.gather(*(worker.metrics() for worker in workers.reporting))
        metrics = values(combine([update, *memory])) | session.measurements()
        seconds = max(metrics["time/update"], 1e-9)
        size = {
            "batch/examples": float(batch.num_examples),
            "batch/tokens": float(len(batch.sequences.token_ids)),
            "throughput/update": len(batch.sequences.token_ids) / seconds,
        }
        return metrics | size


class OfflineEvaluator:
    """Evaluation of a model that learns from examples.

    The held-out examples have a loss and the objective's own metrics. Held-out prompts with known
    answers are answered, by an engine that gets the live weights first.
    """

    def __init__(
        self,
        workers: OfflineWorkers,
        held_out: ExampleBatch,
        answers: Evaluator | None = None,
    ) -> None:
        """Create an evaluator; `answers` evaluates by sampling, None: nothing is sampled."""
        self._workers = workers
        self._held_out = held_out
        self._answers = answers
        self._syncs = 0
        self._reference: Sequence[Handle[ReferenceLogprobs]] = ()

    async def evaluate(self) -> Mapping[str, float]:
        """Return eval/loss, metrics of the objective, and those of `Evaluator`."""
        workers = self._workers
        batch = workers.put(self._held_out)
        if workers.reference is not None and not self._reference:
            self._reference = await workers.reference.logprobs(batch)  # always the same
        report = values(await workers.trained.evaluate(batch, self._reference))
        if self._answers is None or workers.evaluation is None:
            return report
        await self._sync(workers.evaluation.weights)
        return report | await self._answers.evaluate()

    async def _sync(self, weights: WeightSync) -> None:
        # Engines refuse older weights than theirs; evaluations are counted from the run's start.
        self._syncs += 1
        await weights.sync(self._syncs)
