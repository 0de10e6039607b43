"""The order of the items of a data set, epoch after epoch."""

from __future__ import annotations

import numpy as np


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
