"""Golden numbers and traps of GPG."""

from __future__ import annotations

import pytest
import torch

from rlsys.algorithms.advantages import (
    gpg_advantages,
    grpo_advantages,
)
from tests.support.advantage_examples import inputs


def test_gpg_golden():
    # groups (1, 0) and (1, 1): B = 4, M = 2, alpha = 2
    out = gpg_advantages(inputs([1.0, 0.0, 1.0, 1.0], [0, 0, 1, 1]))
    assert out.advantages[:, 0].tolist() == [1.0, -1.0, 0.0, 0.0]
    assert out.diagnostics == {"alpha": 2.0}
    # every group has a gradient: alpha = 1; none has: 0
    out = gpg_advantages(inputs([1.0, 0.0, 0.0, 3.0], [0, 0, 1, 1]))
    assert out.advantages[:, 0].tolist() == [0.5, -0.5, -1.5, 1.5]
    out = gpg_advantages(inputs([1.0, 1.0, 0.0], [0, 0, 1]))
    assert (out.advantages == 0).all()
    assert out.diagnostics == {"alpha": 1.0}


def test_gpg_is_the_mean_over_the_responses_that_have_a_gradient():
    """The mean of alpha A over the batch is the mean of A over the B - M remaining responses.

    It holds for any fraction of groups of equal rewards.
    """
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 2, (40,), generator=generator).float().tolist()
    groups = [i // 4 for i in range(40)]
    made = inputs(rewards, groups)
    plain = grpo_advantages(made, divide_by_std=False).advantages[:, 0]
    mixed = torch.tensor(
        [len({rewards[j] for j in range(40) if groups[j] == groups[i]}) > 1 for i in range(40)]
    )
    assert 0 < mixed.sum() < 40
    scores = torch.rand(40, generator=generator)
    found = (gpg_advantages(made).advantages[:, 0] * scores).mean()
    assert float(found) == pytest.approx(float((plain * scores)[mixed].mean()), rel=1e-5)
