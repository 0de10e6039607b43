"""PPO with exact values over an enumerated policy, and its fixed point with entropy rewards."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rlsys.algorithms.advantages import AdvantageInputs, AdvantageOutput, gae_advantages
from rlsys.algorithms.entropy import entropy_rewards
from rlsys.algorithms.loss_aggregation import aggregate_loss
from rlsys.algorithms.policy_objectives import PolicyObjectiveInputs, policy_objective
from tests.support.enumerable_policy import ResponseSpace

EXACT = 1e-10


@dataclass(frozen=True)
class Setting:
    """All responses over 3 tokens of length at most 3; those without token 0 are truncated."""

    space: ResponseSpace
    logits: Tensor  # [rows, V]
    rewards: Tensor  # [S]

    @staticmethod
    def random(seed: int) -> Setting:
        generator = torch.Generator().manual_seed(seed)
        space = ResponseSpace.of(3, 3, end_token=True)
        rewards = torch.rand(len(space.tokens), generator=generator, dtype=torch.float64)
        return Setting(space, space.random_logits(generator), rewards)

    @property
    def truncated(self) -> Tensor:
        """[S] true where the response has no end token."""
        return ~((self.space.tokens == 0) & self.space.mask).any(1)

    def given_prefix(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return [S, L] the mean of `targets` [S, L] over all responses with the same prefix.

        This is what a critic that fits its targets perfectly returns at each token.
        """
        space = self.space
        weights = space.probabilities(logits)[:, None] * space.mask
        total = torch.zeros(space.num_rows, dtype=torch.float64)
        sums = total.index_add(0, space.rows.flatten(), (weights * targets).flatten())
        counts = total.index_add(0, space.rows.flatten(), weights.flatten())
        return torch.where(space.mask, (sums / counts.clamp(min=1e-300))[space.rows], 0.0)

    def values(self) -> Tensor:
        """Return [S, L] the exact expected reward given the prefix."""
        return self.given_prefix(self.logits, self.rewards[:, None].expand(-1, self.space.length))

    def advantages(self, values: Tensor | None, **parameters: float) -> AdvantageOutput:
        return gae_advantages(self.inputs(self.logits, values), **parameters)

    def inputs(self, logits: Tensor, values: Tensor | None, alpha: float = 0.0) -> AdvantageInputs:
        logprobs = self.space.logprobs(logits)
        return AdvantageInputs(
            rewards=self.rewards,
            response_mask=self.space.mask,
            group_ids=torch.arange(len(self.rewards)),
            values=values,
            truncated=self.truncated,
            token_rewards=entropy_rewards(logprobs, self.space.mask, alpha) if alpha else None,
        )

    def ppo_gradient(self, advantages: Tensor) -> Tensor:
        """Return [rows, V] minus the expected gradient of PPO's loss, through autograd."""
        live = self.logits.clone().requires_grad_()
        objective = policy_objective(
            PolicyObjectiveInputs(
                logprobs=self.space.logprobs(live),
                old_logprobs=self.space.logprobs(self.logits),
                advantages=advantages,
                response_mask=self.space.mask,
            ),
            ratio="token",
            weight="ppo_clip",
        )
        probabilities = self.space.probabilities(self.logits)
        # One response at a time, weighted by its probability: the expectation of the loss.
        weighted = objective.token_losses * probabilities[:, None] * len(probabilities)
        loss = aggregate_loss(weighted, self.space.mask, "sequence_sum")
        (gradient,) = torch.autograd.grad(loss, live)
        return -gradient

    def second_moment(self, advantages: Tensor) -> float:
        """Return the expected squared length of the gradient of one response."""
        gradients = torch.einsum("sl,slp->sp", advantages, self.space.scores(self.logits))
        return float(self.space.probabilities(self.logits) @ gradients.square().sum(1))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
def test_with_exact_values_ppo_has_reinforces_gradient(seed: int, lam: float):
    """In expectation, for every lambda, and with a smaller second moment."""
    setting = Setting.random(seed)
    exact = setting.space.gradient(setting.logits, setting.rewards).view_as(setting.logits)
    advantages = setting.advantages(setting.values(), lam=lam).advantages
    assert float((setting.ppo_gradient(advantages) - exact).abs().max()) < EXACT

    plain = setting.advantages(None).advantages
    assert float((setting.ppo_gradient(plain) - exact).abs().max()) < EXACT
    assert setting.second_moment(advantages) < 0.8 * setting.second_moment(plain)


def test_wrong_values_bias_the_gradient_only_with_lambda_below_one():
    setting = Setting.random(2)
    exact = setting.space.gradient(setting.logits, setting.rewards).view_as(setting.logits)
    noise = torch.randn(setting.space.num_rows, generator=torch.Generator().manual_seed(3))
    wrong = setting.values() + noise.double()[setting.space.rows]

    def error(lam: float) -> float:
        found = setting.ppo_gradient(setting.advantages(wrong, lam=lam).advantages)
        return float((found - exact).norm() / exact.norm())

    assert error(1.0) < EXACT
    assert error(0.5) > 0.1


def test_a_bootstrap_counts_rewarded_truncated_responses_too_high():
    setting = Setting.random(4)
    exact = setting.space.gradient(setting.logits, setting.rewards).view_as(setting.logits)
    output = setting.advantages(setting.values(), bootstrap_truncated=True)
    found = setting.ppo_gradient(output.advantages)
    assert float((found - exact).norm() / exact.norm()) > 0.1

    # The critic's own targets are above the rewards, so its values would grow from step to step.
    assert output.returns is not None
    assert (output.returns[setting.truncated] > setting.rewards[setting.truncated][:, None]).all()


@pytest.mark.parametrize("lam", [1.0, 0.3])
def test_at_the_maximum_entropy_policy_soft_advantages_vanish(lam: float):
    """With pi ~ exp(R / alpha) and V = E[R - alpha log pi from t on], every A_t is 0.

    The critic's targets contain -alpha log pi, since it is part of the tokens' rewards.
    """
    setting, alpha = Setting.random(5), 0.4
    best = maximum_entropy_logits(setting, alpha)
    targets = gae_advantages(setting.inputs(best, None, alpha)).returns
    assert targets is not None
    soft_values = setting.given_prefix(best, targets)

    output = gae_advantages(setting.inputs(best, soft_values, alpha), lam=lam)
    assert float(output.advantages.abs().max()) < EXACT
    # V of the prompt is alpha log Z.
    log_z = (setting.rewards / alpha).logsumexp(0)
    assert float(soft_values[0, 0]) == pytest.approx(alpha * float(log_z), abs=EXACT)


def test_soft_policy_iteration_ends_at_the_maximum_entropy_policy():
    """Fit V to its targets, then pi ~ exp(Q / alpha): after three rounds it is exact.

    Q(s_t, y_t) is the mean target after the token, plus alpha log pi(y_t), which the target of the
    token itself contains.
    """
    setting, alpha = Setting.random(6), 0.4
    space, logits = setting.space, setting.logits
    best = maximum_entropy_logits(setting, alpha)
    assert distance(setting, logits, best) > 0.1

    for _ in range(space.length):
        targets = gae_advantages(setting.inputs(logits, None, alpha)).returns
        assert targets is not None
        logits = improved(setting, logits, targets, alpha)
    assert distance(setting, logits, best) < EXACT


def improved(setting: Setting, logits: Tensor, targets: Tensor, alpha: float) -> Tensor:
    """Return [rows, V] Q / alpha, from all responses that take a token in a context."""
    space = setting.space
    weights = (space.probabilities(logits)[:, None] * space.mask).flatten()
    places = (space.rows * space.vocabulary + space.tokens).flatten()
    size = space.num_rows * space.vocabulary
    zeros = torch.zeros(size, dtype=torch.float64)
    sums = zeros.index_add(0, places, weights * targets.flatten())
    counts = zeros.index_add(0, places, weights)
    means = torch.where(counts > 0, sums / counts.clamp(min=1e-300), 0.0)
    return means.view_as(logits) / alpha + logits.log_softmax(1)


def maximum_entropy_logits(setting: Setting, alpha: float) -> Tensor:
    """Return the table of pi(y) = exp(R(y) / alpha) / Z: each token's mass of continuations."""
    space = setting.space
    mass = (setting.rewards / alpha).exp()[:, None].expand(-1, space.length) * space.mask
    places = (space.rows * space.vocabulary + space.tokens).flatten()
    size = space.num_rows * space.vocabulary
    table = torch.zeros(size, dtype=torch.float64).index_add(0, places, mass.flatten())
    return table.clamp(min=1e-300).log().view_as(setting.logits)


def distance(setting: Setting, one: Tensor, other: Tensor) -> float:
    """Return the total variation between two policies over whole responses."""
    difference = setting.space.probabilities(one) - setting.space.probabilities(other)
    return float(difference.abs().sum() / 2)
