"""The generation worker: an engine and the version of its weights, in an actor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlsys.data.batches import PromptBatch, RolloutBatch, SamplingParameters
from rlsys.data.sequences import TokenSequences
from rlsys.metrics import Metric, maximum, peak_memory_gib
from rlsys.models.weights import StoredWeights
from workers.generation.engines import make_engine
from workers.generation.engines.engine import SampledGroup
from workers.weight_sync.transports import make_transport

if TYPE_CHECKING:
    from rlsys.config import RunConfig


class GenerationWorker:
    """The Ray actor around one engine."""

    def __init__(self, config: RunConfig, model_directory: str) -> None:
        self._engine = make_engine(config, model_directory)
        self._transport = make_transport(config.sync)
        self._version = -1

    def generate(
        self,
        prompts: PromptBatch,
        positions: Sequence[int],
        sampling: SamplingParameters,
        version: int | None = None,
    ) -> Iterator[tuple[int, int] | RolloutBatch]:
        """Yield two items for each finished group, as a streaming generator of Ray.

        The first is the `RolloutBatch`, the second the prompt's position with the number of sampled
        tokens. So the caller can pass on the references of the large items and fetch the small
        ones, of which each proves that the large one before it is in the object store.

        Args:
            positions: of the prompts in the whole batch.
            version: of the weights that must be installed; None: any.

        Raises:
            RuntimeError: other weights are installed.
        """
        if version not in (None, self._version):
            raise RuntimeError(
                f"weights version {self._version} is installed, not {version}: nothing is sampled"
            )
        for groups in self._engine.generate(prompts.prompts, positions, sampling):
            for group in groups:
                batch = build_rollouts(prompts, [group], sampling, self._version)
                yield batch
                yield (positions[group.index], batch.num_response_tokens)

    def install_weights(self, stored: StoredWeights) -> None:
        """Install weights from where a transport has stored them.

        Raises:
            ValueError: they are older than the installed ones.
        """
        version = stored.manifest.version
        if version < self._version:
            raise ValueError(
                f"weights version {version} is older than the installed {self._version}"
            )
        # Only after the weights are installed, so that a failure does not change the version.
        self._engine.install_weights(self._transport.read(stored))
        self._version = version

    def version(self) -> int:
        """Return the version of the installed weights; -1 before the first sync."""
        return self._version

    def probe_logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        """See `RolloutEngine`."""
        return self._engine.probe_logprobs(sequences)

    def differing_weights(self, stored: StoredWeights) -> list[str]:
        """Return the groups of weights that the engine holds otherwise than they are stored."""
        names = [entry.name for entry in stored.manifest.entries]
        held = self._engine.weight_checksums(names)
        return differing_groups(self._transport.read(stored), held)

    def metrics(self) -> dict[str, Metric]:
        """Return the peak memory of this process or, if it has one, of its GPU."""
        if torch.cuda.is_available():
            return {"memory/generation": maximum(torch.cuda.max_memory_allocated() / 1024**3)}
        return {"memory/generation": maximum(peak_memory_gib())}


def build_rollouts(
    prompts: PromptBatch, groups: Sequence[SampledGroup], sampling: SamplingParameters, version: int
) -> RolloutBatch:
    """Build the rollout batch of some finished groups.

    Args:
        prompts: the prompts that the indices of `groups` refer to.
        version: of the weights.
    """
    # One row per response, in the order of the groups.
    chosen = [prompts.prompts[group.index] for group in groups]
    ids = prompts.group_ids[[group.index for group in groups]]
    rows = [
        (prompt, group_id, response)
        for prompt, group_id, group in zip(chosen, ids, groups, strict=True)
        for response in group.responses
    ]

    sequences = TokenSequences.of(
        [prompt.token_ids for prompt, _, _ in rows],
        [response.token_ids for _, _, response in rows],
        group_ids=[group_id for _, group_id, _ in rows],
    )
    # Prompts have no log-probabilities; their tokens keep 0.
    logprobs = np.zeros(len(sequences.token_ids), dtype=np.float32)
    logprobs[sequences.loss_mask] = np.concatenate([response.logprobs for _, _, response in rows])
    versions = np.full(len(rows), version, dtype=np.int32)
    return RolloutBatch(
        prompts=PromptBatch(batch_id=prompts.batch_id, prompts=tuple(chosen), group_ids=ids),
        sequences=sequences,
        rollout_logprobs=logprobs,
        oldest_weight_version=versions,
        newest_weight_version=versions,
        stop_reasons=np.array([response.stop_reason for _, _, response in rows], dtype=np.int8),
        response_texts=tuple(response.text for _, _, response in rows),
        temperature=sampling.temperature or 1.0,  # greedy log-probabilities are at 1
    )


def differing_groups(
    sent: Iterable[tuple[str, Tensor]],
    held: Mapping[tuple[str, ...], float],
    *,
    tolerance: float = 1e-3,
) -> list[str]:
    """Return the weights whose sums of squares in an engine differ from those that were sent.

    Args:
        held: the sum of each parameter of the engine, by the names of the weights it is made of.
        tolerance: the relative difference that counts as equal.
    """
    sums = {name: float(tensor.float().square().sum()) for name, tensor in sent}

    different = []
    for names, value in held.items():
        expected = sum(sums[name] for name in names)
        if abs(value - expected) > tolerance * max(expected, 1e-12):
            different.append(" + ".join(names))
    return different
