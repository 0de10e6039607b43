"""Weight sync from the policy to the engines, by any transport.

After a sync a probe compares the log-probabilities of both sides. What was sent stays stored until
the next sync, so that a generation worker that is restarted gets the present weights without the
trainer, which may be in the middle of an update by then. That is memory of the object store, or
space on the disk, for one version of the weights in the precision of the engines; no process holds
them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rlsys.config import RunConfig
from rlsys.driver.ports import WeightSyncError
from rlsys.metrics import Metric, maximum, mean, total
from rlsys.models.weights import StoredWeights
from workers.supervision import ActorPool, SupervisedActor, as_pool


class WeightSource(Protocol):
    """The policy group as weight sync needs it."""

    async def export_weights(
        self, version: int, keep: Sequence[StoredWeights] = ()
    ) -> StoredWeights: ...

    async def probe_logprobs(
        self, sequences: Sequence[NDArray[np.int32]], temperature: float
    ) -> list[NDArray[np.float32]]: ...


Answers = list[tuple[SupervisedActor, Any]]  # of generation workers

# Mean log-prob differences measured with SmolLM2-135M on prompts are 2e-5 in float32 and 0.045 in
# bfloat16, steady over steps. A stale LM head gives 0.2, and the difference grows.
DEFAULT_TOLERANCE = {"float32": 0.01, "bfloat16": 0.15}


def difference_tolerance(config: RunConfig) -> float:
    """Return the mean log-prob difference that a sync tolerates.

    It is `generation.logprob_difference_tolerance`; if that is null, a bound on rounding errors.
    """
    configured = config.generation.logprob_difference_tolerance
    if configured is not None:
        return configured

    # The side with the lower precision determines the rounding.
    dtypes = (config.generation.dtype, config.policy.compute_dtype)
    return DEFAULT_TOLERANCE["bfloat16" if "bfloat16" in dtypes else "float32"]


@dataclass(frozen=True, kw_only=True)
class PresentWeights:
    """The weights of the last sync, with what proves that an engine has them."""

    stored: StoredWeights
    # Log-probabilities of the probe, which the trainer may still compute; None: no comparison.
    expected: asyncio.Task[NDArray[np.float32]] | None


@dataclass(frozen=True, kw_only=True)
class _SentWeights:
    """Weights on their way into the engines."""

    stored: StoredWeights
    installed: asyncio.Future[Answers]
    expected: asyncio.Task[NDArray[np.float32]] | None  # the probe of the trainer
    answers: asyncio.Future[Answers] | None  # the probe of the engines


class EngineWeightSync:
    """The `ports.WeightSync` of a policy and the generation workers.

    rank 0 --buckets--> store --buckets--> engines
       |                                      |
       +---- log-probs of the probe, compared +
    """

    def __init__(
        self,
        policy: WeightSource,
        workers: ActorPool | Sequence[SupervisedActor | Any],
        config: RunConfig,
        probe: Sequence[NDArray[np.int32]],
    ) -> None:
        """Take the two sides of the sync.

        Args:
            workers: the generation actors; a pool that also samples checks the version there.
            probe: the sequences on which both sides are compared.
        """
        self._policy = policy
        self._pool = as_pool(workers)
        self._tolerance = difference_tolerance(config)
        self._probe_every = config.generation.probe_every
        self._probe = probe
        self._syncs = 0
        self._unproven = False  # whether a restarted worker has weights that were not compared
        self._read: list[StoredWeights] = []  # by workers, at this moment
        # None before the first sync; pending while the trainer exports.
        self._present: asyncio.Future[PresentWeights] | None = None
        for worker in self._pool.members:
            worker.prepare_with(self._bring_up_to_date)

    async def sync(self, version: int) -> dict[str, Metric]:
        """See `ports.WeightSync`.

        A worker that dies meanwhile gets these weights when it is restarted.
        """
        return await (await self.publish(version))

    async def publish(self, version: int) -> Awaitable[dict[str, Metric]]:
        """See `ports.WeightPublisher`; workers answer the calls that they get in their order."""
        start = time.perf_counter()
        # From here on no worker can become ready with older weights.
        present = self._present = asyncio.get_running_loop().create_future()
        try:
            stored = await self._policy.export_weights(version, tuple(self._read))
        except BaseException as error:
            present.set_exception(RuntimeError(f"the export of the weights failed: {error}"))
            present.exception()  # nobody may be waiting for it
            raise
        metrics = {
            "sync/bytes": total(stored.manifest.num_bytes),
            "time/sync_export": total(time.perf_counter() - start),
        }

        expected = None
        if self._is_probed():
            # The trainer computes the probe while the engines load.
            expected = asyncio.create_task(self._trainers_probe())
            # It gets this call before that of the next update, whatever the caller does next.
            await asyncio.sleep(0)
        present.set_result(PresentWeights(stored=stored, expected=expected))

        # Without a pause until all calls are made and the version is set: nothing that samples can
        # come in between.
        self._read.append(stored)
        installed = asyncio.ensure_future(self._pool.submit("install_weights", stored))
        answers = None
        if expected is not None:
            answers = asyncio.ensure_future(self._pool.submit("probe_logprobs", self._probe))
        self._pool.version = version
        sent = _SentWeights(stored=stored, installed=installed, expected=expected, answers=answers)
        return asyncio.ensure_future(self._verified(sent, metrics))

    async def _verified(self, sent: _SentWeights, metrics: dict[str, Metric]) -> dict[str, Metric]:
        """Wait until the workers have these weights; compare the probe, and return the metrics."""
        start = time.perf_counter()
        try:
            await sent.installed
            loaded = time.perf_counter()
            metrics = metrics | {"time/sync_load": total(loaded - start)}
            if sent.expected is not None and sent.answers is not None:
                answers, expected = await asyncio.gather(sent.answers, sent.expected)
                # Where all have died meanwhile, the first that is restarted is asked.
                answers = answers or await self._pool.ask("probe_logprobs", self._probe)
                metrics |= await self._compare(sent.stored, expected, answers)
                metrics["time/sync_probe"] = total(time.perf_counter() - loaded)
        except BaseException:
            _give_up(sent.expected)
            _give_up(sent.answers)
            raise
        finally:
            self._read.remove(sent.stored)
        return metrics

    def _is_probed(self) -> bool:
        """Count a sync, and return whether it is compared.

        Every `probe_every`-th is, from the first on, and the next one after a restarted worker got
        weights that no probe has proven.
        """
        due = self._syncs % self._probe_every == 0 or self._unproven
        self._syncs += 1
        if not self._tolerance or not due:
            return False
        self._unproven = False
        return True

    async def _trainers_probe(self) -> NDArray[np.float32]:
        return np.concatenate(await self._policy.probe_logprobs(self._probe, 1.0))

    async def _bring_up_to_date(self, actor: Any) -> None:
        """Install the present weights on a worker that was restarted, and compare it.

        Before the first sync it has those of the model's files, as all have.

        Raises:
            WeightSyncError: engine and trainer disagree by more than the tolerance.
        """
        while self._present is not None:
            present = self._present
            weights = await asyncio.shield(present)
            # From here on a sync that begins does not delete them.
            self._read.append(weights.stored)
            try:
                await self._install_and_compare(actor, weights)
            finally:
                self._read.remove(weights.stored)
            if self._present is present:  # else there was a sync meanwhile
                return

    async def _install_and_compare(self, actor: Any, weights: PresentWeights) -> None:
        await actor.install_weights.remote(weights.stored)
        if weights.expected is None:
            self._unproven = True
            return
        expected = await asyncio.shield(weights.expected)
        engine = np.concatenate(await actor.probe_logprobs.remote(self._probe))
        difference = float(np.abs(engine - expected).mean())
        if not difference <= self._tolerance:
            raise await self._error(weights.stored, actor, "a restarted worker", difference)

    async def _compare(
        self, stored: StoredWeights, expected: NDArray[np.float32], answers: Answers
    ) -> dict[str, Metric]:
        """Compare the log-probabilities of the probe on both sides.

        Raises:
            WeightSyncError: the mean difference of an engine is above the tolerance.
        """
        differences = [np.abs(np.concatenate(engine) - expected) for _, engine in answers]
        means = [float(difference.mean()) for difference in differences]
        worst = int(np.argmax(means))
        # Written so that NaN is an error.
        if not means[worst] <= self._tolerance:
            worker, _ = answers[worst]
            raise await self._error(stored, worker.present, worker.name, means[worst])

        num_tokens = sum(difference.size for difference in differences)
        largest = max(float(difference.max()) for difference in differences)
        return {
            "sync/logprob_difference_mean": mean(float(np.mean(means)), num_tokens),
            "sync/logprob_difference_max": maximum(largest),
        }

    async def _error(
        self, stored: StoredWeights, actor: Any, name: str, difference: float
    ) -> WeightSyncError:
        """Return the error for a generation worker, with the parameter groups that differ."""
        different = await actor.differing_weights.remote(stored)
        found = ", ".join(different)
        if not different:
            found = (
                "none by their norms, so the engine computes with a stale copy "
                "(suspect the LM head of tied embeddings)"
            )
        return WeightSyncError(
            f"after the sync of weights version {stored.manifest.version}, {name} and "
            f"the trainer differ by {difference:.4f} in mean log-probability "
            f"(generation.logprob_difference_tolerance is {self._tolerance}). "
            f"Parameter groups that differ: {found}."
        )


def _give_up(task: asyncio.Future[Any] | None) -> None:
    """End a task whose result nobody needs any more."""
    if task is not None:
        task.cancel()
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
