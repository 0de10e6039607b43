"""A batch in groups: places of responses, and statistics of the other responses."""

import torch

from rlsys.algorithms.advantages.grouping import Groups
from rlsys.algorithms.advantages.hierarchical.grouped_batch import (
    Places,
    group_batch,
    others_variance,
)
from rlsys.algorithms.advantages.hierarchical.horizons import Horizons


def test_places_of_groups_of_different_size_in_any_order():
    places = Places.of(Groups.of(torch.tensor([5, 2, 5, 2, 2])))
    assert places.present.tolist() == [[True, True, True], [True, True, False]]
    assert places.index[0].tolist() == [1, 3, 4]
    assert places.index[1, :2].tolist() == [0, 2]
    values = torch.arange(5.0)
    spread = places.spread(values)
    assert spread.tolist() == [[1.0, 3.0, 4.0], [0.0, 2.0, 0.0]]
    assert torch.equal(places.gather(spread, torch.float32), values)
    columns = torch.arange(10.0).reshape(5, 2)
    assert torch.equal(places.gather(places.spread(columns), torch.float32), columns)


def test_the_weight_of_a_response_is_its_norm_with_its_average():
    """Norms (1, 3) average 2, so the weights are (1.5, 2.5); a single token keeps its norm 4."""
    places = Places.of(Groups.of(torch.zeros(2, dtype=torch.int64)))
    alive = torch.tensor([[[True, True], [True, False]]])
    norms = torch.tensor([[[1.0, 3.0], [4.0, 0.0]]], dtype=torch.float64)
    ratios = torch.tensor([[2.0, 3.0], [1.0, 1.0]], dtype=torch.float64)
    rewards = torch.tensor([1.0, 0.0], dtype=torch.float64)
    batch = group_batch(ratios, rewards, norms, alive, places, Horizons.of("final", 2, 1))
    assert batch.weights.tolist() == [[[1.5, 2.5], [4.0, 0.0]]]
    assert batch.mass.tolist() == [[[4.0, 2.0], [4.0, 1.0]]]
    # R - c is 1 and -1, whatever the rewards are measured from.
    assert batch.base.tolist() == [[3.0, -1.0]]


def test_the_variance_of_the_others():
    rewards = torch.tensor([[0.0, 2.0, 4.0, 4.0]], dtype=torch.float64)
    present = torch.ones(1, 4, dtype=torch.bool)
    found = others_variance(rewards, present)[0]
    for i in range(4):
        others = torch.cat([rewards[0, :i], rewards[0, i + 1 :]])
        assert torch.allclose(found[i], others.var(correction=0))
    assert (others_variance(torch.full((1, 4), 0.1, dtype=torch.float64), present) == 0).all()
