"""Packing: the place of each token, its predicting position, the balance over ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.data.packing import mini_batch_rows, pack_rows
from tests.support.rollout_examples import random_rollouts, rollouts


def test_golden_shared_prompt():
    batch = rollouts([([10, 11, 12], [[20, 21, 22], [30]])])
    (pack,) = pack_rows(
        batch.sequences, np.arange(2), budget=100, rank=0, ranks=1, shared_prefix_packing=True
    )
    # The prompt once, then the responses without their last tokens: 20 and 21 of the first, nothing
    # of the second.
    assert pack.token_ids.tolist() == [10, 11, 12, 20, 21]
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 4]
    assert pack.targets.tolist() == [20, 21, 22, 30]
    assert pack.predict_positions.tolist() == [
        2,
        3,
        4,
        2,
    ]  # the prompt's last token predicts 20 and 30
    assert pack.flat_positions.tolist() == [
        3,
        4,
        5,
        9,
    ]  # 30 comes after the second copy of the prompt
    assert pack.groups[0].response_lengths == (2, 0)


def test_golden_two_groups_and_a_hole():
    batch = rollouts([([1], [[2, 3, 4]]), ([5, 6], [[7, 8]])], holes={0: [1]})
    (pack,) = pack_rows(
        batch.sequences, np.arange(2), budget=100, rank=0, ranks=1, shared_prefix_packing=True
    )
    # longest unit first, then by row: the groups have 3 packed tokens each
    assert pack.token_ids.tolist() == [1, 2, 3, 5, 6, 7]
    assert pack.position_ids.tolist() == [0, 1, 2, 0, 1, 2]
    assert pack.targets.tolist() == [2, 4, 7, 8]  # 3 was not sampled, but the model still reads it
    assert pack.predict_positions.tolist() == [0, 2, 4, 5]
    assert pack.response_positions.tolist() == [0, 2, 0, 1]


@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 3), st.booleans())
@settings(max_examples=80, deadline=None)
def test_every_sampled_token_is_predicted_exactly_once(
    seed: int, budget: int, ranks: int, share: bool
):
    batch = random_rollouts(seed)
    packs = [
        pack_rows(
            batch.sequences,
            np.arange(len(batch)),
            budget=budget,
            rank=r,
            ranks=ranks,
            shared_prefix_packing=share,
        )
        for r in range(ranks)
    ]
    assert len({len(own) for own in packs}) == 1  # equally many passes on every rank
    real = [pack for own in packs for pack in own if not pack.is_padding]
    flat = np.concatenate([pack.flat_positions for pack in real])
    assert sorted(flat.tolist()) == np.flatnonzero(batch.response_mask).tolist()
    for pack in real:
        assert (batch.token_ids[pack.flat_positions] == pack.targets).all()
        # the token at the predicting position is the predecessor of the target in its own sequence
        assert (
            pack.token_ids[pack.predict_positions] == batch.token_ids[pack.flat_positions - 1]
        ).all()
        assert (
            pack.num_tokens <= budget
            or sum(len(group.response_lengths) for group in pack.groups) == 1
        )


def test_balance_over_ranks():
    batch = random_rollouts(3, groups=12, samples=4)
    loads = []
    for rank in range(2):
        packs = pack_rows(
            batch.sequences,
            np.arange(len(batch)),
            budget=64,
            rank=rank,
            ranks=2,
            shared_prefix_packing=False,
        )
        loads.append(sum(pack.num_tokens for pack in packs if not pack.is_padding))
    assert abs(loads[0] - loads[1]) <= max(
        batch.sequence_lengths
    )  # longest first differs by one sequence at most


def test_mini_batches_are_whole_groups_and_cover_each_epoch():
    batch = random_rollouts(0, groups=6)
    epochs = list(
        mini_batch_rows(batch.sequences, num_mini_batches=3, epochs=2, seed=5, batch_id=0)
    )
    assert len(epochs) == 6
    for epoch in (epochs[:3], epochs[3:]):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(len(batch)))
        for rows in epoch:
            assert len(rows) == 6  # two groups of three
            assert len(set(batch.group_ids[rows])) == 2
    again = list(mini_batch_rows(batch.sequences, num_mini_batches=3, epochs=2, seed=5, batch_id=0))
    assert all((a == b).all() for a, b in zip(epochs, again, strict=True))


def test_mini_batches_must_divide_the_groups():
    batch = random_rollouts(0, groups=6).sequences
    with pytest.raises(
        ValueError, match=r"policy\.num_mini_batches: 4 does not divide the 6 groups"
    ):
        list(mini_batch_rows(batch, num_mini_batches=4, epochs=1, seed=0, batch_id=0))


def test_a_padded_pack_counts_its_padding():
    lengths = [10, 9, 4, 3, 3]
    batch = rollouts([([1, 2], [list(range(5, 5 + length - 1))]) for length in lengths])
    packs = pack_rows(
        batch.sequences,
        np.arange(5),
        budget=24,
        rank=0,
        ranks=1,
        shared_prefix_packing=False,
        padded=True,
    )
    rectangles = [len(pack.rows) * max(group.length for group in pack.groups) for pack in packs]
    assert max(rectangles) <= 24
    assert sorted(row for pack in packs for row in pack.rows.tolist()) == [0, 1, 2, 3, 4]
    assert len(packs) == 2  # 2 x 11, then 3 x 5
