"""The groups that dynamic sampling keeps (DAPO)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rlsys.config.algorithm import GroupFilter
from rlsys.data.batches import RewardBatch


def kept_responses(
    rewards: RewardBatch, group_ids: NDArray[np.int64], by: GroupFilter
) -> NDArray[np.bool_]:
    """Return [B] which responses belong to a group that dynamic sampling keeps.

        accuracy    0 < number of correct responses < G
        reward      the total rewards of the group are not all equal

    Source: Yu et al. 2025, DAPO, equation 11 (arXiv:2503.14476), is `accuracy`.

    Conventions: a response is correct where its accuracy, the value of the first reward function,
    is at least 0.5. The other rewards do not count then: a group of wrong responses that differ in
    a length penalty is not kept. A response without a reward (NaN) is not compared.

    Example: a group of accuracies (0, 0) and rewards (0, -1) is kept by `reward` and not by
    `accuracy`.
    """
    values = rewards.correct if by == "accuracy" else rewards.rewards
    kept = np.zeros(len(values), dtype=np.bool_)
    for group in np.unique(group_ids):
        members = group_ids == group
        compared = values[members & rewards.scored]
        kept[members] = len(compared) > 1 and compared.max() != compared.min()
    return kept


def keeps_group(rewards: RewardBatch, by: GroupFilter) -> bool:
    """Return whether dynamic sampling keeps the group whose rewards these are."""
    one_group = np.zeros(len(rewards), dtype=np.int64)
    return bool(kept_responses(rewards, one_group, by).all())
