"""The baseline network: unbiased on batches it has not seen, and a gain once it has learned."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlsys.algorithms.advantages import AdvantageInputs, hierarchical_advantages
from rlsys.algorithms.advantages.hierarchical.baseline_network import (
    BaselineNetwork,
    BaselineRegression,
    HeldOutGain,
)
from rlsys.algorithms.advantages.hierarchical.horizons import Horizons
from tests.support.enumerable_policy import Enumerated

HORIZONS = ("final", "current", "current_and_final", "blocks", "all")


class Informed:
    """An enumerated policy with a random hidden state for each prefix."""

    def __init__(
        self, seed: int, horizons: str, size: tuple[int, int] = (2, 3), *, trained: bool = True
    ):
        self.made = Enumerated(seed, end_token=True, size=size)
        self.span = size[1]
        self.parameters: dict[str, Any] = {
            "horizons": horizons,
            "block_size": 2,
            "max_tokens": self.span,
            "solver": "network",
        }
        generator = self.made.generator
        self.states = torch.randn(self.made.space.num_rows, 5, generator=generator)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            number = Horizons.of(horizons, self.span, 2).most
            self.network = BaselineNetwork(5, number, width=16, span=self.span)
        if trained:  # anything but 0
            self.network.outward.weight.data.normal_(generator=generator)

    def outputs(self, drawn: Tensor, shift: int = 0) -> Tensor:
        """[B, T, p]; `shift` 1 takes the state after the token, which knows it."""
        rows = self.made.space.rows[drawn].roll(-shift, dims=1)
        positions = torch.arange(self.span).expand(len(drawn), -1).flatten()
        return self.network(self.states[rows].flatten(0, 1), positions).unflatten(0, rows.shape)

    def inputs(self, drawn: Tensor, groups: int = 1, shift: int = 0) -> AdvantageInputs:
        made = self.made
        ids = torch.arange(groups).repeat_interleave(len(drawn) // groups)
        plain = made.space.inputs(drawn, made.rewards, made.rollout, made.old, ids)
        return replace(plain, auxiliary=self.outputs(drawn, shift).detach())

    def expectation(self, size: int, shift: int = 0) -> Tensor:
        """Return [P] the exact expectation of the estimated gradient.

        It is a sum over every group of `size` that can be drawn, in every order.
        """
        made = self.made
        total = torch.zeros_like(made.gradient)
        for group in itertools.product(range(len(made.space.tokens)), repeat=size):
            drawn = torch.tensor(group)
            weight = hierarchical_advantages(
                self.inputs(drawn, shift=shift), diagnostics=False, **self.parameters
            ).advantages
            total += (
                made.probability[drawn].prod()
                * torch.einsum("gt,gtp->p", weight.double(), made.scores[drawn])
                / size
            )
        return total

    def draw(self, number: int) -> Tensor:
        return torch.multinomial(
            self.made.probability, number, replacement=True, generator=self.made.generator
        )


@pytest.mark.parametrize("horizons", HORIZONS)
def test_unbiased_whatever_the_network_says(horizons: str):
    informed = Informed(4, horizons)
    exact = informed.made.gradient
    assert (
        informed.expectation(3) - exact
    ).abs().max() < 1e-6 * exact.abs().max()  # advantages are float32


def test_the_state_after_the_token_would_be_biased():
    informed = Informed(4, "current")
    assert (
        informed.expectation(3, shift=1) - informed.made.gradient
    ).abs().max() > 0.01 * informed.made.gradient.abs().max()


def test_untrained_it_is_the_leave_one_out_mean_and_so_it_is_on_policy():
    informed = Informed(5, "current_and_final")
    drawn = informed.inputs(informed.draw(24), groups=4)
    off = hierarchical_advantages(
        drawn, scope="group", ridge=1e12
    ).advantages  # a ridge that leaves nothing of the horizons
    for none in (None, torch.zeros_like(drawn.auxiliary)):  # type: ignore[arg-type]
        out = hierarchical_advantages(
            replace(drawn, auxiliary=none), **informed.parameters
        ).advantages
        assert torch.allclose(out, off, atol=1e-5)
    same = replace(drawn, rollout_logprobs=drawn.old_logprobs)
    assert torch.equal(
        hierarchical_advantages(same, **informed.parameters).advantages,
        hierarchical_advantages(replace(same, auxiliary=None), **informed.parameters).advantages,
    )
    assert not torch.allclose(
        hierarchical_advantages(drawn, **informed.parameters).advantages, off, atol=1e-2
    )
    equal = replace(drawn, rewards=torch.ones(24))
    assert (hierarchical_advantages(equal, **informed.parameters).advantages == 0).all()


@pytest.mark.parametrize("horizons", HORIZONS)
def test_what_it_learns_is_the_second_moment_of_the_weights_in_use(horizons: str):
    informed = Informed(6, horizons, (3, 4))
    # responses of a group need not be adjacent
    order = torch.randperm(20, generator=informed.made.generator)
    plain = informed.inputs(informed.draw(20), groups=4)
    names = (
        "rewards",
        "response_mask",
        "group_ids",
        "rollout_logprobs",
        "old_logprobs",
        "squared_score_norms",
        "auxiliary",
    )
    drawn = replace(plain, **{name: getattr(plain, name)[order] for name in names})
    out = hierarchical_advantages(drawn, **informed.parameters)
    assert out.auxiliary_targets is not None
    assert drawn.auxiliary is not None
    regression = BaselineRegression.of_columns(out.auxiliary_targets)

    direct = torch.where(
        drawn.response_mask, regression.base - regression.corrections(drawn.auxiliary), 0
    )
    assert torch.allclose(direct, out.advantages.float(), atol=1e-5)
    # n_t: the norm at t and the average norm of the response
    assert drawn.squared_score_norms is not None
    norms = torch.where(drawn.response_mask, drawn.squared_score_norms, 0.0)
    means = norms.sum(1, keepdim=True) / drawn.response_mask.sum(1, keepdim=True).clamp(min=1)
    smoothed = torch.where(drawn.response_mask, (norms + means) / 2, 0.0)
    expected = float((smoothed * out.advantages.double() ** 2).sum())
    assert float(regression.loss(drawn.auxiliary)) == pytest.approx(expected, rel=1e-5)


def test_once_it_has_learnt_the_gradient_varies_less_than_with_the_leave_one_out_mean():
    """Train on some batches and measure on others.

    The gradients are the true ones of 2,000 sampled groups of 8 of the enumerated policy.
    """
    informed = Informed(7, "current_and_final", (3, 4), trained=False)
    made = informed.made
    optimizer = torch.optim.Adam(informed.network.parameters(), lr=1e-2)
    for _ in range(150):
        drawn = informed.draw(256)
        targets = hierarchical_advantages(
            informed.inputs(drawn, groups=32), diagnostics=False, **informed.parameters
        ).auxiliary_targets
        assert targets is not None
        loss = BaselineRegression.of_columns(targets).loss(informed.outputs(drawn))
        (loss / len(drawn)).backward()
        optimizer.step()
        optimizer.zero_grad()
    drawn = informed.draw(16000)
    with_network = informed.inputs(drawn, groups=2000)
    errors = []
    for inputs in (with_network, replace(with_network, auxiliary=None)):
        weight = hierarchical_advantages(
            inputs, diagnostics=False, **informed.parameters
        ).advantages.double()
        means = (
            torch.einsum("bt,btp->bp", weight, made.scores[drawn]).unflatten(0, (2000, 8)).mean(1)
        )
        errors.append(float((means - made.gradient).square().sum(1).mean()))
        bias = (means.mean(0) - made.gradient).norm() / (errors[-1] / 2000) ** 0.5
        assert bias < 2  # in units of its standard error
    assert errors[0] < 0.9 * errors[1]  # 0.84 when this was written


def test_strength_is_earned_on_unseen_batches():
    gain = HeldOutGain()
    assert gain.shrinkage == 0
    assert gain.after(0.0, 0.0) == gain  # a network that says nothing yet
    assert gain.after(1.0, 4.0).shrinkage == 0.25
    assert gain.after(-1.0, 4.0).shrinkage == 0
    assert gain.after(9.0, 4.0).shrinkage == 1
    assert gain.after(1.0, 4.0).after(4.0, 4.0, keep=0.5).shrinkage == pytest.approx(4.5 / 6)


@pytest.mark.parametrize(
    ("change", "parameters", "message"),
    [
        (
            {"auxiliary": torch.zeros(6, 3, 5)},
            {},
            "auxiliary: .* Build the network for the same",
        ),
        ({}, {"ridge": 1.0}, "ridge: solver 'network' does not use a ridge"),
        (
            {},
            {"horizons": "blocks", "max_tokens": None},
            "max_tokens: a network has one output per horizon",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], parameters: dict[str, Any], message: str):
    informed = Informed(8, "current_and_final")
    drawn = replace(informed.inputs(informed.draw(6)), **change)
    with pytest.raises(ValueError, match=message):
        hierarchical_advantages(drawn, **(informed.parameters | parameters))
