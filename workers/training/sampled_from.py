"""The base class of a rank of a language model from which engines sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from rlsys.config.engines import ENGINES
from rlsys.data.packing import pack_rows
from rlsys.data.sequences import TokenSequences
from rlsys.models.checkpoint_names import buffer_names, names_without_mapping
from rlsys.models.loading import UnsupportedModelError
from rlsys.models.weights import StoredWeights, buckets_of
from workers.training.model_setup import DTYPES
from workers.training.rank_worker import CausalLMWorker
from workers.weight_sync.transports import WeightTransport, make_transport


class SampledFromWorker(CausalLMWorker):
    """One rank of a model whose weights the engines get.

    After a transfer both sides compute the log-probabilities of a probe.
    """

    _transport: WeightTransport | None = None  # on rank 0, from the first export on

    def check_export(self) -> None:
        """Refuse a model whose weights cannot be exported by the names of its checkpoint.

        Raises:
            UnsupportedModelError: transformers holds several weights of the checkpoint as one
                tensor, and has no mapping back.
        """
        engine = self.config.generation.engine
        if not ENGINES[engine].takes_checkpoint_names:
            return

        model = self.backend.module.model
        names = names_without_mapping(model, self.model_directory)
        if names:
            raise UnsupportedModelError(
                f"generation.engine: {engine!r} cannot follow the training of model type "
                f"{model.config.model_type!r}: transformers holds {names[0]} as one tensor and "
                "has no mapping back to the weights of the checkpoint. "
                "Use --generation.engine transformers."
            )

    def export_weights(
        self, version: int, keep: Sequence[StoredWeights] = ()
    ) -> StoredWeights | None:
        """Gather the weights and store them, bucket by bucket; collective.

        Args:
            keep: older weights that are still read, where they are files.

        Returns:
            On rank 0 the manifest and where the buckets are, None on the other ranks.

        Raises:
            Exception: on rank 0, that the buckets cannot be stored. All ranks have gathered every
                weight by then, so they answer the next call.
        """
        weights = self.backend.weights()
        # All ranks gather the weights; rank 0 alone gets them.
        if self.rank != 0:
            assert not list(weights), "only rank 0 gets weights"
            return None

        if self._transport is None:
            self._transport = make_transport(self.config.sync)
        buckets = buckets_of(
            weights,
            dtype=DTYPES[self.config.generation.dtype],
            bucket_bytes=self.config.sync.bucket_bytes,
            # Both sides read buffers as they are, whatever the dtype of the weights.
            kept=buffer_names(self.backend.module.model),
        )
        try:
            return self._transport.write(version, buckets, keep=keep)
        except Exception:
            # The other ranks gather on to the last weight; without this rank they would wait.
            for _ in weights:
                pass
            raise

    @torch.no_grad()
    def probe_logprobs(
        self, sequences: Sequence[NDArray[np.int32]], temperature: float
    ) -> list[NDArray[np.float32]]:
        """Return [L - 1] log-probabilities for each sequence of L tokens; the first has none.

        Collective; every rank computes the same.
        """
        batch = TokenSequences.of_texts(sequences)
        # Planned as for a single rank: all ranks run all packs.
        packs = pack_rows(
            batch,
            np.arange(len(batch)),
            budget=self.settings.microbatch_tokens,
            rank=0,
            ranks=1,
            shared_prefix_packing=False,
        )

        flat = np.zeros(len(batch.token_ids), dtype=np.float32)
        for pack in packs:
            flat[pack.flat_positions] = self.run(pack, temperature).logprobs.cpu().numpy()
        return [row[1:] for row in np.split(flat, batch.offsets[1:-1])]
