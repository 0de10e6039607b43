"""The documented gradients: of the regularised objective, and of each method's own formula.

`true_gradient` differentiates the exact expectation. `Stated` is the score-function form of a
method's docstring, in loops over responses and tokens: it shares no code with the library, so that
an error there is not repeated here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.campaigns.enumeration_cases import BONUS, TEMPERATURE, Case
from benchmarks.campaigns.enumeration_pipeline import (
    EARLIER,
    World,
    parts_of,
    squared_score_norms,
)

Array = NDArray[np.float64]
MAX_LOG_RATIO = 20.0  # where the documents say that a ratio is capped


def true_gradient(case: Case, world: World) -> tuple[Tensor, bool]:
    """Return the gradient of the configured objective, and whether its length is stated too.

        J = f E[R] - beta KL + alpha H

    at the live policy, divided by the divisor of `aggregation`. f is 1 - 1/G or 1 - 1/B with a mean
    that contains the response itself, else 1. The length of the gradient is not stated where the
    divisor depends on the responses' own lengths.
    """
    table = world.live.clone().requires_grad_()
    space = world.space
    logs, ref = space.logprobs(table), space.logprobs(world.ref)
    probabilities = logs.sum(1).exp()
    rewards = torch.from_numpy(world.rewards.mean(0))
    in_reward = (probabilities * rewards).sum()
    in_loss = torch.zeros((), dtype=torch.float64)

    beta = case.kl_coefficient
    if beta:
        kl = (probabilities * (logs - ref).sum(1)).sum()
        if case.kl_direction == "forward":
            kl = -(ref.sum(1).exp() * logs.sum(1)).sum()
        if case.kl_placement == "advantage":
            beta = beta / case.max_tokens
        if case.kl_placement == "loss":
            in_loss = in_loss - beta * kl
        else:
            in_reward = in_reward - beta * kl

    if case.entropy != "none":
        entropy = -(probabilities * logs.sum(1)).sum()
        if case.entropy == "bonus":
            in_loss = in_loss + BONUS * entropy
        else:
            in_reward = in_reward + TEMPERATURE * entropy
    if case.kl_old:
        old = space.logprobs(world.old)
        in_loss = in_loss + case.kl_old * (old.sum(1).exp() * logs.sum(1)).sum()

    objective = baseline_factor(case) * in_reward + in_loss
    (gradient,) = torch.autograd.grad(objective, table)
    if case.aggregation == "sequence_sum":
        return gradient.flatten(), True
    length = case.max_tokens  # of every response, where all are equal
    stated = case.aggregation == "constant" or case.lengths == "equal"
    return gradient.flatten() / length, stated


def baseline_factor(case: Case) -> float:
    """Return the factor that a baseline with the response itself puts on the gradient.

    It is 1 where the documents do not state one.
    """
    parameters = dict(case.parameters)
    plain = case.estimator == "grpo" and not parameters.get("divide_by_std", True)
    if plain or case.estimator == "gpg":
        return 1 - 1 / case.group
    if case.estimator == "reinforce_baseline" and "baseline" not in parameters:
        return 1 - 1 / (case.group * case.prompts)
    return 1.0


@dataclass(frozen=True)
class Drawn:
    """One batch of B responses, as plain arrays, with zeros beyond the length of a response."""

    group: Array  # [B]
    rewards: Array  # [B]
    costs: Array  # [B, T] token rewards: KL and entropy
    lengths: NDArray[np.int64]  # [B]
    norms: Array  # [B, T]
    old_over_ref: Array  # [B, T] log-ratios
    greedy: Array  # [B]
    parts: Array  # [B, 2] rewards of two functions, whose sum is the reward

    def alive(self, i: int, t: int) -> bool:
        """Return whether response i has a token at t."""
        return t < self.lengths[i]

    def members(self, i: int) -> list[int]:
        """Return the responses of i's group, i included."""
        return [j for j in range(len(self.group)) if self.group[j] == self.group[i]]

    def total(self, i: int) -> float:
        """Return reward and token rewards of response i."""
        return float(self.rewards[i] + self.costs[i].sum())

    def to_go(self, i: int, t: int) -> float:
        """Return reward and token rewards of response i from t on."""
        return float(self.rewards[i] + self.costs[i, t:].sum())

    def tokens(self) -> list[tuple[int, int]]:
        """Return (response, position) of every token."""
        return [(i, t) for i in range(len(self.group)) for t in range(self.lengths[i])]


Statement = Callable[[Drawn, Case, dict], dict[tuple[int, int], float]]
STATEMENTS: dict[str, Statement] = {}


def states(name: str) -> Callable[[Statement], Statement]:
    """Register the formula of an estimator's advantages."""

    def decorator(function: Statement) -> Statement:
        STATEMENTS[name] = function
        return function

    return decorator


def _std(values: list[float], ddof: int) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(
        math.fsum((value - mean) ** 2 for value in values) / max(len(values) - ddof, 1)
    )


def _equal(values: list[float]) -> bool:
    return max(values) == min(values)


@states("reinforce")
def _reinforce(d: Drawn, case: Case, p: dict) -> dict:
    return {(i, t): d.to_go(i, t) for i, t in d.tokens()}


@states("reinforce_baseline")
def _reinforce_baseline(d: Drawn, case: Case, p: dict) -> dict:
    if p.get("baseline") == "moving_average":
        value = EARLIER["average"] / EARLIER["weight"]
    else:
        value = math.fsum(d.total(i) for i in range(len(d.group))) / len(d.group)
    return {(i, t): d.to_go(i, t) - value for i, t in d.tokens()}


@states("rloo")
def _rloo(d: Drawn, case: Case, p: dict) -> dict:
    found = {}
    for i, t in d.tokens():
        others = [d.total(j) for j in d.members(i) if j != i]
        found[i, t] = d.total(i) - math.fsum(others) / len(others) if others else 0.0
    return found


@states("remax")
def _remax(d: Drawn, case: Case, p: dict) -> dict:
    return {(i, t): d.to_go(i, t) - d.greedy[i] for i, t in d.tokens()}


@states("gae")
def _gae(d: Drawn, case: Case, p: dict) -> dict:
    gamma, lam = p.get("gamma", 1.0), p.get("lam", 1.0)
    found = {}
    for i, t in d.tokens():
        last = d.lengths[i] - 1
        found[i, t] = math.fsum(
            (gamma * lam) ** (s - t) * (d.costs[i, s] + (d.rewards[i] if s == last else 0.0))
            for s in range(t, last + 1)
        )
    return _whitened(found, 1e-8) if p.get("whiten") else found


def _whitened(values: dict, eps: float) -> dict:
    flat = list(values.values())
    if _equal(flat):
        return dict.fromkeys(values, 0.0)
    mean, std = math.fsum(flat) / len(flat), _std(flat, 0)
    return {key: (value - mean) / (std + eps) for key, value in values.items()}


@states("grpo")
def _grpo(d: Drawn, case: Case, p: dict) -> dict:
    found = {}
    for i, t in d.tokens():
        group = [d.total(j) for j in d.members(i)]
        centred = d.total(i) - math.fsum(group) / len(group)
        if p.get("divide_by_std", True):
            centred /= _std(group, p.get("std_ddof", 0)) + 1e-6
        found[i, t] = 0.0 if _equal(group) else centred
    return found


@states("gpg")
def _gpg(d: Drawn, case: Case, p: dict) -> dict:
    """Apply alpha = B / (B - M), M the responses of groups whose rewards are all equal."""
    groups = {i: [d.total(j) for j in d.members(i)] for i in range(len(d.group))}
    different = [i for i, group in groups.items() if not _equal(group)]
    alpha = len(groups) / max(len(different), 1)

    found = {}
    for i, t in d.tokens():
        found[i, t] = 0.0
        if i in different:
            found[i, t] = alpha * (d.total(i) - math.fsum(groups[i]) / len(groups[i]))
    return found


@states("grpo_process")
def _grpo_process(d: Drawn, case: Case, p: dict) -> dict:
    steps: dict[tuple[int, int], float] = {}
    for i, t in d.tokens():
        last = t == d.lengths[i] - 1
        if d.costs[i, t] or last:
            steps[i, t] = d.costs[i, t] + (d.rewards[i] if last else 0.0)
    found = {}
    for i, t in d.tokens():
        group = [steps[key] for key in steps if d.group[key[0]] == d.group[i]]
        mean, std = math.fsum(group) / len(group), _std(group, 0)
        mine = [value for (j, s), value in steps.items() if j == i and s >= t]
        found[i, t] = (
            0.0 if _equal(group) else math.fsum((value - mean) / (std + 1e-6) for value in mine)
        )
    return found


def _weighted(d: Drawn, members: list[int], weights: dict[int, float]) -> float:
    total = math.fsum(weights[j] for j in members)
    if not total:
        return math.fsum(d.total(j) for j in members) / len(members)
    return math.fsum(weights[j] * d.total(j) for j in members) / total


@states("opo")
def _opo(d: Drawn, case: Case, p: dict) -> dict:
    found = {}
    for i, t in d.tokens():
        members = d.members(i)
        weights = {j: float(d.lengths[j]) for j in members}
        found[i, t] = d.total(i) - _weighted(d, members, weights) if len(members) > 1 else 0.0
    return found


@states("optimal_baseline")
def _optimal_baseline(d: Drawn, case: Case, p: dict) -> dict:
    found = {}
    for i, t in d.tokens():
        members = list(range(len(d.group))) if p.get("scope") == "batch" else d.members(i)
        alone = len(members) == 1
        if p.get("leave_one_out"):
            members = [j for j in members if j != i]
        weights = {j: float(d.norms[j].sum()) for j in members}
        found[i, t] = 0.0 if alone else d.total(i) - _weighted(d, members, weights)
    return found


@states("optimal_token_baseline")
def _optimal_token_baseline(d: Drawn, case: Case, p: dict) -> dict:
    """Compare a token with the responses of the group that sampled one at the same position.

    A response that is alone there is compared with all other responses of the group.
    """
    found = {}
    for i, t in d.tokens():
        others = [j for j in d.members(i) if j != i]
        here = [j for j in others if d.alive(j, t)]
        weights = {j: float(d.norms[j, : t + 1].sum()) for j in [*others, i]}
        values = {j: d.to_go(j, t) for j in [*others, i]}
        compared = others
        if here:
            compared = here if p.get("leave_one_out") else [*here, i]
        total = math.fsum(weights[j] for j in compared)
        baseline = math.fsum(weights[j] * values[j] for j in compared) / total if compared else 0.0
        found[i, t] = values[i] - baseline if others else 0.0
    return found


@states("reinforce_plus_plus")
def _reinforce_plus_plus(d: Drawn, case: Case, p: dict) -> dict:
    found = {}
    for i, t in d.tokens():
        group = [d.total(j) for j in d.members(i)]
        mean = math.fsum(group) / len(group) if p.get("group_baseline") else 0.0
        found[i, t] = d.to_go(i, t) - mean
    return _whitened(found, 1e-8)


@states("token_kl_grpo")
def _token_kl_grpo(d: Drawn, case: Case, p: dict) -> dict:
    """Take one H for all responses, as in the source: the limit of generated tokens."""
    rate = case.kl_coefficient / case.max_tokens
    returns = {
        (i, t): d.total(i) - rate * float(d.old_over_ref[i, t:].sum()) for i, t in d.tokens()
    }
    found = {}
    for i, t in d.tokens():
        group = [returns[j, t] for j in d.members(i) if d.alive(j, t)]
        centred = returns[i, t] - math.fsum(group) / len(group)
        found[i, t] = 0.0 if _equal(group) else centred / (_std(group, 0) + 1e-6)
    return found


@states("grpo_passk")
def _grpo_passk(d: Drawn, case: Case, p: dict) -> dict:
    """Enumerate all subsets of k responses."""
    k = p["k"]
    found = {}
    for i, t in d.tokens():
        members = d.members(i)
        subsets = list(itertools.combinations(members, k))
        mine = [subset for subset in subsets if i in subset]
        best = [max(d.total(j) for j in subset) for subset in subsets]
        best_of_mine = [max(d.total(j) for j in subset) for subset in mine]
        if not mine or (_equal(best) and p.get("baseline") != "leave_one_out"):
            found[i, t] = 0.0
        elif p.get("baseline") == "leave_one_out":
            without = [max(d.total(j) for j in subset if j != i) for subset in mine]
            found[i, t] = (math.fsum(best_of_mine) - math.fsum(without)) / len(mine)
        else:
            lead = math.fsum(best_of_mine) / len(mine) - math.fsum(best) / len(best)
            found[i, t] = lead / (_std(best, 0) + 1e-6) if p.get("divide_by_std", True) else lead
    return found


@states("maxrl")
def _maxrl(d: Drawn, case: Case, p: dict) -> dict:
    found = {}
    for i, t in d.tokens():
        group = [d.total(j) for j in d.members(i)]
        mean = math.fsum(group) / len(group)
        found[i, t] = 0.0 if _equal(group) else (d.total(i) - mean) / mean
    return found


@states("bnpo")
def _bnpo(d: Drawn, case: Case, p: dict) -> dict:
    def mean_of(i: int) -> float:
        return math.fsum(d.total(j) for j in d.members(i)) / len(d.members(i))

    of_groups = {d.group[i]: mean_of(i) for i in range(len(d.group)) if len(d.members(i)) > 1}
    means = list(of_groups.values())
    alpha = beta = 1.0
    if len(means) > 1 and not _equal(means):
        mean = math.fsum(means) / len(means)
        size = mean * (1 - mean) / _std(means, 1) ** 2 - 1
        alpha, beta = max(1.0, 1 + size * mean / 3), max(1.0, 1 + size * (1 - mean) / 3)

    norm = math.gamma(alpha + beta) / (math.gamma(alpha) * math.gamma(beta))
    found = {}
    for i, t in d.tokens():
        group = [d.total(j) for j in d.members(i)]
        q = mean_of(i)
        density = norm * q ** (alpha - 1) * (1 - q) ** (beta - 1)
        found[i, t] = 0.0 if _equal(group) else (d.total(i) - q) / density
    return found


@states("rae")
def _rae(d: Drawn, case: Case, p: dict) -> dict:
    found = {}
    for i, t in d.tokens():
        value, weight = EARLIER["averages"][str(int(d.group[i]))]
        found[i, t] = d.to_go(i, t) - value / weight
    return found


@states("gdpo")
def _gdpo(d: Drawn, case: Case, p: dict) -> dict:
    sums = []
    for i in range(len(d.group)):
        total = 0.0
        for part in d.parts.T:
            group = [float(part[j]) for j in d.members(i)]
            if not _equal(group):
                mean = math.fsum(group) / len(group)
                total += (float(part[i]) - mean) / (_std(group, 0) + 1e-6)
        sums.append(total)
    spread = math.sqrt(math.fsum(value**2 for value in sums) / len(sums)) + 1e-6
    return {(i, t): sums[i] / spread for i, t in d.tokens()}


def kl_value(kind: str, direction: str, d: float) -> float:
    """Return the KL estimate of the table in `rlsys.algorithms.kl`, d = log pi - log ref."""
    r = math.exp(-d)
    if direction == "forward":
        return {"k1": -r * d, "k2": r * d * d / 2, "k3": 1 - r - r * d}[kind]
    return {"k1": d, "k2": d * d / 2, "k3": r - 1 + d, "k3_k2": r - 1 + d}[kind]


def kl_slope(kind: str, direction: str, d: float) -> float:
    """Return the derivative of `kl_value` with respect to log pi."""
    r = math.exp(-d)
    if direction == "forward":
        return {"k1": r * d - r, "k2": r * d - r * d * d / 2, "k3": r * d}[kind]
    return {"k1": 1.0, "k2": d, "k3": 1 - r, "k3_k2": d}[kind]


def log_ratio(level: str, differences: Array, t: int) -> float:
    """Return the log-ratio of a level at t, from the log-prob differences of one response."""
    return {
        "token": lambda: differences[t],
        "sequence": lambda: differences.mean(),
        "future": lambda: differences[t:].mean(),
        "prefix": lambda: differences[: t + 1].sum(),
        "product": lambda: differences.sum(),
    }[level]()


def weight_of(name: str, p: dict, log_rho: float, advantage: float) -> float:
    """Return w(rho, A) of the table in `rlsys.algorithms.policy_objectives.weights`."""
    rho = capped_ratio(log_rho)
    low, high = p.get("clip_low", 0.2), p.get("clip_high", 0.2)
    if name == "none":
        return 1.0
    if name == "importance":
        return rho
    if name in ("ppo_clip", "dual_clip"):
        gone = (advantage > 0 and rho > 1 + high) or (advantage < 0 and rho < 1 - low)
        gone |= name == "dual_clip" and advantage < 0 and rho > p.get("clip_c", 3.0)
        return 0.0 if gone else rho
    if name == "upper_clip":
        return min(rho, 1 + high)
    if name in ("power", "adaptive_power"):
        return capped_ratio(p["q"] * log_rho)
    if name == "sapo":
        tau = p.get("tau_pos", 1.0) if advantage > 0 else p.get("tau_neg", 1.05)
        return rho / math.cosh(min(tau * (rho - 1) / 2, 300.0)) ** 2
    if name == "sapo_sequence":
        tau = p.get("tau_pos", 1.0) if advantage > 0 else p.get("tau_neg", 1.05)
        return rho / math.cosh(tau * log_rho / 2) ** 2
    if name == "minimum":
        functions = p.get("functions", [{"kind": "ratio"}, {"kind": "clip"}])
        return _slope_of_minimum(functions, rho, advantage)
    if name == "vespo":
        k, rate = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
        return math.exp(k * math.log(rho) + rate * (1 - rho))
    if name == "cispo":
        return min(max(rho, 1 - p.get("clip_low", 1.0)), 1 + high)
    raise KeyError(name)


def capped_ratio(log_ratio: float) -> float:
    """Return exp of a log-ratio, capped as `bounded_ratio` documents it."""
    return math.exp(min(max(log_ratio, -MAX_LOG_RATIO), MAX_LOG_RATIO))


def _slope_of_minimum(functions: list[dict], rho: float, advantage: float) -> float:
    """Return rho f'(rho) of the first function with the smallest product with the advantage."""
    values = {
        "one": lambda f: (1.0, 0.0),
        "ratio": lambda f: (rho, rho),
        "power": lambda f: (rho ** f.get("q", 0.5), f.get("q", 0.5) * rho ** f.get("q", 0.5)),
        "clip": lambda f: (
            min(max(rho, 1 - f.get("low", 0.2)), 1 + f.get("high", 0.2)),
            rho if 1 - f.get("low", 0.2) <= rho <= 1 + f.get("high", 0.2) else 0.0,
        ),
    }
    return min(
        (values[function["kind"]](function) for function in functions),
        key=lambda pair: pair[0] * advantage,
    )[1]


def gmpo_weight_of(logs: list[float], advantages: list[float], t: int) -> float:
    """Return the geometric mean of the clipped ratios, 0 for a clipped token."""

    def clipped(u: int) -> float:
        if advantages[u] > 0:
            return min(logs[u], 0.4)
        return max(logs[u], -0.4) if advantages[u] < 0 else logs[u]

    mean = math.fsum(clipped(u) for u in range(len(logs))) / len(logs)
    return capped_ratio(mean) if clipped(t) == logs[t] else 0.0


def dppo_weight_of(name: str, live: float, old: float, advantage: float) -> float:
    """Return the ratio up to 20, 0 where the token has left the region in A's direction."""
    p, q = math.exp(live), math.exp(old)
    if name == "dppo_tv":
        outside = abs(p - q) > 0.15
    else:
        rest_p, rest_q = max(-math.expm1(live), 1e-300), max(-math.expm1(old), 1e-300)
        outside = q * (old - live) + rest_q * math.log(rest_q / rest_p) > 0.05
    away = (advantage > 0 and p > q) or (advantage < 0 and p < q)
    return 0.0 if outside and away else min(capped_ratio(live - old), 20.0)


def _less_mean(values: list[float]) -> list[float]:
    """Return values less their mean, exactly 0 where all are equal."""
    moved = [value - values[0] for value in values]
    mean = math.fsum(moved) / len(moved)
    return [value - mean for value in moved]


def reward_time_weight(ratios: list[float], advantages: list[float], t: int) -> float:
    """Return sum_{s>=t} rho_{<=s} (A_s - A_{s+1}): each reward with the ratios up to its time."""
    following = [*advantages[1:], 0.0]
    return math.fsum(ratios[s] * (advantages[s] - following[s]) for s in range(t, len(advantages)))


def adaptive_q(log_ratios: list[float], target: float) -> float:
    """Return the largest power with the effective sample size `target`, by bisection."""
    values = np.asarray(log_ratios)

    def effective_fraction(q: float) -> float:
        weights = np.exp(q * values)
        return float(weights.sum() ** 2 / (len(weights) * (weights**2).sum()))

    if effective_fraction(1.0) >= target:
        return 1.0

    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        if effective_fraction(middle) >= target:
            low = middle
        else:
            high = middle
    return low


def has_statement(case: Case) -> bool:
    """Return whether the method has a formula here.

    The hierarchical fit has none, and is compared with the true gradient alone.
    """
    return case.estimator in STATEMENTS


class Stated:
    """The arrays of a world, for many batches."""

    def __init__(self, case: Case, world: World) -> None:
        self.case, self.world = case, world
        space = world.space
        self.logs = {
            name: space.logprobs(getattr(world, name)).numpy()
            for name in ("rollout", "old", "live", "ref")
        }
        # Where advantages are estimated again, the live policy takes the place of `old` in the
        # estimate, and nowhere else.
        self.estimates_with = "live" if case.recompute else "old"
        self.norms = squared_score_norms(space, getattr(world, self.estimates_with)).numpy()
        self.scores = space.scores(world.live).numpy()
        self.entropy_slopes = self._entropy_slopes()
        self.exact_slopes = self._exact_slopes()
        self.costs = self._costs()
        self.greedy = world.rewards[:, int(space.probabilities(world.rollout).argmax())]

    def _entropy_slopes(self) -> Array:
        """Return [S, L, P] gradients of the entropy of each visited row."""
        space = self.world.space
        table = self.world.live.clone().requires_grad_()
        logs = table.log_softmax(1)
        entropies = -(logs.exp() * logs).sum(1)
        slopes = []
        for value in entropies:
            (slope,) = torch.autograd.grad(value, table, retain_graph=True)
            slopes.append(slope.flatten())
        return torch.stack(slopes)[space.rows].numpy()

    def _exact_kl(self, table: Tensor) -> Tensor:
        """Return [rows] the KL of each row of a table to the reference's, over the vocabulary."""
        logs, ref = table.log_softmax(1), self.world.ref.log_softmax(1)
        return (logs.exp() * (logs - ref)).sum(1)

    def _exact_slopes(self) -> Array:
        """Return [S, L, P] gradients of the exact KL of each visited row."""
        table = self.world.live.clone().requires_grad_()
        slopes = []
        for value in self._exact_kl(table):
            (slope,) = torch.autograd.grad(value, table, retain_graph=True)
            slopes.append(slope.flatten())
        return torch.stack(slopes)[self.world.space.rows].numpy()

    def _costs(self) -> Array:
        """Return [S, L] token rewards: KL and entropy."""
        case, mask = self.case, self.world.space.mask.numpy()
        costs = np.zeros(mask.shape)
        exact = self._exact_kl(self.world.old)[self.world.space.rows].numpy()
        for s, t in zip(*np.nonzero(mask), strict=True):
            if case.kl_placement == "reward" and case.kl_kind == "exact":
                costs[s, t] -= case.kl_coefficient * exact[s, t]
            elif case.kl_placement == "reward":
                d = float(self.logs["old"][s, t] - self.logs["ref"][s, t])
                costs[s, t] -= case.kl_coefficient * kl_value(case.kl_kind, case.kl_direction, d)
            if case.entropy == "temperature":
                costs[s, t] -= TEMPERATURE * self.logs["old"][s, t]
        return costs

    def gradient(self) -> Tensor:
        """Return [rows * V] the stated gradient, in expectation."""
        total = np.zeros(self.scores.shape[2])
        for drawn, probability in self.world.batches(self.case.group):
            total += probability * self.of_batch(drawn)
        return torch.from_numpy(total)

    def of_batch(self, drawn: NDArray[np.int64]) -> Array:
        """Return [rows * V] the stated gradient of one batch."""
        case = self.case
        rows = drawn.reshape(-1)
        prompt = np.repeat(np.arange(len(drawn)), drawn.shape[1])
        d = Drawn(
            group=prompt.astype(np.float64),
            rewards=self.world.rewards[prompt, rows],
            costs=self.costs[rows],
            lengths=self.world.lengths[rows],
            norms=self.norms[rows],
            old_over_ref=(self.logs["old"] - self.logs["ref"])[rows],
            greedy=self.greedy[prompt],
            parts=parts_of(self.world.rewards[prompt, rows]),
        )
        advantages = STATEMENTS[case.estimator](d, case, dict(case.parameters))

        trained: list[tuple[int, int]] = []
        for i, t in d.tokens():
            masked = case.mask_truncated and not self.world.ended[rows[i]]
            left_out = case.resamples and not _is_mixed(d, i)
            if not masked and not left_out:
                trained.append((i, t))

        parameters = dict(case.weight_parameters)
        if case.weight == "adaptive_power":
            ratios = [self._log_ratio(rows[i], t) for i, t in trained]
            parameters["q"] = adaptive_q(ratios, 0.9) if ratios else 1.0
        elif case.weight == "power":
            parameters.setdefault("q", 0.5)

        chosen = self._chosen(rows, trained, advantages, parameters)
        total = np.zeros(self.scores.shape[2])
        sequences = len({i for i, _ in trained})
        for i, t in trained:
            s = rows[i]
            length = range(d.lengths[i])
            own = [advantages[i, u] for u in length]
            push = self._push(s, t, own, parameters, chosen=(i, t) in chosen)

            slope = self._correction(s, t) * push
            if case.kl_old:
                slope -= case.kl_old * (math.exp(self.logs["live"][s, t] - self._old()[s, t]) - 1)

            vector = slope * self.scores[s, t]
            if case.kl_placement in ("loss", "reward") and case.kl_kind == "exact":
                vector = vector - case.kl_coefficient * self.exact_slopes[s, t]
            elif case.kl_placement == "loss":
                vector = vector - case.kl_coefficient * self._kl_loss_gradient(s, t)
            if case.entropy == "bonus":
                vector = vector + BONUS * self.entropy_slopes[s, t]

            divisor = {
                "token_mean": len(trained),
                "sequence_mean": sequences * d.lengths[i],
                "sequence_sum": sequences,
                "constant": sequences * case.max_tokens,
            }[case.aggregation]
            total += vector / divisor
        return total

    def _push(self, s: int, t: int, advantages: list[float], p: dict, *, chosen: bool) -> float:
        """Return the derivative of a token's surrogate by its log-probability."""
        case, advantage, log_rho = self.case, advantages[t], self._log_ratio(s, t)
        logs = [self._log_ratio(s, u) for u in range(len(advantages))]
        rho = capped_ratio(log_rho)
        if case.weight == "reward_time":
            return reward_time_weight([capped_ratio(log) for log in logs], advantages, t)
        if case.weight == "gmpo":
            return advantage * gmpo_weight_of(logs, advantages, t)
        if case.weight in ("dppo_tv", "dppo_kl"):
            live, old = float(self.logs["live"][s, t]), float(self._old()[s, t])
            return advantage * dppo_weight_of(case.weight, live, old, advantage)
        if case.weight == "dro":
            return advantage - p.get("beta", 0.05) * log_rho
        if case.weight == "kl_cov":
            sign = (log_rho > 0) - (log_rho < 0)
            return rho * advantage - (p.get("coefficient", 1.0) * sign if chosen else 0.0)
        if case.weight == "clip_cov":
            widths = {"clip_low": p.get("clip_low", 1.0), "clip_high": p.get("clip_high", 1.0)}
            clipped = advantage * weight_of("ppo_clip", widths, log_rho, advantage)
            return 0.0 if chosen else clipped
        return advantage * weight_of(case.weight, p, log_rho, advantage)

    def _chosen(
        self, rows: NDArray[np.int64], trained: list[tuple[int, int]], advantages: dict, p: dict
    ) -> set[tuple[int, int]]:
        """Return the tokens that `clip_cov` or `kl_cov` chooses."""
        if self.case.weight not in ("clip_cov", "kl_cov") or not trained:
            return set()
        logs = [float(self.logs["live"][rows[i], t]) for i, t in trained]
        own = [advantages[key] for key in trained]
        products = [a * b for a, b in zip(_less_mean(logs), _less_mean(own), strict=True)]
        count = max(1, int(p.get("fraction", 0.0002) * len(trained)))
        if self.case.weight == "kl_cov":
            order = sorted(range(len(trained)), key=lambda k: -round(products[k], 9))
            return {trained[k] for k in order[:count]}

        low, high = 1 - p.get("clip_low", 1.0), 1 + p.get("clip_high", 1.0)
        candidates = []
        for key, product, advantage in zip(trained, products, own, strict=True):
            rho = math.exp(self._log_ratio(rows[key[0]], key[1]))
            gone = (advantage > 0 and rho > high) or (advantage < 0 and rho < low)
            if p.get("lowest", 1.0) < product < p.get("highest", 5.0) and not gone:
                candidates.append(key)
        # The trainer's random order of the first update of batch 0.
        entropy = (self.case.config().trainer.seed, 0, 0)
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
        return {candidates[k] for k in order[:count].tolist()}

    def _kl_loss_gradient(self, s: int, t: int) -> Array:
        """Return the gradient of w k(d) at one token; k2 and k3_k2 take w as a number."""
        case, length = self.case, self.world.lengths[s]
        differences = (self.logs["live"] - self.logs["ref"])[s, :length]
        steps = (self.logs["live"] - self._old())[s, :length]
        d, w = float(differences[t]), 0.0
        scores = self.scores[s, :length]
        reached = scores[t]  # gradient of log w
        if case.kl_ratio == "token":
            w = float(steps[t])
        elif case.kl_ratio == "prefix":
            w, reached = float(steps[: t + 1].sum()), scores[: t + 1].sum(0)
        elif case.kl_ratio == "product":
            w, reached = float(steps.sum()), scores.sum(0)
        if case.kl_level == "sequence":
            # Each token carries the whole response's value, and the gradient through its own
            # log-probability.
            d, reached = float(differences.sum()), scores[t]
        weight = math.exp(w)
        gradient = weight * kl_slope(case.kl_kind, case.kl_direction, d) * scores[t]
        if case.kl_ratio != "none" and case.kl_kind in ("k1", "k3"):
            gradient = gradient + weight * kl_value(case.kl_kind, case.kl_direction, d) * reached
        return gradient

    def _log_ratio(self, s: int, t: int) -> float:
        length = self.world.lengths[s]
        differences = (self.logs["live"] - self._old())[s, :length]
        return float(log_ratio(self.case.ratio, differences, t))

    def _old(self) -> Array:
        """Return log-probabilities of `old`: the trainer's weights at the start of the step."""
        return self.logs["old"]

    def _correction(self, s: int, t: int) -> float:
        case = self.case
        if case.correction == "none":
            return 1.0
        bounds = dict(case.correction_parameters)
        differences = (self._old() - self.logs["rollout"])[s, : self.world.lengths[s]]
        log_rho = float(differences[t] if case.correction == "token" else differences.sum())
        rho = math.exp(log_rho)
        if rho < bounds.get("mask_below", 0.0) or rho > bounds.get("mask_above", math.inf):
            return 0.0
        return min(rho, bounds.get("cap", 2.0))


def _is_mixed(d: Drawn, i: int) -> bool:
    """Return whether the group has a right and a wrong response (DAPO, equation 11).

    A response is right where its first reward is at least 0.5.
    """
    right = [d.rewards[j] >= 0.5 for j in d.members(i)]
    return any(right) and not all(right)
