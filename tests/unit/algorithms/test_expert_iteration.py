"""Expert iteration on enumerable policies: what supervised learning of correct samples leads to.

Every response of a small autoregressive policy is enumerated, with its exact probability. The kept
samples have the distribution pi(y) r(y) / Z with Z = sum pi(y) r(y).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlsys.algorithms.loss_aggregation import aggregate_loss
from rlsys.algorithms.supervised import negative_log_likelihood
from tests.support.enumerable_policy import ResponseSpace

SPACE = ResponseSpace.of(3, 3, end_token=True)


def policy(seed: int = 0) -> Tensor:
    """Return the table of a random policy, with gradient."""
    return SPACE.random_logits(torch.Generator().manual_seed(seed)).requires_grad_()


def correct(seed: int = 0) -> Tensor:
    """Return [S] rewards of 0 and 1, about half of each."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(len(SPACE.tokens), generator=generator) < 0.5).double()


def filtered(logits: Tensor, rewards: Tensor) -> Tensor:
    """Return [S] pi(y) r(y) / Z."""
    kept = SPACE.probabilities(logits.detach()) * rewards
    return kept / kept.sum()


def expected_loss(logits: Tensor, weights: Tensor) -> Tensor:
    """Return the expected negative log-likelihood of a response drawn with `weights` [S]."""
    return -(weights[:, None] * SPACE.logprobs(logits)).sum()


def fitted(weights: Tensor, start: Tensor) -> Tensor:
    """Return the table that minimizes the expected loss, found numerically from `start`."""
    logits = start.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=3000,
        tolerance_grad=1e-10,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = expected_loss(logits, weights)
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return logits.detach()


def test_the_loss_of_an_update_on_samples_is_the_expected_one():
    """Counts instead of probabilities: 3 copies of one response, 2 of another, 1 of a third."""
    logits, drawn = policy(3), torch.tensor([4, 4, 4, 9, 9, 14])
    logprobs, mask = SPACE.logprobs(logits)[drawn], SPACE.mask[drawn]
    tokens = int(mask.sum())
    loss = negative_log_likelihood(logprobs, mask, num_tokens=tokens)
    weights = torch.bincount(drawn, minlength=len(SPACE.tokens)).double() / tokens
    torch.testing.assert_close(loss, expected_loss(logits, weights), atol=1e-12, rtol=0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_optimum_of_fine_tuning_on_correct_samples_is_the_filtered_policy(seed: int):
    before, rewards = policy(seed), correct(seed)
    target = filtered(before, rewards)
    after = SPACE.probabilities(fitted(target, before))

    assert 0 < (target > 0).sum() < len(target)
    torch.testing.assert_close(after, target, atol=1e-6, rtol=0)
    # Policy improvement: from Z to 1.
    success = float((SPACE.probabilities(before.detach()) * rewards).sum())
    assert success < 0.9
    assert float((after * rewards).sum()) == pytest.approx(1.0, abs=1e-6)


def test_graded_rewards_as_probabilities_of_being_kept_have_an_optimum_inside():
    """With 0 < r < 1, where nothing is ruled out, J rises from E[r] to E[r^2] / E[r]."""
    before = policy(4)
    rewards = torch.rand(len(SPACE.tokens), generator=torch.Generator().manual_seed(4)).double()
    chances = SPACE.probabilities(before.detach())
    target = filtered(before, rewards)
    after = SPACE.probabilities(fitted(target, before))

    torch.testing.assert_close(after, target, atol=1e-6, rtol=0)
    first, second = float((chances * rewards).sum()), float((chances * rewards**2).sum())
    assert float((after * rewards).sum()) == pytest.approx(second / first, abs=1e-6)
    assert second / first > first


def test_the_filtered_policy_is_a_fixed_point():
    before, rewards = policy(5), correct(5)
    target = filtered(before, rewards)
    again = target * rewards / (target * rewards).sum()
    torch.testing.assert_close(again, target, atol=1e-12, rtol=0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_first_update_has_the_gradient_of_the_expected_reward(seed: int):
    """At the sampling policy the gradient of the loss is -grad J / Z: that of REINFORCE."""
    logits, rewards = policy(seed), correct(seed)
    (gradient,) = torch.autograd.grad(expected_loss(logits, filtered(logits, rewards)), logits)
    success = (SPACE.probabilities(logits.detach()) * rewards).sum()
    ascent = SPACE.gradient(logits.detach(), rewards) / success
    torch.testing.assert_close(-gradient.flatten(), ascent, atol=1e-10, rtol=0)

    moved = logits.detach() - 0.1 * gradient
    assert float((SPACE.probabilities(moved) * rewards).sum()) > float(success)


def test_learning_each_response_once_leads_to_equal_chances_of_the_found_ones():
    """With `deduplicate` the target is uniform over the distinct correct responses."""
    before, rewards = policy(6), correct(6)
    target = rewards / rewards.sum()
    after = SPACE.probabilities(fitted(target, before))
    torch.testing.assert_close(after, target, atol=1e-6, rtol=0)


def test_a_mean_over_sequences_prefers_short_responses():
    """sequence_mean weighs a response by 1 / length: the optimum is pi r / length / Z'."""
    before, rewards = policy(7), correct(7)
    kept = filtered(before, rewards)
    lengths = SPACE.mask.sum(dim=1)
    logits = before
    loss = torch.stack(
        [
            weight * aggregate_loss(-row[None], mask[None], "sequence_mean", num_sequences=1)
            for weight, row, mask in zip(kept, SPACE.logprobs(logits), SPACE.mask, strict=True)
        ]
    ).sum()
    (found,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(expected_loss(before, kept / lengths), before)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
