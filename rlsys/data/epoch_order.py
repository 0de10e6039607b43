"""The order of the items of a data set, epoch after epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


class EpochOrder:
    """An endless sequence of items: each epoch is a new permutation of all of them.

    Epoch e is always permuted with the seed (seed, e), so a position is the whole state.
    """

    def __init__(self, size: int, *, seed: int, shuffle: bool) -> None:
        assert size > 0, "an empty data set"
        self._size = size
        self._seed = seed
        self._shuffle = shuffle
        self._cached_epoch = -1  # none yet
        self._cached_order = np.empty(0, dtype=np.int64)

    def index(self, position: int) -> int:
        """Return the item at a position of the sequence."""
        epoch, place = divmod(position, self._size)
        return int(self._order(epoch)[place]) if self._shuffle else place

    def _order(self, epoch: int) -> np.ndarray:
        if self._cached_epoch != epoch:
            rng = np.random.default_rng([self._seed, epoch])
            self._cached_order = rng.permutation(self._size)
            self._cached_epoch = epoch
        return self._cached_order


def mini_batches(
    items: int, *, size: int, epochs: int, seed: Sequence[int]
) -> Iterator[NDArray[np.int64]]:
    """Yield the mini-batches of several passes over `items` items, as indices.

    Each epoch is a permutation of its own, divided into as few parts of at most `size` as possible.
    Their sizes differ by at most one, so that no small rest is an update of its own.

    Args:
        seed: epoch e is permuted with the seed (*seed, e).
    """
    parts = -(-items // size)
    for epoch in range(epochs if items else 0):
        order = np.random.default_rng([*seed, epoch]).permutation(items)
        yield from np.array_split(order, parts)
