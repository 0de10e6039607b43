"""Hierarchical baselines: the theory by enumeration, the fits against refitting, the estimator's promises."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlsys.algorithms.advantages import (
    AdvantageInputs,
    hierarchical_advantages,
    rloo_advantages,
    run_estimator,
)
from rlsys.algorithms.advantages.grouping import others_mean
from rlsys.algorithms.advantages.hierarchical.diagnostics import effective_shares
from rlsys.algorithms.advantages.hierarchical.group_regression import power_of_two
from rlsys.algorithms.advantages.hierarchical.grouped_batch import GroupedBatch
from rlsys.algorithms.advantages.hierarchical.horizons import Layers
from rlsys.algorithms.advantages.hierarchical.shrinkage import (
    Gains,
    cautious_strengths,
    tilted_centre,
)
from tests.support.enumerable_policy import Context, Enumerated

LAYERS = ("final", "current", "current_and_final", "blocks", "all")
SPACES: list[tuple[Context, bool]] = [
    ("prefix", False),
    ("prefix", True),
    ("previous_token", False),
    ("previous_token", True),
]


class LearntPrompt(Enumerated):
    """A policy a step of 0.3 along the exact gradient ahead of its sampler; the reward is the share of one token."""

    def __init__(self, seed: int):
        super().__init__(seed, "previous_token", size=(3, 5), drift=0.0)
        self.rewards = (self.space.tokens == 1).double().mean(1)
        step = self.space.gradient(self.rollout, self.rewards).reshape(self.rollout.shape)
        self.old = self.rollout + 0.3 * step / step.std()
        self.ratios = (
            (self.space.logprobs(self.old) - self.space.logprobs(self.rollout)).cumsum(1).exp()
        )
        self.scores, self.gradient = (
            self.space.scores(self.old),
            self.space.gradient(self.old, self.rewards),
        )

    def draw(self, number: int, generator: torch.Generator) -> Tensor:
        return torch.multinomial(self.probability, number, replacement=True, generator=generator)


def joined(prompts: list[LearntPrompt], drawn: list[Tensor]) -> AdvantageInputs:
    """One batch of a group a prompt."""
    parts = [
        p.space.inputs(d, p.rewards, p.rollout, p.old, torch.full((len(d),), k))
        for k, (p, d) in enumerate(zip(prompts, drawn, strict=True))
    ]
    names = (
        "rewards",
        "response_mask",
        "group_ids",
        "rollout_logprobs",
        "old_logprobs",
        "score_norms",
    )
    arrays: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in names
    }
    return AdvantageInputs(**arrays)


# The theory, exactly


@pytest.mark.parametrize(("context", "end_token"), SPACES)
def test_any_baseline_of_any_layer_has_expectation_zero(context: Context, end_token: bool):
    """Lemma 1, and with it unbiasedness: each layer's term vanishes, so any beta leaves the gradient exact."""
    made = Enumerated(0, context, end_token)
    for t in range(made.space.length):
        for s in range(t, made.space.length):
            assert made.mean(made.ratios[:, s, None] * made.scores[:, t]).abs().max() < 1e-12
    beta = 5 * torch.randn(
        made.space.length, made.space.length, generator=made.generator, dtype=torch.float64
    )
    assert (made.mean(made.token_gradients(beta)).sum(0) - made.gradient).abs().max() < 1e-12


def test_a_baseline_that_knows_the_token_is_not_allowed():
    made = Enumerated(0)
    cheating = made.ratios[:, -1, None] * made.scores[:, 0] * made.rewards[:, None]
    assert made.mean(cheating).abs().max() > 1e-3


@pytest.mark.parametrize("end_token", [False, True])
def test_ratios_of_the_future_average_to_one_given_the_past(end_token: bool):
    made = Enumerated(1, end_token=end_token)
    for t, s in itertools.combinations(range(made.space.length), 2):
        alpha = made.ratios[:, s] / made.ratios[:, t]
        prefixes, index = made.space.tokens[:, : t + 1].unique(dim=0, return_inverse=True)
        totals = torch.zeros(2, len(prefixes), dtype=torch.float64)
        totals[0].index_add_(0, index, made.probability * alpha)
        totals[1].index_add_(0, index, made.probability)
        assert torch.allclose(
            totals[0] / totals[1], torch.ones(len(prefixes), dtype=torch.float64), atol=1e-12
        )


@pytest.mark.parametrize(("context", "end_token"), SPACES)
def test_the_variance_formula_and_what_it_leaves_out(context: Context, end_token: bool):
    """Each position's variance is the formula's; the total is their sum plus covariances, which vanish only where scores are orthogonal."""
    made = Enumerated(2, context, end_token)
    beta = torch.randn(
        made.space.length, made.space.length, generator=made.generator, dtype=torch.float64
    )
    terms = made.token_gradients(beta)  # [S, L, P]
    means = made.mean(terms)
    direct = made.mean((terms - means).square().sum(2))
    later = torch.ones_like(beta).triu()
    alpha = made.ratios[:, None, :] / made.ratios[:, :, None]
    residual = alpha[:, :, -1] * made.rewards[:, None] - (alpha * beta * later).sum(2)
    formula = made.mean(
        made.ratios**2 * made.scores.square().sum(2) * residual**2
    ) - means.square().sum(1)
    assert torch.allclose(direct, formula, atol=1e-12, rtol=1e-12)

    total = made.mean((terms.sum(1) - made.gradient).square().sum(1))
    second = made.mean(torch.einsum("slp,smp->slm", terms, terms)) - means @ means.T
    covariance = second.sum() - second.diagonal().sum()
    assert float(total) == pytest.approx(float(direct.sum() + covariance), rel=1e-12)
    if context == "prefix":
        assert abs(float(covariance)) < 1e-12 * float(
            total
        )  # scores of different prefixes share no parameter
    else:
        assert abs(float(covariance)) > 1e-3 * float(total)


@pytest.mark.parametrize(("context", "end_token"), SPACES)
def test_the_weighted_regression_minimises_the_variance(context: Context, end_token: bool):
    made = Enumerated(3, context, end_token)

    def variance(beta: Tensor) -> Tensor:
        return made.mean(made.token_gradients(beta).square().sum(2))

    best = made.best_beta()
    for _ in range(20):
        step = torch.randn(best.shape, generator=made.generator, dtype=torch.float64)
        assert (variance(best + 0.1 * step) >= variance(best) - 1e-12).all()
        assert variance(best + 0.1 * step).sum() > variance(best).sum() + 1e-6
    mean = torch.zeros_like(best)
    mean[:, -1] = made.mean(made.rewards)
    assert variance(best).sum() < variance(mean).sum()


# The estimator, exactly


def expectation(made: Enumerated, size: int, **parameters: Any) -> Tensor:
    """[P] exact expectation of the gradient estimated from one group of `size`: every group there is, with its probability."""
    number = len(made.space.tokens)
    total = torch.zeros_like(made.gradient)
    for group in itertools.combinations_with_replacement(range(number), size):
        indices = torch.tensor(group)
        drawn = made.space.inputs(
            indices, made.rewards, made.rollout, made.old, torch.zeros(size, dtype=torch.int64)
        )
        weight = hierarchical_advantages(drawn, diagnostics=False, **parameters).advantages.double()
        counts = torch.bincount(indices, minlength=number)
        orders = torch.exp(
            torch.lgamma(torch.tensor(size + 1.0)) - torch.lgamma(counts + 1.0).sum()
        ).round()
        chance = orders * made.probability[indices].prod()
        total += chance * torch.einsum("gt,gtp->p", weight, made.scores[indices]) / size
    return total


@pytest.mark.parametrize("layers", LAYERS)
def test_unbiased_over_every_group_that_can_be_drawn(layers: str):
    """With strengths, ridge and centre as they are by default: nothing a response is weighted by has seen the response."""
    made = Enumerated(4, end_token=True, size=(2, 3))
    exact = expectation(made, 4, layers=layers, block_size=2, max_tokens=3)
    assert (
        exact - made.gradient
    ).abs().max() < 2e-7 * made.gradient.abs().max()  # advantages are float32


def test_unbiased_where_the_centre_moves():
    """Groups of 8 of three responses: enough that the correlation of reward and weight can be sure."""
    made = Enumerated(4, end_token=True, size=(2, 2))
    made.rewards = (made.ratios[:, -1].square() * made.scores.square().sum((1, 2))).log()
    drawn = grouped(torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]]), made)
    assert (tilted_centre(drawn) - drawn.centre).abs().min() > 1e-3
    made.gradient = made.space.gradient(made.old, made.rewards)
    exact = expectation(made, 8)
    assert (exact - made.gradient).abs().max() < 2e-7 * made.gradient.abs().max()


def grouped(indices: Tensor, made: Enumerated) -> GroupedBatch:
    """[K, G] listed responses as a batch."""
    ratios, rewards = made.ratios[indices], made.rewards[indices]
    present = torch.ones_like(rewards, dtype=torch.bool)
    layers = Layers.of("final", ratios.shape[2], 1)
    norms = made.scores.square().sum(2)[indices]
    mass = torch.stack([norms.sum(2), made.space.mask[indices].sum(2)], dim=-1)
    return GroupedBatch(
        ratios, rewards, others_mean(rewards, present), present, norms, mass, layers
    )


def test_the_centre_leans_always_and_moves_as_far_as_reward_and_weight_surely_go_together():
    """Refitted one response at a time, where rewards follow the weights and where they do not.

    Few responses and equal weights leave it where it is.
    """
    generator = torch.Generator().manual_seed(1)
    logs = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    rewards = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    rewards[0] = logs[0] + 0.1 * rewards[0]
    present = torch.ones(3, 12, dtype=torch.bool)
    # The weight is the squared ratio times the norms: the square of exp(logs).
    ratios = (logs / 2).exp()[..., None]
    mass = torch.stack([logs.exp(), torch.ones_like(logs)], dim=-1)
    layers = Layers.of("final", 1, 1)
    batch = GroupedBatch(
        ratios, rewards, others_mean(rewards, present), present, ratios, mass, layers
    )
    found = tilted_centre(batch)
    for k, i in itertools.product(range(3), range(12)):
        j = [other for other in range(12) if other != i]
        light, heavy = ratios[k, j, 0] ** 0.25 * logs[k, j].exp(), (2 * logs[k, j]).exp()
        r = torch.corrcoef(torch.stack([logs[k, j], rewards[k, j]]))[0, 1]
        certain = max(0.0, float(1 - 16 / (8 * r.atanh() ** 2)))
        assert (certain > 0.5) == (k == 0)
        # 8 / (8 + LEANING) of the way
        lean = (rewards[k, j].mean() + (light @ rewards[k, j]) / light.sum()) / 2
        best = (heavy @ rewards[k, j]) / heavy.sum()
        assert float(found[k, i]) == pytest.approx(float((1 - certain) * lean + certain * best))
    few = replace(batch, present=torch.arange(12).expand(3, 12) < 4)
    assert torch.equal(tilted_centre(few), few.centre)
    same = replace(batch, ratios=torch.ones_like(ratios), mass=torch.ones_like(mass))
    assert torch.allclose(tilted_centre(same), same.centre, atol=1e-14)


def test_clipping_log_ratios_is_biased_as_documented():
    made = Enumerated(4, end_token=True, size=(2, 3))
    error = expectation(made, 3, log_ratio_clip=0.3) - made.gradient
    assert error.abs().max() > 1e-3 * made.gradient.abs().max()


@pytest.mark.parametrize("scope", ["auto", "group", "batch"])
@pytest.mark.parametrize("groups", [1, 2, 12])
def test_no_coefficient_has_seen_its_response(groups: int, scope: str):
    """beta = (base - weight) / rho_{<=L} for the final layer: another reward, other ratios and scores of the response leave it as it was."""
    made = Enumerated(5, size=(3, 4))
    before = made.drawn(groups, 12)
    after = replace(
        before,
        **{
            name: getattr(before, name).clone()
            for name in ("rewards", "rollout_logprobs", "score_norms")
        },
    )
    i = 7
    after.rewards[i] = 4.0
    after.rollout_logprobs[i, 1] -= 0.9  # type: ignore[index]
    after.score_norms[i] *= 30.0  # type: ignore[index]

    def coefficients(batch: AdvantageInputs) -> Tensor:
        out = (
            hierarchical_advantages(batch, layers="final", scope=scope, diagnostics=False)
            .advantages[i]
            .double()
        )
        ratio = (batch.old_logprobs - batch.rollout_logprobs)[i].sum().exp()  # type: ignore[operator]
        others = torch.cat([batch.rewards[:i], batch.rewards[i + 1 : 12]]).mean()
        return batch.rewards[i] - others - out / ratio

    assert torch.allclose(coefficients(before), coefficients(after), atol=1e-6)
    if (scope, groups) in (("auto", 12), ("group", 1)):
        assert coefficients(before).abs().max() > 1e-3  # and there is a correction to speak of


@pytest.mark.parametrize("scope", ["auto", "group", "batch"])
@pytest.mark.parametrize("layers", LAYERS)
def test_on_policy_it_is_leave_one_out(layers: str, scope: str):
    made = Enumerated(6, end_token=True)
    drawn = made.space.inputs(
        torch.randint(0, len(made.rewards), (48,), generator=made.generator),
        made.rewards,
        made.old,
        made.old,
        torch.arange(48) // 8,
    )
    out = hierarchical_advantages(drawn, layers=layers, scope=scope, block_size=2).advantages
    assert torch.allclose(out, rloo_advantages(drawn).advantages, atol=1e-6, rtol=1e-6)


def test_equal_rewards_and_groups_of_one_get_exactly_zero():
    made = Enumerated(7)
    drawn = made.drawn(6, 5)
    rewards = drawn.rewards.clone()
    rewards[5:10] = 0.1
    ids = drawn.group_ids.clone()
    ids[-1] = 99
    out = hierarchical_advantages(replace(drawn, rewards=rewards, group_ids=ids)).advantages
    assert (out[5:10] == 0).all()
    assert (out[-1] == 0).all()
    assert (out[:5] != 0).any()


# The fits


def refitted(drawn: AdvantageInputs, layers: str, ridge: float) -> Tensor:
    """[B, T] weights by solving one regression a response and position, on the others of its group, from the definition in Delta."""
    ratios = (drawn.old_logprobs - drawn.rollout_logprobs).cumsum(1).exp()  # type: ignore[operator]
    length = ratios.shape[1]
    out = torch.zeros_like(ratios)
    for i, t in itertools.product(range(len(ratios)), range(length)):
        if not drawn.response_mask[i, t]:
            continue
        others = (drawn.group_ids == drawn.group_ids[i]).nonzero()[:, 0]
        others = others[others != i]
        centre = drawn.rewards[others].mean()
        chosen = {
            "final": [length - 1],
            "current": [t],
            "current_and_final": [t, length - 1],
            "all": list(range(t, length)),
        }
        chosen["blocks"] = [t, *(s for s in range(1, length - 1, 2) if s >= t), length - 1]
        alpha = ratios[:, chosen[layers]] / ratios[:, t : t + 1]
        features = alpha / len(chosen[layers]) ** 0.5
        target = ratios[:, -1] / ratios[:, t] * (drawn.rewards - centre)
        assert drawn.score_norms is not None
        norms, tokens = drawn.score_norms * drawn.response_mask, drawn.response_mask.sum(1)
        w = ratios[:, t] ** 2 * (norms[:, t] + norms.sum(1) / tokens) / 2
        unit = torch.exp2((norms[others].sum() / tokens[others].sum()).log2().round())
        others = others[drawn.response_mask[others, t]]
        x, z, w = features[others], target[others], w[others]
        # the ridge is on coefficients of x = rho: the same as here, since those of alpha are the same beta
        gram = (x * w[:, None]).T @ x + ridge * unit * torch.eye(x.shape[1], dtype=torch.float64)
        beta = torch.linalg.solve(gram, (x * w[:, None]).T @ z)
        out[i, t] = ratios[i, t] * (target[i] - features[i] @ beta)
    return out


@pytest.mark.parametrize("layers", LAYERS)
def test_leave_one_out_in_closed_form_is_refitting(layers: str):
    """Both forms of it (groups of 3 have fewer responses than layers, of 9 more), with groups of different size in any order."""
    made = Enumerated(8, end_token=True, size=(3, 5))
    drawn = made.drawn(1, 19)
    order = torch.randperm(19, generator=made.generator)
    for ids in (torch.arange(19) // 3, torch.arange(19) // 9):
        ids[-1] = ids[-2]
        batch = replace(drawn, group_ids=ids[order])
        told: dict[str, Any] = {"layers": layers, "ridge": 0.7, "block_size": 2}
        out = hierarchical_advantages(batch, diagnostics=False, **told).advantages.double()
        assert torch.allclose(out, refitted(batch, layers, 0.7), atol=2e-5, rtol=1e-4)


def test_a_ridge_counts_in_the_score_norms_of_the_others():
    """A policy whose scores are all 1/8 as large gets the same baselines; one that is sure of every token has nothing to fit and gets RLOO's."""
    drawn = Enumerated(9).drawn(5, 8)
    assert drawn.score_norms is not None
    out = hierarchical_advantages(drawn, diagnostics=False).advantages
    smaller = hierarchical_advantages(
        replace(drawn, score_norms=drawn.score_norms / 64), diagnostics=False
    ).advantages
    assert torch.allclose(out, smaller, rtol=1e-6)
    certain = hierarchical_advantages(
        replace(drawn, score_norms=drawn.score_norms * 0), diagnostics=False
    ).advantages
    ratio = (drawn.old_logprobs - drawn.rollout_logprobs).sum(1, keepdim=True).exp()  # type: ignore[operator]
    assert torch.allclose(certain, ratio.float() * rloo_advantages(drawn).advantages, rtol=1e-5)
    assert power_of_two(
        torch.tensor([[3.0, 4.0], [8.9, 8.0], [0.0, 3.0], [1.0, 0.0]])
    ).tolist() == [1.0, 1.0, 1.0, 1.0]
    assert power_of_two(torch.tensor([[0.7, 4.0], [9.0, 2.0]])).tolist() == [0.125, 4.0]


def test_strengths_leave_their_start_for_a_gain_beyond_its_error():
    """Corrections that are half of what they should be (best strength on the grid: 1), nothing, and noise."""
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    noise = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    ones, start = (
        torch.ones(60, 8, 1, dtype=torch.float64),
        torch.tensor([0.0, 0.3], dtype=torch.float64),
    )

    def chosen(pooled: Tensor, own: Tensor, groups: int = 60) -> list[float]:
        corrections = torch.stack([pooled, own], dim=-1)[:groups, :, None]
        return cautious_strengths(
            Gains.of(ones[:groups], target[:groups], corrections), start
        ).tolist()

    assert chosen(target / 2, 0 * target)[0] == 1.0
    assert chosen(0 * target, target / 2)[1] == 1.0
    assert chosen(0 * target, 0 * target) == start.tolist()
    assert chosen(0 * target, 3 * noise)[1] == 0.0
    assert (
        chosen(target / 2, 0 * target, groups=1) == start.tolist()
    )  # one group cannot say how sure it is
    assert (
        chosen(target / 20, 0 * target, groups=3) == start.tolist()
    )  # nor can three of a small gain


@pytest.mark.parametrize("groups", [2, 3, 12])
@pytest.mark.parametrize(
    ("scope", "unused"), [("group", "strength_batch"), ("batch", "strength_group")]
)
def test_a_scope_uses_its_own_fit_alone(scope: str, unused: str, groups: int):
    """What is not fitted saves nothing at any strength: which of them is the best is then for rounding to say."""
    prompts = [LearntPrompt(seed) for seed in range(groups)]
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        batch = joined(prompts, [p.draw(16, generator) for p in prompts])
        assert hierarchical_advantages(batch, scope=scope).diagnostics[unused] == 0


def test_layers_are_where_the_ratios_are():
    """On the meta device, which computes nothing and refuses to mix."""
    meta = torch.device("meta")
    layers = Layers.of("blocks", 9, 4, meta)
    ratios, positions = (
        torch.empty(2, 3, 9, device=meta),
        torch.empty(9, dtype=torch.int64, device=meta),
    )
    assert (
        layers.features(ratios, positions).device
        == layers.kernel(ratios, positions, ratios.transpose(1, 2)).device
        == meta
    )


# Promises


def test_padding_tool_tokens_and_order():
    made = Enumerated(11, end_token=True, size=(3, 5))
    drawn = made.drawn(5, 6)
    mask = drawn.response_mask.clone()
    mask[::3, 1] = False  # a tool wrote these: whatever the log-probabilities there say
    drawn = replace(drawn, response_mask=mask)
    out = hierarchical_advantages(drawn).advantages
    assert out.dtype == torch.float64
    assert (out[~mask] == 0).all()
    junk = replace(drawn, old_logprobs=torch.where(mask, drawn.old_logprobs, torch.nan))  # type: ignore[arg-type]
    assert torch.equal(hierarchical_advantages(junk).advantages, out)

    order = torch.randperm(6, generator=made.generator) + 6 * torch.arange(5)[:, None]
    moved = {
        name: getattr(drawn, name)[order.flatten()]
        for name in ("rewards", "group_ids", "response_mask", "score_norms")
    }
    moved |= {
        name: getattr(drawn, name)[order.flatten()] for name in ("rollout_logprobs", "old_logprobs")
    }
    assert torch.allclose(
        hierarchical_advantages(AdvantageInputs(**moved)).advantages,
        out[order.flatten()],
        atol=1e-5,
    )


def test_scale_and_shift_of_the_rewards():
    drawn = Enumerated(12).drawn(6, 8)
    out = hierarchical_advantages(drawn).advantages
    assert torch.allclose(
        hierarchical_advantages(replace(drawn, rewards=drawn.rewards + 7)).advantages,
        out,
        atol=1e-5,
    )
    assert torch.allclose(
        hierarchical_advantages(replace(drawn, rewards=drawn.rewards * 3)).advantages,
        3 * out,
        atol=1e-5,
    )


def test_a_long_batch_is_finite_and_zero_drift_stays_zero():
    """2,000 tokens, log-ratios up to 40: products of ratios up to 1e69 must not spoil the small ones."""
    generator = torch.Generator().manual_seed(3)
    old = -torch.rand(24, 2000, generator=generator)
    noise = torch.randn(24, 2000, generator=generator) * 0.4
    drawn = AdvantageInputs(
        rewards=torch.randint(0, 2, (24,), generator=generator).float(),
        response_mask=torch.ones(24, 2000, dtype=torch.bool),
        group_ids=torch.arange(24) // 8,
        rollout_logprobs=old - noise,
        old_logprobs=old,
        score_norms=torch.ones_like(old),
    )
    for layers in ("final", "current_and_final", "blocks"):
        out = hierarchical_advantages(drawn, layers=layers)
        assert torch.isfinite(out.advantages).all()
        assert all(value == value for value in out.diagnostics.values())


def test_lower_variance_than_leave_one_out_and_no_bias_where_the_policy_has_learnt():
    """16 prompts x 16 responses, sampler behind along the gradient, 120 batches. The ratio is about 0.6 (docs); the bias of P = 192 parameters is
    a chi-squared of 192 degrees in units of its error: above 1.45 per parameter with probability below 1e-4."""
    prompts = [LearntPrompt(seed) for seed in range(16)]
    generator, errors = torch.Generator().manual_seed(1), []
    for _ in range(120):
        drawn = [p.draw(16, generator) for p in prompts]
        batch = joined(prompts, drawn)
        ratio = torch.stack(
            [p.ratios[d, -1] for p, d in zip(prompts, drawn, strict=True)]
        ).flatten()[:, None]
        both = torch.stack(
            [
                hierarchical_advantages(batch, diagnostics=False).advantages.double(),
                ratio * rloo_advantages(batch).advantages,
            ]
        )
        scores = torch.stack([p.scores[d] for p, d in zip(prompts, drawn, strict=True)])
        estimate = torch.einsum("mkgt,kgtp->mkp", both.reshape(2, 16, 16, -1), scores) / 16
        errors.append(estimate - torch.stack([p.gradient for p in prompts]))
    error = torch.stack(errors)  # [N, 2, K, P]
    ours, theirs = error.square().sum((0, 2, 3)).tolist()
    assert ours < 0.75 * theirs
    standardised = error[:, 0].mean(0) / (error[:, 0].std(0) / 120**0.5)
    assert float(standardised.square().mean()) < 1.45


def test_what_has_a_large_score_is_what_a_baseline_is_for():
    """Right where the policy is sure of its tokens, as language models are: wrong responses have the large scores.

    300 groups of 16, little drift; the best single baseline has 0.7 of the variance.
    """
    made = Enumerated(13, drift=0.1, scale=2.0)
    norms = made.scores.square().sum((1, 2))
    made.rewards = (norms < made.mean(norms)).double()
    made.gradient = made.space.gradient(made.old, made.rewards)
    drawn = torch.multinomial(
        made.probability, 300 * 16, replacement=True, generator=made.generator
    )
    batch = made.space.inputs(
        drawn, made.rewards, made.rollout, made.old, torch.arange(300).repeat_interleave(16)
    )

    def error(weights: Tensor) -> float:
        gradients = (
            torch.einsum("bt,btp->bp", weights.double(), made.scores[drawn])
            .unflatten(0, (300, 16))
            .mean(1)
        )
        return float((gradients - made.gradient).square().sum())

    plain = error(made.ratios[drawn, -1:] * rloo_advantages(batch).advantages)
    assert error(hierarchical_advantages(batch, diagnostics=False).advantages) < 0.7 * plain


# Diagnostics and bad input


def test_diagnostics_compare_every_baseline_at_the_same_positions():
    drawn = Enumerated(13, end_token=True).drawn(6, 8)
    found = hierarchical_advantages(drawn, log_ratio_clip=0.5).diagnostics
    names = {
        "none",
        "group_mean",
        "leave_one_out",
        "opo",
        "optimal_token",
        "used",
        "final",
        "current",
        "current_and_final",
        "blocks",
    }
    assert {key.split("/")[1] for key in found if key.startswith("variance_ratio/")} == names
    assert found["variance_ratio/leave_one_out"] == 1
    assert found["variance_ratio/used"] == pytest.approx(
        found["variance_ratio/current_and_final"], rel=1e-6
    )  # the default layers
    assert found["won"] == float(found["variance_ratio/used"] < 1)
    assert 0 < found["clipped_share"] < 1
    shares = [name for name in found if name.startswith("effective_share/")]
    assert shares == [
        f"effective_share/at_{percent}"
        for percent in ["000", "012", "025", "037", "050", "062", "075", "087", "100"]
    ]
    assert shares == sorted(shares)
    assert 0 < found["effective_share/at_100"] < found["effective_share/at_000"] <= 1
    assert found["condition_number"] >= 1


def test_effective_shares_over_position():
    """Two responses of 3 tokens with ratios (1, 3) at the middle: (1 + 3)^2 / (2 (1 + 9)) = 0.8. One is left at the end: 1."""
    ratios = torch.tensor([[[1.0, 1.0, 1.0], [1.0, 3.0, 9.0]]], dtype=torch.float64)
    alive = torch.tensor([[[True, True, False], [True, True, True]]])
    found = effective_shares(ratios, alive)
    assert [
        found[f"effective_share/at_{percent}"] for percent in ("000", "037", "050", "087", "100")
    ] == [1, 1, 0.8, 0.8, 1]
    alive[:, :, 1] = False  # a tool's token, in both
    assert list(effective_shares(ratios, alive)) == [
        f"effective_share/at_{percent}" for percent in ("000", "012", "025", "037", "100")
    ]


@pytest.mark.parametrize(
    ("change", "parameters", "message"),
    [
        ({"rollout_logprobs": None}, {}, "needs rollout_logprobs.*The engine must return"),
        ({"old_logprobs": None}, {}, r"needs old_logprobs.*before the update"),
        ({"score_norms": None}, {}, "needs score_norms.*with old_logprobs"),
        ({"rewards": torch.full((8,), torch.nan)}, {}, "rewards: not all are finite"),
        ({"score_norms": torch.full((8, 4), -1.0)}, {}, "score_norms: values .* at least 0"),
        (
            {"old_logprobs": torch.full((8, 4), torch.inf)},
            {},
            r"old_logprobs: \d+ values inside the response mask are not finite, first at \(0, 0\)",
        ),
        (
            {"old_logprobs": torch.full((8, 4), 60.0)},
            {},
            r"log-ratio of response 0 reaches .* set .*log_ratio_clip",
        ),
        ({}, {"layers": "last"}, "parameters.layers: 'last' is none of final, current"),
        ({}, {"layers": "blocks", "block_size": 0}, "block_size: 0 must be at least 1"),
        ({}, {"ridge": -1.0}, "ridge: -1.0 must be finite and at least 0"),
        ({}, {"scope": "world"}, "scope: 'world' is none of auto, group, batch"),
        ({}, {"solver": "svd"}, "solver: 'svd' is none of"),
        ({}, {"log_ratio_clip": 0.0}, "log_ratio_clip: 0.0 must be positive"),
    ],
)
def test_bad_input_says_what_to_do(
    change: dict[str, Any], parameters: dict[str, Any], message: str
):
    drawn = Enumerated(14).drawn(1, 8)
    with pytest.raises(ValueError, match=message):
        run_estimator("hierarchical", replace(drawn, **change), parameters)


def test_all_layers_of_a_long_response_are_refused():
    long = torch.zeros(2, 600)
    made = AdvantageInputs(
        rewards=torch.tensor([0.0, 1.0]),
        response_mask=long == 0,
        group_ids=torch.zeros(2, dtype=torch.int64),
        rollout_logprobs=long,
        old_logprobs=long,
        score_norms=long,
    )
    with pytest.raises(ValueError, match="'all' takes at most 512 tokens, these are 600"):
        hierarchical_advantages(made, layers="all")
