"""The interface of a transport of weights.

        buckets                     StoredWeights                      tensors
rank 0 --------> WeightTransport -----------------> WeightTransport ----------> engine
                (trainer's process)    driver       (worker's process)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol

from torch import Tensor

from rlsys.models.weights import Bucket, StoredWeights


class WeightTransport(Protocol):
    """One end of a transport: that of rank 0, which writes, or of a worker, which reads."""

    def write(
        self, version: int, buckets: Iterator[Bucket], *, keep: Collection[StoredWeights]
    ) -> StoredWeights:
        """Store all buckets, each before the next one is built.

        What was stored before may be deleted, except for `keep`, which workers still read.
        """
        ...

    def read(self, stored: StoredWeights) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors by name; only the bucket that is being read is held.

        They may be shared memory: read them, never write.

        Raises:
            ValueError: what is stored is not what the manifest describes.
        """
        ...
