"""Weights through Ray's object store: written once, read by all workers of a node in place."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import ray
from torch import Tensor

from rlsys.models.weights import Bucket, StoredWeights, WeightManifest, unpack_weights


class ObjectStoreTransport:
    """The `WeightTransport` whose parts are object references.

    The store holds a version for as long as someone holds its references.
    """

    def write(
        self, version: int, buckets: Iterator[Bucket], *, keep: Collection[StoredWeights]
    ) -> StoredWeights:
        """See `WeightTransport`. References keep what is still read, so `keep` is not needed."""
        entries, references = [], []
        for bucket in buckets:
            # Each array is copied into the store once; a cast has made no other copy than its own.
            references.append(ray.put(bucket.arrays))
            entries.append(bucket.entries)
            del bucket  # before the next one is built
        return StoredWeights(WeightManifest(version=version, buckets=tuple(entries)), references)

    def read(self, stored: StoredWeights) -> Iterator[tuple[str, Tensor]]:
        """See `WeightTransport`."""
        # Fetched one by one, so that another node needs room for one bucket only.
        yield from unpack_weights(stored.manifest, map(ray.get, stored.parts))
