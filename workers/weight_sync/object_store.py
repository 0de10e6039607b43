"""Weight sync from the policy to the engines through Ray's object store.

After every sync a probe compares the log-probabilities of both sides. The weights stay in the store
until the next sync, so that a generation worker that is restarted gets the present ones without
the trainer, which may be in the middle of an update by then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rlsys.config import RunConfig
from rlsys.driver.ports import WeightSyncError
from rlsys.metrics import Metric, maximum, mean, total
from rlsys.models.weights import WeightManifest, unpack_weights
from workers.supervision import ActorPool, SupervisedActor, as_pool


class WeightSource(Protocol):
    """The policy group as weight sync needs it."""

    async def export_weights(self, version: int) -> tuple[WeightManifest, list[Any]]: ...

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

    manifest: WeightManifest
    shards: Sequence[Any]  # references
    expected: NDArray[np.float32] | None  # log-probabilities of the probe; None: no comparison


class ObjectStoreWeightSync:
    """The `ports.WeightSync` through the object store.

    Rank 0 puts shards into the store; all engines of a node read the same memory.
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
        self._probe = probe
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
        # From here on no worker can become ready with older weights.
        present = self._present = asyncio.get_running_loop().create_future()
        try:
            weights = await self._export(version)
        except BaseException as error:
            present.set_exception(RuntimeError(f"the export of the weights failed: {error}"))
            present.exception()  # nobody may be waiting for it
            raise
        present.set_result(weights)

        # Without a pause until both calls are made and the version is set: nothing that samples
        # can come in between.
        calls = [self._pool.submit("install_weights", weights.manifest, *weights.shards)]
        if weights.expected is not None:
            calls.append(self._pool.submit("probe_logprobs", self._probe))
        self._pool.version = version
        return asyncio.ensure_future(self._verified(weights, calls))

    async def _verified(
        self, weights: PresentWeights, calls: Sequence[Awaitable[Answers]]
    ) -> dict[str, Metric]:
        """Wait until the workers have these weights; compare the probe, and return the metrics.

        Args:
            calls: that install the weights and, where there is a comparison, compute the probe.
        """
        *_, answers = await asyncio.gather(*calls)
        metrics = {"sync/bytes": total(weights.manifest.num_bytes)}
        if weights.expected is not None:
            # Where all have died meanwhile, the first that is restarted is asked.
            answers = answers or await self._pool.ask("probe_logprobs", self._probe)
            metrics |= await self._compare(weights, weights.expected, answers)
        return metrics

    async def _export(self, version: int) -> PresentWeights:
        """Let the trainer put its weights into the store, and compute the probe."""
        # The shards are references here; Ray resolves them on the workers' nodes.
        manifest, shards = await self._policy.export_weights(version)
        expected = None
        if self._tolerance:
            expected = np.concatenate(await self._policy.probe_logprobs(self._probe, 1.0))
        return PresentWeights(manifest=manifest, shards=shards, expected=expected)

    async def _bring_up_to_date(self, actor: Any) -> None:
        """Install the present weights on a worker that was restarted, and compare it.

        Before the first sync it has those of the model's files, as all have.

        Raises:
            WeightSyncError: engine and trainer disagree by more than the tolerance.
        """
        while self._present is not None:
            present = self._present
            weights = await asyncio.shield(present)
            await actor.install_weights.remote(weights.manifest, *weights.shards)
            if weights.expected is not None:
                engine = np.concatenate(await actor.probe_logprobs.remote(self._probe))
                difference = float(np.abs(engine - weights.expected).mean())
                if not difference <= self._tolerance:
                    raise await self._error(weights, actor, "a restarted worker", difference)
            if self._present is present:  # else there was a sync meanwhile
                return

    async def _compare(
        self, weights: PresentWeights, expected: NDArray[np.float32], answers: Answers
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
            raise await self._error(weights, worker.present, worker.name, means[worst])

        num_tokens = sum(difference.size for difference in differences)
        largest = max(float(difference.max()) for difference in differences)
        return {
            "sync/logprob_difference_mean": mean(float(np.mean(means)), num_tokens),
            "sync/logprob_difference_max": maximum(largest),
        }

    async def _error(
        self, weights: PresentWeights, actor: Any, name: str, difference: float
    ) -> WeightSyncError:
        """Return the error for a generation worker, with the parameter groups that differ."""
        manifest = weights.manifest
        names = [entry.name for entry in manifest.entries]
        held = await actor.weight_checksums.remote(names)
        different = differing_groups(manifest, [await shard for shard in weights.shards], held)

        found = ", ".join(different)
        if not different:
            found = (
                "none by their norms, so the engine computes with a stale copy "
                "(suspect the LM head of tied embeddings)"
            )
        return WeightSyncError(
            f"after the sync of weights version {manifest.version}, {name} and "
            f"the trainer differ by {difference:.4f} in mean log-probability "
            f"(generation.logprob_difference_tolerance is {self._tolerance}). "
            f"Parameter groups that differ: {found}."
        )


def differing_groups(
    manifest: WeightManifest,
    shards: Sequence[NDArray[np.uint8]],
    held: Mapping[tuple[str, ...], float],
    *,
    tolerance: float = 1e-3,
) -> list[str]:
    """Return the weights whose sums of squares in an engine differ from those that were sent.

    Args:
        held: the sum of each parameter of the engine, by the names of the weights it is made of.
        tolerance: the relative difference that counts as equal.
    """
    sent = {
        name: float(tensor.float().square().sum())
        for name, tensor in unpack_weights(manifest, shards)
    }

    different = []
    for names, value in held.items():
        expected = sum(sent[name] for name in names)
        if abs(value - expected) > tolerance * max(expected, 1e-12):
            different.append(" + ".join(names))
    return different
