"""The base classes of all ranks: joining, building, packing and running a model.

    RankWorker           a rank of any model
    CausalLMWorker       a rank of a model that returns log-probabilities

A role (policy, reference) is a subclass in a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from rlsys.config import ModelRoleConfig, RunConfig, TrainableRoleConfig
from rlsys.data.batches import LogprobBatch, RolloutBatch
from rlsys.data.hidden_states import HiddenStates, JoinedStates
from rlsys.data.packing import Pack, pack_rows
from rlsys.data.sequences import TokenSequences
from rlsys.metrics import Metric, maximum
from rlsys.plugins import load_plugins
from workers.node_folders import OnSomeNode
from workers.training.backends import build_backend
from workers.training.backends.backend import ModelBackend
from workers.training.lora import describe_trained
from workers.training.model_setup import choose_kernel, prepare_model
from workers.training.packed_attention import SHARING_KERNELS
from workers.training.packed_model import PackResult, PackTensors
from workers.training.process_group import (
    join_process_group,
    open_rendezvous,
    peak_memory_gib,
    use_all_threads,
    use_interface_of,
)


class RankWorker(OnSomeNode):
    """One rank of a model that is distributed over a group of actors."""

    role: str  # in metrics and notes
    backend: ModelBackend[Any]
    shared_prefix_packing: bool

    def __init__(
        self,
        config: RunConfig,
        settings: ModelRoleConfig,
        model_directory: str,
        rank: int,
        world_size: int,
    ) -> None:
        """Take the whole configuration, and the `settings` of this model's role."""
        load_plugins(config.plugins)
        use_all_threads()

        self.config = config
        self.settings = settings
        self.model_directory = Path(model_directory)
        self.rank = rank
        self.world_size = world_size
        self._store: TCPStore | None = None  # on rank 0, from `rendezvous` on

    def rendezvous(self) -> str:
        """Open the store at which the ranks meet, on rank 0, and return its host:port."""
        host = ray.util.get_node_ip_address()
        self._store = open_rendezvous(host, self.world_size)
        return f"{host}:{self._store.port}"

    def setup(self, address: str) -> tuple[str, ...]:
        """Join the other ranks and build the model; collective. Return notes for the user."""
        use_interface_of(ray.util.get_node_ip_address())
        device = join_process_group(address, self.rank, self.world_size, self._store)
        self.backend, padded_because = self.build(device)

        # Shared prompts need the packed forward pass, and a kernel that can mask parts of a group.
        kernel = choose_kernel(self.config.model.attention, device)
        self.shared_prefix_packing = (
            self.settings.shared_prefix_packing
            and self.backend.module.packing
            and kernel in SHARING_KERNELS
        )

        notes = []
        if padded_because is not None:
            notes.append(f"runs padded instead of packed, which is slower ({padded_because})")
        if isinstance(self.settings, TrainableRoleConfig):
            module = self.backend.module
            notes += describe_trained(module.model, module.adapters)
        return tuple(f"{self.role}: {note}" for note in notes)

    def build(self, device: torch.device) -> tuple[ModelBackend[Any], str | None]:
        """Load and shard the model. Return it, and the reason if it cannot run packed."""
        module, verdict = prepare_model(self.config, self.settings, self.model_directory, device)
        backend = build_backend(module, self.settings, device, self.model_directory)
        return backend, verdict.reason

    def packs_of(
        self, rollouts: RolloutBatch, rows: NDArray[np.int64], *, may_share: bool = True
    ) -> list[Pack]:
        """Return this rank's packs of `rows`; see `packs_of_sequences`."""
        return self.packs_of_sequences(rollouts.sequences, rows, may_share=may_share)

    def packs_of_sequences(
        self,
        sequences: TokenSequences,
        rows: NDArray[np.int64],
        *,
        may_share: bool = True,
        whole_groups: bool = False,
    ) -> list[Pack]:
        """Return this rank's packs of `rows`.

        Args:
            may_share: False gives each response its own copy of the prompt.
            whole_groups: keep all responses of a group in one pack.
        """
        return pack_rows(
            sequences,
            rows,
            budget=self.settings.microbatch_tokens,
            rank=self.rank,
            ranks=self.world_size,
            shared_prefix_packing=self.shared_prefix_packing and may_share,
            padded=not self.backend.module.packing,
            whole_groups=whole_groups,
        )

    def run(self, pack: Pack, temperature: float, ref_hidden: JoinedStates | None = None) -> Any:
        """Run the model on one pack; collective."""
        tensors = PackTensors.of(pack, self.backend.device, temperature, ref_hidden)
        return self.backend.forward(tensors)

    @torch.no_grad()
    def outputs_of_own_rows(
        self,
        rollouts: RolloutBatch,
        read: Callable[[Pack, Any], Sequence[Tensor]],
        ref_hidden: JoinedStates | None = None,
    ) -> tuple[NDArray[np.int64], list[NDArray[np.float32]]]:
        """Run the model on a batch; collective.

        Args:
            read: returns arrays [m] of a pack and the model's result for it.
            ref_hidden: the reference's hidden states, for an exact KL.

        Returns:
            The rows of this rank, in the order of its packs, and for each array the values at their
            tokens (prompt and response), one row after the other, 0 outside the mask.
        """
        arrays: list[NDArray[np.float32]] = []
        own_rows: list[int] = []
        for pack in self.packs_of(rollouts, np.arange(len(rollouts))):
            found = read(pack, self.run(pack, rollouts.temperature, ref_hidden))
            arrays = arrays or [np.zeros(len(rollouts.token_ids), dtype=np.float32) for _ in found]
            # A padding pack repeats rows that another pack already has.
            if pack.is_padding:
                continue
            for array, values in zip(arrays, found, strict=True):
                array[pack.flat_positions] = values.cpu().numpy()
            own_rows += pack.rows.tolist()

        rows = np.asarray(own_rows, dtype=np.int64)
        return rows, [_of_rows(array, rows, rollouts.sequence_offsets) for array in arrays]

    def metrics(self) -> dict[str, Metric]:
        """Return the peak memory of this rank as a metric."""
        return {f"memory/{self.role}": maximum(peak_memory_gib(self.backend.device))}

    def shutdown(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


class CausalLMWorker(RankWorker):
    """One rank of a model that returns log-probabilities."""

    returns_squared_score_norms = False

    def logprobs(
        self, *parts: RolloutBatch, ref_hidden: Sequence[HiddenStates | None] = ()
    ) -> LogprobBatch:
        """Return the log-probabilities of this rank's rows of a batch.

        Args:
            parts: the batch, in prompt order.
            ref_hidden: the reference's hidden states; with them the result has an exact KL.
        """
        rollouts = RolloutBatch.concatenate(parts)
        states = JoinedStates(ref_hidden, len(rollouts.token_ids)) if ref_hidden else None

        def read(_: Pack, result: PackResult) -> tuple[Tensor, ...]:
            common = (result.logprobs, result.squared_score_norms)
            return common if result.exact_kl is None else (*common, result.exact_kl)

        rows, (logprobs, norms, *exact_kl) = self.outputs_of_own_rows(rollouts, read, states)
        return LogprobBatch(
            batch_id=rollouts.batch_id,
            rows=rows,
            logprobs=logprobs,
            squared_score_norms=norms if self.returns_squared_score_norms else None,
            exact_kl=exact_kl[0] if exact_kl else None,
        )

    def put_logprobs(self, *parts: RolloutBatch, ref_hidden: Sequence[Any] = ()) -> Any:
        """Put the result of `logprobs` into the object store and return its reference.

        Args:
            ref_hidden: references to `HiddenStates`.
        """
        return ray.put(self.logprobs(*parts, ref_hidden=ray.get(list(ref_hidden))))


def _of_rows(
    flat: NDArray[np.float32], rows: NDArray[np.int64], offsets: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return the values at the tokens of `rows`, one row after the other."""
    values = [flat[offsets[row] : offsets[row + 1]] for row in rows]
    return np.concatenate(values) if values else np.zeros(0, dtype=np.float32)
