"""Weight sync from the policy to the engines through Ray's object store.

After every sync a probe compares the log-probabilities of both sides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rlsys.config import RunConfig
from rlsys.driver.ports import WeightSyncError
from rlsys.metrics import Metric, maximum, mean, total
from rlsys.models.weights import WeightManifest, unpack_weights


class WeightSource(Protocol):
    """The policy group as weight sync needs it."""

    async def export_weights(self, version: int) -> tuple[WeightManifest, list[Any]]: ...

    async def probe_logprobs(
        self, sequences: Sequence[NDArray[np.int32]], temperature: float
    ) -> list[NDArray[np.float32]]: ...


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


class ObjectStoreWeightSync:
    """The `ports.WeightSync` through the object store.

    Rank 0 puts shards into the store; all engines of a node read the same memory.
    """

    def __init__(
        self,
        policy: WeightSource,
        workers: Sequence[Any],
        config: RunConfig,
        probe: Sequence[NDArray[np.int32]],
    ) -> None:
        """Take the two sides of the sync.

        Args:
            workers: the generation actors.
            probe: the sequences on which both sides are compared.
        """
        self._policy = policy
        self._workers = workers
        self._tolerance = difference_tolerance(config)
        self._probe = probe

    async def sync(self, version: int) -> dict[str, Metric]:
        """See `ports.WeightSync`."""
        # The shards are references here; Ray resolves them on the workers' nodes.
        manifest, shards = await self._policy.export_weights(version)
        await asyncio.gather(
            *(worker.install_weights.remote(manifest, *shards) for worker in self._workers)
        )

        metrics = {"sync/bytes": total(manifest.num_bytes)}
        if self._tolerance:
            metrics |= await self._compare(manifest, shards)
        return metrics

    async def _compare(self, manifest: WeightManifest, shards: Sequence[Any]) -> dict[str, Metric]:
        """Compare the log-probabilities of the probe on both sides.

        Raises:
            WeightSyncError: the mean difference of an engine is above the tolerance.
        """
        # The sides take turns: both at once on the same cores take longer.
        trainer = await self._policy.probe_logprobs(self._probe, 1.0)
        engines = await asyncio.gather(
            *(worker.probe_logprobs.remote(self._probe) for worker in self._workers)
        )

        expected = np.concatenate(trainer)
        differences = [np.abs(np.concatenate(engine) - expected) for engine in engines]
        means = [float(difference.mean()) for difference in differences]
        worst = int(np.argmax(means))
        # Written so that NaN is an error.
        if not means[worst] <= self._tolerance:
            raise await self._error(manifest, shards, worst, means[worst])

        num_tokens = sum(difference.size for difference in differences)
        largest = max(float(difference.max()) for difference in differences)
        return {
            "sync/logprob_difference_mean": mean(float(np.mean(means)), num_tokens),
            "sync/logprob_difference_max": maximum(largest),
        }

    async def _error(
        self, manifest: WeightManifest, shards: Sequence[Any], worker: int, difference: float
    ) -> WeightSyncError:
        """Return the error for a generation worker, with the parameter groups that differ."""
        names = [entry.name for entry in manifest.entries]
        held = await self._workers[worker].weight_checksums.remote(names)
        different = differing_groups(manifest, [await shard for shard in shards], held)

        found = ", ".join(different)
        if not different:
            found = (
                "none by their norms, so the engine computes with a stale copy "
                "(suspect the LM head of tied embeddings)"
            )
        return WeightSyncError(
            f"after the sync of weights version {manifest.version}, generation worker {worker} and "
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
