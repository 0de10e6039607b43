"""Exact expectations over an enumerated policy: unbiased gradients, and the size of biases."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rlsys.algorithms.advantages import (
    AdvantageOutput,
    get_advantage_estimator,
    hierarchical_advantages,
)
from rlsys.algorithms.loss_aggregation import aggregate_loss
from rlsys.algorithms.policy_objectives import (
    PolicyObjectiveInputs,
    policy_objective,
    rollout_correction,
)
from tests.support.enumerable_policy import ResponseSpace

EXACT = 1e-10


@dataclass(frozen=True)
class Setting:
    """A response space, the policy that sampled, and rewards of every response."""

    space: ResponseSpace
    logits: Tensor
    rewards: Tensor

    @staticmethod
    def random(seed: int, *, length: int = 2, end_token: bool = True) -> Setting:
        generator = torch.Generator().manual_seed(seed)
        space = ResponseSpace.of(2, length, end_token=end_token)
        return Setting(
            space,
            space.random_logits(generator),
            torch.rand(len(space.tokens), generator=generator, dtype=torch.float64),
        )


def expected_gradient(
    setting: Setting, name: str, *, group: int, state: dict | None = None, **parameters: object
) -> Tensor:
    """E of (1/G) sum_i sum_t A_it grad log pi(y_it) over all G-tuples of responses, exactly."""
    space, logits = setting.space, setting.logits
    probabilities, scores = space.probabilities(logits), space.scores(logits)
    greedy = setting.rewards[int(probabilities.argmax())].expand(group)
    total = torch.zeros(scores.shape[2], dtype=torch.float64)
    for drawn in itertools.product(range(len(space.tokens)), repeat=group):
        index = torch.tensor(drawn)
        made = space.inputs(
            index, setting.rewards, logits, logits, torch.zeros(group, dtype=torch.int64)
        )
        made = dataclasses.replace(
            made, greedy_rewards=greedy, state=state or {}, problem_ids=["p"] * group
        )
        output: AdvantageOutput = get_advantage_estimator(name)(made, **parameters)
        gradient = torch.einsum("gt,gtp->p", output.advantages, scores[index]) / group
        total += probabilities[index].prod() * gradient
    return total


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("reinforce", {}),
        ("reinforce_baseline", {"baseline": "moving_average"}),
        ("rloo", {}),
        ("optimal_baseline", {"leave_one_out": True}),
        ("optimal_baseline", {"leave_one_out": True, "scope": "batch"}),
        ("optimal_token_baseline", {"leave_one_out": True}),
        ("remax", {}),
        ("gae", {}),
        ("rae", {}),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_unbiased_estimators(name: str, parameters: dict, seed: int):
    setting = Setting.random(seed)
    exact = setting.space.gradient(setting.logits, setting.rewards)
    state = {"average": 0.3, "weight": 1.0, "averages": {"p": [0.3, 0.5]}}
    found = expected_gradient(setting, name, group=3, state=state, **parameters)
    assert float((found - exact).abs().max()) < EXACT


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("grpo", {"divide_by_std": False}), ("gpg", {}), ("reinforce_baseline", {})],
)
@pytest.mark.parametrize("group", [2, 4])
def test_a_mean_that_contains_the_response_scales_the_gradient(
    name: str, parameters: dict, group: int
):
    """By exactly 1 - 1/G: the bias that the documents state, which a learning rate can absorb."""
    setting = Setting.random(2)
    exact = setting.space.gradient(setting.logits, setting.rewards)
    assert (
        float(
            (expected_gradient(setting, name, group=group, **parameters) - (1 - 1 / group) * exact)
            .abs()
            .max()
        )
        < EXACT
    )


def best_of(setting: Setting, k: int) -> Tensor:
    """Return the gradient of E[max of the rewards of k responses], by automatic differentiation."""
    logits = setting.logits.clone().requires_grad_()
    probabilities = setting.space.probabilities(logits)
    value = torch.zeros((), dtype=torch.float64)
    for drawn in itertools.product(range(len(probabilities)), repeat=k):
        index = torch.tensor(drawn)
        value = value + probabilities[index].prod() * setting.rewards[index].max()
    (gradient,) = torch.autograd.grad(value, logits)
    return gradient.flatten()


@pytest.mark.parametrize(("k", "group"), [(2, 3), (3, 4), (2, 2)])
def test_pass_at_k_ascends_the_best_of_k(k: int, group: int):
    """By 1/k, or (1/k)(1 - k/G) with a mean that contains the response, as documented."""
    setting = Setting.random(6)
    exact = best_of(setting, k)
    found = expected_gradient(setting, "grpo_passk", group=group, k=k, baseline="leave_one_out")
    assert float((k * found - exact).abs().max()) < EXACT
    found = expected_gradient(setting, "grpo_passk", group=group, k=k, divide_by_std=False)
    assert float((k * found - (1 - k / group) * exact).abs().max()) < EXACT


@pytest.mark.parametrize("group", [2, 3, 4])
def test_maxrl_ascends_the_log_likelihood_up_to_the_order_of_its_group(group: int):
    """For rewards of 0 and 1: sum_{k < G} pass@k / k, by automatic differentiation."""
    setting = Setting.random(7)
    rewards = (setting.rewards > 0.6).double()
    assert 0 < rewards.sum() < len(rewards)
    setting = dataclasses.replace(setting, rewards=rewards)

    logits = setting.logits.clone().requires_grad_()
    success = (setting.space.probabilities(logits) * rewards).sum()
    value = torch.stack([(1 - (1 - success) ** k) / k for k in range(1, group)]).sum()
    (exact,) = torch.autograd.grad(value, logits)
    found = expected_gradient(setting, "maxrl", group=group)
    assert float((found - exact.flatten()).abs().max()) < EXACT


@pytest.mark.parametrize("name", ["grpo", "opo", "optimal_baseline", "optimal_token_baseline"])
def test_biased_estimators_change_the_direction(name: str):
    """Their expectations are not a multiple of the gradient.

    They divide by the group's deviation, or have a weighted baseline that contains the response.
    """
    setting = Setting.random(3)
    exact, found = (
        setting.space.gradient(setting.logits, setting.rewards),
        expected_gradient(setting, name, group=3),
    )
    best = float(found @ exact / (found @ found))
    assert relative_error(best * found, exact) > 1e-4


@pytest.mark.parametrize("level", ["none", "token", "sequence"])
def test_hierarchical_weights_correct_for_the_rollout_policy_once(level: str):
    """They are exact for all groups of three of a drifted sampler, and wrong when corrected twice.

    A run with `rollout_correction` on top is refused before it starts.
    """
    setting = Setting.random(4)
    space, old = setting.space, setting.logits
    rollout = old + 0.5 * space.random_logits(torch.Generator().manual_seed(5))
    probabilities, scores = space.probabilities(rollout), space.scores(old)
    correction = rollout_correction(
        space.logprobs(old), space.logprobs(rollout), space.mask, level=level, cap=1e9
    )
    found = torch.zeros(scores.shape[2], dtype=torch.float64)
    for drawn in itertools.product(range(len(space.tokens)), repeat=3):
        index = torch.tensor(drawn)
        made = space.inputs(index, setting.rewards, rollout, old, torch.zeros(3, dtype=torch.int64))
        weights = hierarchical_advantages(made, max_tokens=2, diagnostics=False).advantages
        gradient = torch.einsum("gt,gtp->p", weights * correction[index], scores[index]) / 3
        found += probabilities[index].prod() * gradient
    error = relative_error(found, space.gradient(old, setting.rewards))
    assert error < EXACT if level == "none" else error > 0.1


def objective_gradient(
    setting: Setting, live: Tensor, ratio: str, weight: str, **parameters: object
) -> Tensor:
    """Return the expected gradient of an objective with respect to the live policy's table.

    Responses are those of the old policy, and the advantage is the reward.
    """
    space, mask = setting.space, setting.space.mask
    table = live.clone().requires_grad_()
    advantages = torch.where(mask, setting.rewards[:, None], 0.0)
    inputs = PolicyObjectiveInputs(
        logprobs=space.logprobs(table),
        old_logprobs=space.logprobs(setting.logits),
        advantages=advantages,
        response_mask=mask,
    )
    losses = policy_objective(inputs, ratio=ratio, weight=weight, **parameters).token_losses
    (gradient,) = torch.autograd.grad(
        -(space.probabilities(setting.logits) * losses.sum(1)).sum(), table
    )
    return gradient.flatten()


@pytest.fixture(scope="module")
def drifted() -> tuple[Setting, Tensor, Tensor]:
    """A setting of three tokens, live logits that have moved away, and the exact gradient there."""
    setting = Setting.random(5, length=3)
    live = setting.logits + 0.5 * setting.space.random_logits(torch.Generator().manual_seed(6))
    return setting, live, setting.space.gradient(live, setting.rewards)


@pytest.mark.parametrize(
    ("weight", "parameters"),
    [("importance", {}), ("power", {"q": 1.0}), ("upper_clip", {"clip_high": 1e9})],
)
def test_the_full_product_corrects_a_drifted_policy_exactly(drifted, weight: str, parameters: dict):
    setting, live, exact = drifted
    assert (
        float(
            (objective_gradient(setting, live, "product", weight, **parameters) - exact).abs().max()
        )
        < EXACT
    )


def test_the_power_family_trades_bias_for_variance(drifted):
    """Bias falls to 0 as q goes to 1; the second moment of the weights rises."""
    setting, live, exact = drifted
    errors = [
        relative_error(objective_gradient(setting, live, "product", "power", q=q), exact)
        for q in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.05
    assert errors[-1] < EXACT
    space = setting.space
    product = (space.logprobs(live) - space.logprobs(setting.logits)).sum(1)
    moments = [
        float((space.probabilities(setting.logits) * (2 * q * product).exp()).sum())
        for q in (0.0, 0.5, 1.0)
    ]
    assert moments == sorted(moments)


@pytest.mark.parametrize(
    ("ratio", "weight"),
    [("token", "importance"), ("sequence", "importance"), ("future", "importance")],
)
def test_averaged_and_single_token_ratios_are_biased_once_the_policy_moved(
    drifted, ratio: str, weight: str
):
    setting, live, exact = drifted
    assert relative_error(objective_gradient(setting, live, ratio, weight), exact) > 0.01


def test_prefix_ratios_are_exact_for_rewards_that_are_decided_at_once():
    """Rewards that depend on the tokens so far alone need no ratios of later tokens."""
    setting = Setting.random(7, length=3, end_token=False)
    live = setting.logits + 0.5 * setting.space.random_logits(torch.Generator().manual_seed(8))
    space = setting.space
    first_token_reward = space.tokens[:, 0].double()
    mask = space.mask.clone()
    mask[:, 1:] = False  # its whole effect is at the first token
    table = live.clone().requires_grad_()
    inputs = PolicyObjectiveInputs(
        logprobs=torch.where(mask, space.logprobs(table), 0.0),
        old_logprobs=torch.where(mask, space.logprobs(setting.logits), 0.0),
        advantages=torch.where(mask, first_token_reward[:, None], 0.0),
        response_mask=mask,
    )
    losses = policy_objective(inputs, ratio="prefix", weight="importance").token_losses
    (found,) = torch.autograd.grad(
        -(space.probabilities(setting.logits) * losses.sum(1)).sum(), table
    )
    assert float((found.flatten() - space.gradient(live, first_token_reward)).abs().max()) < EXACT


def weight_variance(length: int, log_weight: Callable[[Tensor], Tensor]) -> float:
    """Return the variance of a weight of the log-ratios of `length` independent tokens."""
    space = ResponseSpace.of(2, length, context="previous_token")
    old = torch.zeros(space.num_rows, 2, dtype=torch.float64)
    live = old + torch.tensor([0.6, 0.0], dtype=torch.float64)  # every token drifts alike
    probabilities = space.probabilities(old)
    weights = log_weight(space.logprobs(live) - space.logprobs(old)).exp()
    mean = (probabilities * weights).sum()
    return float((probabilities * (weights - mean) ** 2).sum())


def test_the_product_explodes_and_the_geometric_mean_does_not():
    """1 + Var(product) = E[rho^2]^L for independent tokens; Var(geometric mean) falls with L."""
    one = 1 + weight_variance(1, lambda logs: logs.sum(1))
    products = [weight_variance(length, lambda logs: logs.sum(1)) for length in range(1, 9)]
    assert [1 + value for value in products] == pytest.approx(
        [one**length for length in range(1, 9)], rel=EXACT
    )
    means = [weight_variance(length, lambda logs: logs.mean(1)) for length in range(1, 9)]
    assert means == sorted(means, reverse=True)
    assert means[7] < products[7] / 50


@pytest.mark.parametrize("end_token", [False, True])
@pytest.mark.parametrize("seed", [9, 12, 13])
def test_token_kl_gradient_is_that_of_the_regularised_objective(seed: int, end_token: bool):
    """E[r_j grad log pi_j] summed over j is the gradient of E[r] - (beta / H) KL(pi || ref).

    H is one number, with equal and with mixed lengths.
    """
    from rlsys.algorithms.advantages.token_kl_grpo import token_kl_returns

    setting, beta = Setting.random(seed, length=3, end_token=end_token), 0.3
    space, ref = setting.space, setting.space.random_logits(torch.Generator().manual_seed(10))
    logprobs, ref_logprobs = space.logprobs(setting.logits), space.logprobs(ref)
    for horizon in (3, 8):
        returns = token_kl_returns(
            setting.rewards, logprobs, ref_logprobs, space.mask, beta, horizon=horizon
        )
        chances, scores = space.probabilities(setting.logits), space.scores(setting.logits)
        found = torch.einsum("s,st,stp->p", chances, returns, scores)
        table = setting.logits.clone().requires_grad_()
        cost = (space.logprobs(table) - ref_logprobs).sum(1)
        objective = (space.probabilities(table) * (setting.rewards - beta / horizon * cost)).sum()
        (exact,) = torch.autograd.grad(objective, table)
        assert float((found - exact.flatten()).abs().max()) < EXACT
        # What a run does with them: a sum over tokens over one length, so a fixed fraction of
        # the gradient.
        losses = -(returns * torch.einsum("stp,p->st", scores, exact.flatten()))
        loss = aggregate_loss(
            chances[:, None] * losses, space.mask, "constant", num_sequences=1, max_tokens=horizon
        )
        assert float(loss) == pytest.approx(-float(exact.square().sum()) / horizon, rel=1e-9)


@pytest.mark.parametrize("seed", [5, 14])
def test_each_reward_with_the_ratios_up_to_its_time_is_exact_for_rewards_at_every_token(seed: int):
    """`reward_time` is exact for rewards of each prefix and an older sampler.

    The ratio of one token or of the prefix is not.
    """
    setting = Setting.random(seed, length=3)
    space, generator = setting.space, torch.Generator().manual_seed(seed)
    live = setting.logits + 0.5 * space.random_logits(generator)
    table_of_rewards = torch.randn(space.num_rows, 2, generator=generator, dtype=torch.float64)
    rewards = torch.where(space.mask, table_of_rewards[space.rows, space.tokens], 0.0)
    baseline = torch.randn(space.num_rows, generator=generator, dtype=torch.float64)[space.rows]
    to_go = torch.where(space.mask, rewards.flip(1).cumsum(1).flip(1) - baseline, 0.0)
    exact = space.gradient(live, rewards.sum(1))

    def found(ratio: str, weight: str, sampler: Tensor) -> Tensor:
        table = live.clone().requires_grad_()
        inputs = PolicyObjectiveInputs(
            logprobs=space.logprobs(table),
            old_logprobs=space.logprobs(sampler),
            advantages=to_go,
            response_mask=space.mask,
        )
        losses = policy_objective(inputs, ratio=ratio, weight=weight).token_losses
        total = -(space.probabilities(sampler) * losses.sum(1)).sum()
        return torch.autograd.grad(total, table)[0].flatten()

    for sampler in (live, setting.logits):
        assert float((found("prefix", "reward_time", sampler) - exact).abs().max()) < EXACT
    for ratio in ("token", "prefix"):
        assert relative_error(found(ratio, "importance", setting.logits), exact) > 0.05


def test_entropy_in_the_reward_is_the_gradient_of_the_regularised_objective():
    """The reward-to-go with -alpha log pi per token has the gradient of E[R] + alpha H.

    An entropy bonus at visited states alone does not.
    """
    from rlsys.algorithms.entropy import entropy_rewards

    setting, alpha = Setting.random(11, length=3), 0.4
    space = setting.space
    logprobs = space.logprobs(setting.logits)
    made = space.inputs(
        torch.arange(len(space.tokens)),
        setting.rewards,
        setting.logits,
        setting.logits,
        torch.arange(len(space.tokens)),
    )
    made = dataclasses.replace(made, token_rewards=entropy_rewards(logprobs, space.mask, alpha))
    advantages = get_advantage_estimator("reinforce")(made).advantages
    found = torch.einsum(
        "s,st,stp->p", space.probabilities(setting.logits), advantages, space.scores(setting.logits)
    )
    table = setting.logits.clone().requires_grad_()
    probabilities = space.probabilities(table)
    (exact,) = torch.autograd.grad(
        (probabilities * (setting.rewards - alpha * space.logprobs(table).sum(1))).sum(), table
    )
    assert float((found - exact.flatten()).abs().max()) < EXACT
