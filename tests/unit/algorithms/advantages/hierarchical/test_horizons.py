"""The horizons of a position, and the ratios up to them."""

from __future__ import annotations

import pytest
import torch

from rlsys.algorithms.advantages import (
    AdvantageInputs,
    hierarchical_advantages,
)
from rlsys.algorithms.advantages.hierarchical.horizons import Horizons


def test_layers_are_where_the_ratios_are():
    """On the meta device, which computes nothing and refuses to mix."""
    meta = torch.device("meta")
    horizons = Horizons.of("blocks", 9, 4, meta)
    ratios, positions = (
        torch.empty(2, 3, 9, device=meta),
        torch.empty(9, dtype=torch.int64, device=meta),
    )
    assert (
        horizons.features(ratios, positions).device
        == horizons.kernel(ratios, positions, ratios.transpose(1, 2)).device
        == meta
    )


def test_all_layers_of_a_long_response_are_refused():
    long = torch.zeros(2, 600)
    made = AdvantageInputs(
        rewards=torch.tensor([0.0, 1.0]),
        response_mask=long == 0,
        group_ids=torch.zeros(2, dtype=torch.int64),
        rollout_logprobs=long,
        old_logprobs=long,
        squared_score_norms=long,
    )
    with pytest.raises(ValueError, match="'all' takes at most 512 tokens, these are 600"):
        hierarchical_advantages(made, horizons="all")
