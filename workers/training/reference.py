"""The frozen reference model of the KL terms."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlsys.config import RunConfig
from rlsys.data.batches import LogprobBatch, RolloutBatch
from rlsys.data.example_stream import ExampleBatch, ReferenceLogprobs
from rlsys.data.hidden_states import HiddenStates
from rlsys.data.packing import Pack
from workers.training.lm_head import check_packed_for_exact_kl
from workers.training.lora import adapters_off
from workers.training.losses import PackColumns
from workers.training.packed_model import PackResult
from workers.training.rank_worker import CausalLMWorker


class ReferencePasses(CausalLMWorker):
    """What a rank of a reference computes."""

    def put_logprobs_and_hidden(self, *parts: RolloutBatch) -> tuple[Any, Any]:
        """Put log-probabilities and hidden states into the object store.

        Return their references. A rank without rows has no hidden states.
        """
        rollouts = RolloutBatch.concatenate(parts)
        positions: list[NDArray[np.int64]] = []
        states: list[Tensor] = []

        def read(pack: Pack, result: PackResult) -> tuple[Tensor]:
            if not pack.is_padding:
                positions.append(pack.flat_positions)
                states.append(result.hidden.cpu())
            return (result.logprobs,)

        rows, (logprobs,) = self.outputs_of_own_rows(rollouts, read)
        batch = LogprobBatch(batch_id=rollouts.batch_id, rows=rows, logprobs=logprobs)
        hidden = None
        if states:
            hidden = HiddenStates.of(
                rollouts.batch_id, np.concatenate(positions), torch.cat(states)
            )
        return ray.put(batch), ray.put(hidden)

    @torch.no_grad()
    def example_logprobs(self, batch: ExampleBatch) -> ReferenceLogprobs:
        """Return the log-probabilities of this rank's responses, summed over learned tokens."""
        rows: list[NDArray[np.int64]] = []
        sums: list[NDArray[np.float32]] = []
        for pack in self.packs_of_sequences(batch.sequences, np.arange(len(batch))):
            logprobs = self.run(pack, 1.0).logprobs
            if pack.is_padding:
                continue
            columns = PackColumns(pack, self.backend.device)
            rows.append(pack.rows)
            sums.append(columns.pad(logprobs).sum(dim=1).cpu().numpy())
        return ReferenceLogprobs(
            rows=np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64),
            logprobs=np.concatenate(sums) if sums else np.zeros(0, dtype=np.float32),
        )

    def put_example_logprobs(self, batch: ExampleBatch) -> Any:
        """Put the result of `example_logprobs` into the object store; return its reference."""
        return ray.put(self.example_logprobs(batch))


class OwnReferenceWorker(ReferencePasses):
    """A rank of a policy that is its own reference where its adapters are off."""

    def put_reference_logprobs(self, *parts: RolloutBatch) -> Any:
        """See `put_logprobs`."""
        with adapters_off(self.backend.module.adapters):
            return self.put_logprobs(*parts)

    def put_reference_logprobs_and_hidden(self, *parts: RolloutBatch) -> tuple[Any, Any]:
        """See `put_logprobs_and_hidden`."""
        with adapters_off(self.backend.module.adapters):
            return self.put_logprobs_and_hidden(*parts)

    def put_reference_example_logprobs(self, batch: ExampleBatch) -> Any:
        """See `put_example_logprobs`."""
        with adapters_off(self.backend.module.adapters):
            return self.put_example_logprobs(batch)


class ReferenceWorker(ReferencePasses):
    """One rank of the frozen reference."""

    role = "reference"

    def __init__(self, config: RunConfig, model_directory: str, rank: int, world_size: int) -> None:
        super().__init__(config, config.reference_role(), model_directory, rank, world_size)

    def setup(self, address: str) -> tuple[str, ...]:
        """See `RankWorker.setup`.

        Raises:
            UnsupportedModelError: the logits would not follow from the hidden states that it sends.
        """
        notes = super().setup(address)
        kl = self.config.algorithm.kl
        if kl.coefficient and kl.estimator == "exact":
            check_packed_for_exact_kl(self.role, packing=self.backend.module.packing)
        return notes
