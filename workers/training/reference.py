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
from rlsys.data.hidden_states import HiddenStates
from rlsys.data.packing import Pack
from workers.training.lm_head import check_packed_for_exact_kl
from workers.training.packed_model import PackResult
from workers.training.rank_worker import CausalLMWorker


class ReferenceWorker(CausalLMWorker):
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
