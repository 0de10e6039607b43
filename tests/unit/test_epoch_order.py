"""Mini-batches of several passes over a batch."""

import numpy as np
import pytest

from rlsys.data.epoch_order import mini_batches


@pytest.mark.parametrize(
    ("items", "size", "sizes"),
    [(10, 4, [4, 3, 3]), (8, 4, [4, 4]), (3, 8, [3]), (9, 8, [5, 4]), (1, 1, [1]), (0, 4, [])],
)
def test_an_epoch_is_divided_evenly_into_as_few_parts_as_possible(
    items: int, size: int, sizes: list[int]
):
    parts = list(mini_batches(items, size=size, epochs=1, seed=(0,)))
    assert [len(part) for part in parts] == sizes
    assert sorted(np.concatenate([*parts, np.zeros(0, int)]).tolist()) == list(range(items))


def test_each_epoch_and_each_batch_has_an_order_of_its_own_which_the_seed_decides():
    def orders(*seed: int) -> list[list[int]]:
        parts = list(mini_batches(50, size=25, epochs=2, seed=seed))
        return [np.concatenate(parts[:2]).tolist(), np.concatenate(parts[2:]).tolist()]

    first = orders(0, 0)
    assert first[0] != first[1]
    assert orders(0, 0) == first
    assert orders(0, 1) != first
    assert orders(1, 0) != first
