"""KL terms: exact gradients of each estimator in each place, refusals, adaptive coefficients."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.grpo_math import grpo_math
from rlsys.algorithms.kl import (
    KLLossTerms,
    adapted_coefficient,
    adapted_penalty,
    check_kl_loss,
    exact_token_kl,
    kl_estimate,
    kl_loss,
    kl_rewards,
    old_policy_kl,
)
from rlsys.algorithms.loss_aggregation import aggregate_loss
from rlsys.algorithms.policy_objectives import PolicyObjectiveInputs, policy_objective
from rlsys.config import KLConfig, OldKLConfig, RunConfig
from rlsys.config.hardware import Hardware
from rlsys.config.presets import PRESETS
from rlsys.run.directory import RunDirectory
from rlsys.run.preflight import config_mistakes
from tests.support.enumerable_policy import ResponseSpace

EXACT = 1e-12
HARDWARE = Hardware(gpus=0, gpu_memory_gib=0, cpus=2, memory_gib=8)


@dataclass(frozen=True)
class Case:
    """Responses of one to `length` tokens, the live policy, an older sampler, and the reference."""

    space: ResponseSpace
    live: Tensor
    old: Tensor
    ref: Tensor

    @staticmethod
    def random(length: int = 3, seed: int = 0) -> Case:
        generator = torch.Generator().manual_seed(seed)
        space = ResponseSpace.of(3, length, end_token=True)
        live, drift, ref = (space.random_logits(generator) for _ in range(3))
        return Case(space, live, live + 0.5 * drift, ref)

    def kl(self, table: Tensor, direction: str = "reverse") -> Tensor:
        """The KL of whole responses."""
        logs, ref = self.space.logprobs(table).sum(1), self.space.logprobs(self.ref).sum(1)
        if direction == "forward":
            return (ref.exp() * (ref - logs)).sum()
        return (logs.exp() * (logs - ref)).sum()

    def kl_gradient(self, direction: str = "reverse") -> Tensor:
        table = self.live.clone().requires_grad_()
        return torch.autograd.grad(self.kl(table, direction), table)[0]

    def loss_gradient(self, terms: KLLossTerms, sampler: Tensor) -> Tensor:
        """The expected gradient of `kl_loss` summed over tokens, over responses of `sampler`."""
        table = self.live.clone().requires_grad_()
        old = self.space.logprobs(sampler)
        values = kl_loss(
            self.space.logprobs(table), old, self.space.logprobs(self.ref), self.space.mask, terms
        )
        chances = self.space.probabilities(sampler)
        return torch.autograd.grad((chances * values.sum(1)).sum(), table)[0]

    def score_gradient(self, table: Tensor, costs: Tensor) -> Tensor:
        """Return the policy gradient of costs, E_pi[sum_t grad log pi_t sum_{s>=t} c_s]."""
        to_go = torch.where(self.space.mask, costs, 0.0).flip(1).cumsum(1).flip(1)
        scores = self.space.scores(table)
        flat = torch.einsum("s,st,stp->p", self.space.probabilities(table), to_go, scores)
        return flat.reshape(table.shape)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max())


def test_k1_in_the_reward_is_the_gradient_of_the_kl_of_whole_responses():
    case = Case.random()
    logs, ref = case.space.logprobs(case.live), case.space.logprobs(case.ref)
    costs = -kl_rewards(logs, ref, case.space.mask, 1.0)
    assert error(case.score_gradient(case.live, costs), case.kl_gradient()) < EXACT


@pytest.mark.parametrize(("kind", "reaches"), [("k1", True), ("k2", False), ("k3", False)])
def test_exact_steps_reach_the_reference_with_k1_alone(kind: str, reaches: bool):
    """Without other rewards k1 approaches the reference, k2 and k3 leave it; hence the refusal."""
    case = Case.random(length=2)
    ref = case.space.logprobs(case.ref)

    def costs(logs: Tensor) -> Tensor:
        return (
            -kl_rewards(logs, ref, case.space.mask, 1.0)
            if kind == "k1"
            else kl_estimate(logs, ref, kind)
        )

    table = case.ref + 0.1 * (case.live - case.ref)
    before = float(case.kl(table))
    for _ in range(600):
        table = table - 3 * case.score_gradient(table, costs(case.space.logprobs(table)))
    after = float(case.kl(table))
    assert after < 1e-7 if reaches else after > 20 * before


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize(
    ("terms", "direction"),
    [
        (KLLossTerms("k1", importance_ratio="prefix"), "reverse"),
        (KLLossTerms("k3", importance_ratio="prefix"), "reverse"),
        (KLLossTerms("k1", "reverse", "sequence", "product"), "reverse"),
        (KLLossTerms("k2", "reverse", "sequence", "product"), "reverse"),
        (KLLossTerms("k3", "reverse", "sequence", "product"), "reverse"),
        (KLLossTerms("k3_k2", "reverse", "sequence", "product"), "reverse"),
        (KLLossTerms("k1", "forward", "sequence", "product"), "forward"),
        (KLLossTerms("k3", "forward", "sequence", "product"), "forward"),
    ],
)
def test_with_its_ratio_a_kl_loss_has_the_gradient_of_the_kl_of_whole_responses(
    terms: KLLossTerms, direction: str, stale: bool, seed: int
):
    case = Case.random(seed=seed)
    found = case.loss_gradient(terms, case.old if stale else case.live)
    assert error(found, case.kl_gradient(direction)) < EXACT


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize(
    ("kind", "direction"),
    [
        ("k1", "reverse"),
        ("k2", "reverse"),
        ("k3", "reverse"),
        ("k3_k2", "reverse"),
        ("k1", "forward"),
        ("k3", "forward"),
    ],
)
def test_the_token_ratio_is_exact_for_responses_of_one_token(
    kind: str, direction: str, stale: bool
):
    case = Case.random(length=1)
    terms = KLLossTerms(kind, direction, importance_ratio="token")
    found = case.loss_gradient(terms, case.old if stale else case.live)
    assert error(found, case.kl_gradient(direction)) < EXACT
    # Over whole responses it lacks what a token does to later ones.
    longer = Case.random(length=3)
    found = longer.loss_gradient(terms, longer.old if stale else longer.live)
    assert error(found, longer.kl_gradient(direction)) > 0.01


@pytest.mark.parametrize(
    ("terms", "direction"),
    [
        (KLLossTerms("k2"), "reverse"),
        (KLLossTerms("k3_k2"), "reverse"),
        (KLLossTerms("k3"), "forward"),
        (KLLossTerms("k2", level="sequence"), "reverse"),
        (KLLossTerms("k3", level="sequence"), "forward"),
    ],
)
def test_without_a_ratio_a_kl_loss_is_right_on_policy_alone(terms: KLLossTerms, direction: str):
    """They are exact for one token, or at level `sequence` for whole responses.

    With stale samples the error is more than 5 %.
    """
    case = Case.random(length=3 if terms.level == "sequence" else 1)
    exact = case.kl_gradient(direction)
    assert error(case.loss_gradient(terms, case.live), exact) < EXACT
    stale = case.loss_gradient(terms, case.old)
    assert float((stale - exact).norm() / exact.norm()) > 0.05


def test_k2_over_whole_responses_is_the_kl_of_each_position_at_held_prefixes():
    """The gradient is that of sum_t E_prefix KL(pi(.|prefix) || ref(.|prefix)).

    The probabilities of the prefixes are held constant.
    """
    case = Case.random()
    found = case.loss_gradient(KLLossTerms("k2"), case.live)
    table = case.live.clone().requires_grad_()
    logs, ref = table.log_softmax(1), case.ref.log_softmax(1)
    of_row = (logs.exp() * (logs - ref)).sum(1)
    visits = case.space.probabilities(case.live)
    held = torch.where(case.space.mask, of_row[case.space.rows], 0.0).sum(1)
    (expected,) = torch.autograd.grad((visits * held).sum(), table)
    assert error(found, expected) < EXACT
    assert error(found, case.kl_gradient()) > 0.01


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (KLLossTerms("k1"), r"algorithm\.kl\.kind: 'k1' in the loss has the mean gradient 0"),
        (KLLossTerms("k1", level="sequence"), r"kind: 'k1' in the loss has the mean gradient 0"),
        (KLLossTerms("k1", "forward"), r"algorithm\.kl\.direction: 'forward' with kind 'k1'"),
        (KLLossTerms("k3", "forward"), r"Set algorithm\.kl\.importance_ratio"),
        (KLLossTerms("k2", "forward", "token", "token"), r"algorithm\.kl\.kind: 'k2' of the forw"),
        (KLLossTerms("k3_k2", "forward"), r"algorithm\.kl\.kind: 'k3_k2' has the gradient"),
        (KLLossTerms("k3", "reverse", "sequence", "prefix"), r"importance_ratio: 'prefix' weighs"),
        (KLLossTerms("k3", "reverse", "token", "product"), "Choose prefix"),
        (KLLossTerms("k3", level="word"), r"algorithm\.kl\.level: unknown 'word'"),
        (KLLossTerms("k3", importance_ratio="all"), r"importance_ratio: unknown 'all'"),
        (KLLossTerms("k4"), r"algorithm\.kl\.kind: unknown estimator 'k4'"),
        (KLLossTerms("k3", "back"), r"algorithm\.kl\.direction: unknown 'back'"),
    ],
)
def test_a_loss_refuses_terms_without_the_gradient_of_a_kl(terms: KLLossTerms, message: str):
    with pytest.raises(ValueError, match=message):
        check_kl_loss(terms)


def test_every_accepted_kl_loss_is_a_kl_for_one_token():
    """Every accepted combination of fields has the gradient of one of the two KLs.

    This is for one token, on-policy.
    """
    case = Case.random(length=1)
    targets = [case.kl_gradient("reverse"), case.kl_gradient("forward")]
    checked = 0
    for kind, direction, level, ratio in itertools.product(
        ("k1", "k2", "k3", "k3_k2"),
        ("reverse", "forward"),
        ("token", "sequence"),
        ("none", "token", "prefix", "product"),
    ):
        terms = KLLossTerms(kind, direction, level, ratio)
        try:
            check_kl_loss(terms)
        except ValueError:
            continue
        found = case.loss_gradient(terms, case.live)
        assert min(error(found, exact) for exact in targets) < EXACT, terms
        checked += 1
    assert checked == 24


def slow_kl_loss(
    logprobs: list[float], old: list[float], ref: list[float], terms: KLLossTerms
) -> list[tuple[float, float]]:
    """Return (value, gradient of the sum of the values) of each token of one response, by formula.

    The gradient is with respect to the token's own log-probability.

    Values k(d), slopes k'(d): k1 (d, 1), k2 (d^2/2, d), k3 (r - 1 + d, 1 - r), r = e^-d; w's own
    slope is w.
    """
    d = [a - b for a, b in zip(logprobs, ref, strict=True)]
    steps = [a - b for a, b in zip(logprobs, old, strict=True)]
    if terms.level == "sequence":
        d = [sum(d)] * len(d)
    value = {"k1": lambda x: x, "k2": lambda x: x * x / 2, "k3": lambda x: math.exp(-x) - 1 + x}
    slope = {"k1": lambda x: 1.0, "k2": lambda x: x, "k3": lambda x: 1 - math.exp(-x)}
    k, s = value[terms.kind], slope[terms.kind]
    logs = {
        "none": [0.0] * len(d),
        "token": steps,
        "prefix": [sum(steps[: t + 1]) for t in range(len(d))],
        "product": [sum(steps)] * len(d),
    }[terms.importance_ratio]
    weights = [math.exp(x) for x in logs]
    flows = terms.importance_ratio != "none" and terms.kind != "k2"
    out = []
    for t in range(len(d)):
        gradient = weights[t] * s(d[t])
        if flows:
            reached = range(t, len(d)) if terms.importance_ratio == "prefix" else [t]
            gradient += sum(weights[u] * k(d[u]) for u in reached)
        out.append((weights[t] * k(d[t]), gradient))
    return out


@pytest.mark.parametrize(
    "terms",
    [
        KLLossTerms("k2"),
        KLLossTerms("k3"),
        *(
            KLLossTerms(kind, importance_ratio=ratio)
            for kind in ("k1", "k2", "k3")
            for ratio in ("token", "prefix")
        ),
        *(KLLossTerms(kind, level="sequence") for kind in ("k2", "k3")),
        *(KLLossTerms(kind, "reverse", "sequence", "product") for kind in ("k1", "k2", "k3")),
    ],
)
def test_kl_loss_against_a_slow_twin(terms: KLLossTerms):
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[True, True, True, True], [True, False, True, False], [False] * 4])
    live, old, ref = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    live.requires_grad_()
    values = kl_loss(live, old, ref, mask, terms)
    values.sum().backward()
    assert live.grad is not None
    for row in range(3):
        inside = mask[row]
        slow = slow_kl_loss(
            live[row][inside].tolist(), old[row][inside].tolist(), ref[row][inside].tolist(), terms
        )
        assert values[row][inside].tolist() == pytest.approx([value for value, _ in slow])
        assert live.grad[row][inside].tolist() == pytest.approx([slope for _, slope in slow])
    assert (values[~mask] == 0).all()
    assert (live.grad[~mask] == 0).all()


def test_response_level_k3_golden():
    # log-ratios to the reference log 2 and log 3, D = log 6: k3 = 1/6 - 1 + log 6 at both tokens,
    # slope 1 - 1/6
    live = torch.tensor([[2.0, 3.0]], dtype=torch.float64).log().requires_grad_()
    zeros, mask = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
    values = kl_loss(live, zeros, zeros, mask, KLLossTerms("k3", level="sequence"))
    values.sum().backward()
    assert live.grad is not None
    assert values[0].tolist() == pytest.approx([math.log(6) - 5 / 6] * 2)
    assert live.grad[0].tolist() == pytest.approx([5 / 6] * 2)


def test_response_level_grpo_is_its_equation():
    """The gradient is that of Guo et al. 2025, equations 1 to 3, by autograd.

    (1/G) sum_i min(r_i A_i, clip(r_i) A_i) - beta k3_i, r_i of whole responses.
    """
    preset, case = PRESETS["grpo_response"].algorithm, Case.random(seed=4)
    space, beta = case.space, preset.kl.coefficient
    advantages = torch.linspace(-1, 1, len(space.tokens), dtype=torch.float64)
    old, ref = space.logprobs(case.old), space.logprobs(case.ref)

    table = case.live.clone().requires_grad_()
    logs = space.logprobs(table)
    objective = policy_objective(
        PolicyObjectiveInputs(
            logprobs=logs,
            old_logprobs=old,
            advantages=torch.where(space.mask, advantages[:, None], 0.0),
            response_mask=space.mask,
        ),
        ratio=preset.objective.ratio,
        weight=preset.objective.weight,
        **preset.objective.parameters,
    )
    terms = KLLossTerms(preset.kl.estimator, preset.kl.direction, preset.kl.level)
    losses = objective.token_losses + beta * kl_loss(logs, old, ref, space.mask, terms)
    (found,) = torch.autograd.grad(aggregate_loss(losses, space.mask, preset.aggregation), table)

    table = case.live.clone().requires_grad_()
    whole = space.logprobs(table).sum(1)
    ratio, to_ref = (whole - old.sum(1)).exp(), (ref.sum(1) - whole).exp()
    clipped = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    equation = clipped - beta * (to_ref - to_ref.log() - 1)
    (exact,) = torch.autograd.grad(-equation.mean(), table)
    assert error(found, exact) < EXACT


def test_kl_rewards_golden_and_masked():
    mask = torch.tensor([[True, True, False]])
    costs = kl_rewards(
        torch.tensor([[-1.0, -2.0, math.nan]]), torch.tensor([[-1.5, -math.inf, 0.0]]), mask, 0.1
    )
    # d = 0.5 costs 0.05; a token of probability 0 under the reference counts as one of
    # log-probability -10,000
    assert costs[0].tolist() == pytest.approx([-0.05, -0.1 * 9998, 0.0])


def test_old_policy_kl_is_exact_for_samples_of_the_old_policy():
    """Value and gradient of KL(old || live) of whole responses; both 0 at the old policy."""
    case = Case.random(seed=5)
    space, old = case.space, case.space.logprobs(case.old)
    chances = old.sum(1).exp()
    table = case.live.clone().requires_grad_()
    estimate = torch.where(space.mask, old_policy_kl(space.logprobs(table), old), 0.0)
    found = (chances * estimate.sum(1)).sum()
    exact = (chances * (old - space.logprobs(table)).sum(1)).sum()
    assert found.item() == pytest.approx(exact.item(), abs=EXACT)
    assert error(torch.autograd.grad(found, table)[0], torch.autograd.grad(exact, table)[0]) < EXACT
    same = old.clone().requires_grad_()
    at_old = old_policy_kl(same, old)
    assert (at_old == 0).all()
    assert (torch.autograd.grad(at_old.sum(), same)[0] == 0).all()


def test_old_policy_kl_golden_and_finite():
    # rho = 2: 2 - 1 - log 2, slope 1; far away the value is capped and the slope stays
    live = torch.tensor([math.log(2.0), 90.0, -90.0], dtype=torch.float64, requires_grad=True)
    values = old_policy_kl(live, torch.zeros(3, dtype=torch.float64))
    values.sum().backward()
    assert live.grad is not None
    assert values.tolist() == pytest.approx(
        [1 - math.log(2), math.exp(20) - 91, math.exp(-20) + 89]
    )
    assert live.grad.tolist() == pytest.approx([1.0, math.exp(20) - 1, math.exp(-20) - 1])


def test_adapted_penalty_golden():
    assert adapted_penalty(1.0, 0.016, target=0.01) == 2.0
    assert adapted_penalty(1.0, 0.014, target=0.01) == 1.0
    assert adapted_penalty(1.0, 0.007, target=0.01) == 1.0
    assert adapted_penalty(1.0, 0.006, target=0.01) == 0.5


def test_a_kl_that_is_not_a_number_changes_no_coefficient():
    assert adapted_coefficient(0.1, math.nan, target=1.0, horizon=10) == 0.1
    assert adapted_penalty(0.1, math.nan, target=1.0) == 0.1


def test_exact_token_kl_golden():
    # pi (1/2, 1/2), ref (1/4, 3/4): (log 2 + log(2/3)) / 2 = log(4/3) / 2
    ref = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
    found = exact_token_kl(torch.zeros(2, dtype=torch.float64), ref)
    assert float(found) == pytest.approx(math.log(4 / 3) / 2)
    # temperature 2 halves logits: log 3 becomes log(3) / 2, ref (1, sqrt 3) / (1 + sqrt 3)
    share = 1 / (1 + 3**0.5)
    found = exact_token_kl(torch.zeros(2, dtype=torch.float64), ref, temperature=2.0)
    assert float(found) == pytest.approx(-math.log(4 * share * (1 - share)) / 2)
    masked = torch.tensor([0.0, -math.inf], requires_grad=True)
    value = exact_token_kl(masked, torch.tensor([0.0, 0.0]))
    value.backward()
    assert value.item() == pytest.approx(math.log(2.0))
    assert masked.grad is not None
    assert masked.grad.isfinite().all()
    with pytest.raises(ValueError, match="must have one shape"):
        exact_token_kl(torch.zeros(2), torch.zeros(3))


def test_exact_token_kl_is_the_mean_of_k1_with_less_variance():
    case = Case.random(length=1)
    logs, ref = case.space.logprobs(case.live)[:, 0], case.space.logprobs(case.ref)[:, 0]
    exact = exact_token_kl(case.live, case.ref)[0]
    assert float((logs.exp() * (logs - ref)).sum()) == pytest.approx(float(exact), abs=EXACT)


def test_exact_token_kl_needs_the_loss_and_the_later_rewards_together():
    """The sum of reward and loss is exact.

    As a reward alone it lacks each position's own gradient, as a loss alone the effect on later
    tokens.
    """
    case = Case.random(seed=6)
    space = case.space
    table = case.live.clone().requires_grad_()
    of_row = exact_token_kl(table, case.ref)
    costs = torch.where(space.mask, of_row[space.rows], 0.0)
    chances = space.probabilities(case.live)
    (own,) = torch.autograd.grad((chances * costs.sum(1)).sum(), table)
    later = case.score_gradient(case.live, costs.detach())  # c_t has mean score 0 at t itself
    exact = case.kl_gradient()
    assert error(own + later, exact) < EXACT
    assert error(later, exact) > 0.01
    assert error(own, exact) > 0.01
    one = Case.random(length=1)
    nothing = one.score_gradient(one.live, exact_token_kl(one.live, one.ref)[one.space.rows])
    assert float(nothing.abs().max()) < EXACT


def configured(tmp_path: Path, **algorithm: Any) -> list[str]:
    """The lines with which a run of `grpo_math` with these fields of the algorithm is refused."""
    default = grpo_math(HARDWARE)
    policy = default.policy.model_copy(
        update={"ranks": 1, "num_mini_batches": algorithm.pop("num_mini_batches", 1)}
    )
    config: RunConfig = default.model_copy(
        update={
            "algorithm": default.algorithm.model_copy(update=algorithm),
            "policy": policy,
            "model": default.model.model_copy(update={"path": "tiny"}),
        }
    )
    return config_mistakes(config, RunDirectory(tmp_path / "run"), HARDWARE, resume=False)


@pytest.mark.parametrize(
    ("kl", "field", "remedy"),
    [
        *(
            (
                {"placement": "reward", "kind": kind},
                f"algorithm.kl.kind: '{kind}' with placement 'reward' drives the policy away",
                "Leave kind null",
            )
            for kind in ("k2", "k3", "k3_k2")
        ),
        (
            {"placement": "reward", "direction": "forward"},
            "algorithm.kl.direction: 'forward' with placement 'reward'",
            "Set direction reverse",
        ),
        (
            {"placement": "reward", "level": "sequence"},
            "algorithm.kl.level: 'sequence' is for the KL in the loss",
            "Set token",
        ),
        (
            {"placement": "reward", "importance_ratio": "token"},
            "algorithm.kl.importance_ratio: 'token' is for the KL in the loss",
            "Set none",
        ),
        ({"kind": "k1"}, "algorithm.kl.kind: 'k1' in the loss", "place k1 in the reward"),
        (
            {"level": "sequence"},
            "algorithm.aggregation: 'token_mean' with algorithm.kl.level 'sequence'",
            "Choose sequence_sum",
        ),
        (
            {"direction": "forward"},
            "algorithm.kl.direction: 'forward' with kind 'k3'",
            "Set algorithm.kl.importance_ratio",
        ),
        (
            {"kind": "exact", "direction": "forward"},
            "algorithm.kl.direction: 'forward' is for estimates",
            "Set reverse",
        ),
        (
            {"kind": "exact", "importance_ratio": "token"},
            "algorithm.kl.importance_ratio: 'token' is for estimates",
            "Set none",
        ),
        (
            {"kind": "exact", "placement": "reward"},  # grpo divides by the deviation
            "algorithm.kl.kind: 'exact' in the reward",
            "Set placement loss, kind k1",
        ),
    ],
)
def test_a_run_refuses_a_kl_without_the_gradient_of_a_kl(
    tmp_path: Path, kl: dict[str, Any], field: str, remedy: str
):
    (line,) = configured(tmp_path, kl=KLConfig(coefficient=0.1, **kl))
    assert line.startswith(field)
    assert remedy in line


@pytest.mark.parametrize(
    "kl",
    [
        {},
        {"placement": "reward"},
        {"placement": "reward", "kind": "k1"},
        {"kind": "k3_k2", "importance_ratio": "token"},
        {"kind": "exact"},
        {"kind": "k1", "importance_ratio": "prefix"},
        {"direction": "forward", "importance_ratio": "token"},
        {"level": "sequence", "importance_ratio": "product"},
    ],
)
def test_a_run_accepts_what_has_it(tmp_path: Path, kl: dict[str, Any]):
    assert configured(tmp_path, kl=KLConfig(coefficient=0.1, **kl), aggregation="constant") == []


def test_the_default_kind_is_the_right_one_for_the_placement():
    kinds = {
        place: KLConfig(placement=place).estimator for place in ("loss", "reward", "advantage")
    }
    assert kinds == {"loss": "k3", "reward": "k1", "advantage": "k1"}
    assert KLConfig(kind="k2").estimator == "k2"


def test_a_penalty_to_the_old_policy_needs_an_old_policy(tmp_path: Path):
    (line,) = configured(tmp_path, kl_old=OldKLConfig(coefficient=1.0))
    assert line.startswith(
        "algorithm.kl_old.coefficient: 1 does nothing in the one update per batch"
    )
    assert configured(tmp_path, kl_old=OldKLConfig(coefficient=1.0), num_mini_batches=2) == []
    (line,) = configured(tmp_path, kl_old=OldKLConfig(target=0.01), num_mini_batches=2)
    assert "Set algorithm.kl_old.coefficient" in line
