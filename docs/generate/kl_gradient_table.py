"""Which KL estimator has which gradient in which place: exact relative errors over a policy whose responses can be listed.

A table of logits, one row a prefix, over three words of which the first ends a response; responses have one token, or up to three. Everything is a
sum over all responses, nothing is sampled.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlsys.algorithms.kl import KLLossTerms, check_kl_loss, kl_estimate, kl_loss, kl_rewards

WORDS, LENGTH, DRIFT = 3, 3, 0.5
EXACT = 1e-12

LOSSES = (
    KLLossTerms("k1"),
    KLLossTerms("k2"),
    KLLossTerms("k3"),
    KLLossTerms("k3_k2"),
    *(
        KLLossTerms(kind, importance_ratio=ratio)
        for kind in ("k1", "k2", "k3")
        for ratio in ("token", "prefix")
    ),
    *(
        KLLossTerms(kind, level="sequence", importance_ratio=ratio)
        for kind in ("k2", "k3")
        for ratio in ("none", "product")
    ),
    *(KLLossTerms(kind, "forward") for kind in ("k1", "k2", "k3")),
    *(
        KLLossTerms("k3", "forward", level, ratio)
        for level, ratio in (("token", "token"), ("token", "prefix"), ("sequence", "product"))
    ),
)
REWARDS = (
    ("k1", "reverse"),
    ("k2", "reverse"),
    ("k3", "reverse"),
    ("k1", "forward"),
    ("k3", "forward"),
)


@dataclass(frozen=True)
class Policies:
    """All responses of up to `length` tokens, and the tables of logits of the live policy, an older one and the reference."""

    tokens: Tensor  # [S, L]
    mask: Tensor  # [S, L]
    rows: Tensor  # [S, L]
    live: Tensor  # [rows, V]
    old: Tensor
    ref: Tensor

    @staticmethod
    def random(length: int, seed: int = 0) -> Policies:
        responses = []
        for tokens in itertools.product(range(WORDS), repeat=length):
            kept = tokens.index(0) + 1 if 0 in tokens else length
            if not any(tokens[kept:]):
                responses.append((tokens, kept))
        row_of: dict[tuple[int, ...], int] = {}
        rows = [
            [row_of.setdefault(tokens[:t], len(row_of)) for t in range(length)]
            for tokens, _ in responses
        ]
        generator = torch.Generator().manual_seed(seed)
        live, drift, ref = (
            torch.randn(len(row_of), WORDS, generator=generator, dtype=torch.float64)
            for _ in range(3)
        )
        return Policies(
            tokens=torch.tensor([tokens for tokens, _ in responses]),
            mask=torch.arange(length) < torch.tensor([kept for _, kept in responses])[:, None],
            rows=torch.tensor(rows),
            live=live,
            old=live + DRIFT * drift,
            ref=ref,
        )

    def logprobs(self, table: Tensor) -> Tensor:
        """[S, L], 0 outside the mask."""
        return torch.where(self.mask, table.log_softmax(1)[self.rows, self.tokens], 0.0)

    def kl(self) -> float:
        """KL(live || ref) of whole responses."""
        logs = self.logprobs(self.live).sum(1)
        return float((logs.exp() * (logs - self.logprobs(self.ref).sum(1))).sum())

    def kl_gradient(self, direction: str) -> Tensor:
        """The gradient of the KL of whole responses with respect to the live table."""
        table = self.live.clone().requires_grad_()
        logs, ref = self.logprobs(table).sum(1), self.logprobs(self.ref).sum(1)
        difference = logs - ref
        value = (
            (logs.exp() * difference).sum()
            if direction == "reverse"
            else -(ref.exp() * difference).sum()
        )
        return torch.autograd.grad(value, table)[0]

    def loss_gradient(self, terms: KLLossTerms, sampler: Tensor) -> Tensor:
        """The expected gradient of the KL term of a loss, with samples of `sampler`."""
        table = self.live.clone().requires_grad_()
        old = self.logprobs(sampler)
        values = _unchecked_loss(
            self.logprobs(table), old, self.logprobs(self.ref), self.mask, terms
        )
        return torch.autograd.grad((old.sum(1).exp() * values.sum(1)).sum(), table)[0]

    def reward_gradient(self, kind: str, direction: str) -> Tensor:
        """The expected score-function gradient of a cost in the reward, descended: responses of the live policy, rewards to go."""
        table = self.live.clone().requires_grad_()
        logs, ref = self.logprobs(table), self.logprobs(self.ref)
        if (kind, direction) == ("k1", "reverse"):
            costs = -kl_rewards(logs, ref, self.mask, 1.0)
        else:
            costs = kl_estimate(logs.detach(), ref, kind, direction=direction)
        costs = torch.where(self.mask, costs, 0.0)
        to_go = costs.flip(1).cumsum(1).flip(1)
        chances = logs.detach().sum(1).exp()
        return torch.autograd.grad((chances * (to_go * logs).sum(1)).sum(), table)[0]


def _unchecked_loss(
    logprobs: Tensor, old: Tensor, ref: Tensor, mask: Tensor, terms: KLLossTerms
) -> Tensor:
    """`kl_loss`, and what it refuses: the table shows why."""
    if terms.importance_ratio == "none" and terms.level == "token":
        return torch.where(
            mask, kl_estimate(logprobs, ref, terms.kind, direction=terms.direction), 0.0
        )
    return kl_loss(logprobs, old, ref, mask, terms)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|."""
    return float((found - exact).norm() / exact.norm())


def cosine(found: Tensor, exact: Tensor) -> float:
    """The cosine of the angle between two gradients; 0 for a vanishing one."""
    size = float(found.norm() * exact.norm())
    return float((found * exact).sum()) / size if size > EXACT else 0.0


def gradient_errors(
    terms: KLLossTerms, seed: int = 0
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Errors of a loss to the KL that it names: (one token, up to three), each (samples of the live policy, of an older one)."""
    errors = []
    for length in (1, LENGTH):
        policies = Policies.random(length, seed)
        exact = policies.kl_gradient(terms.direction)
        errors.append(
            tuple(
                relative_error(policies.loss_gradient(terms, sampler), exact)
                for sampler in (policies.live, policies.old)
            )
        )
    return errors[0], errors[1]


def kl_after_steps(kind: str, direction: str, steps: int, rate: float = 2.0) -> tuple[float, float]:
    """KL(live || ref) before and after `steps` exact steps down a cost in the reward, with no other reward, from near the reference."""
    start = Policies.random(LENGTH)
    policies = replace(start, live=start.ref + 0.1 * (start.live - start.ref))
    before = policies.kl()
    for _ in range(steps):
        step = policies.reward_gradient(kind, direction)
        policies = replace(policies, live=policies.live - rate * step)
    return before, policies.kl()


def step_table(steps: int = 100) -> Iterator[str]:
    """The rows of the table of exact steps."""
    yield f"| cost in the reward | direction | KL to the reference at the start | after {steps} exact steps |"
    yield "|---|---|---|---|"
    for kind, direction in REWARDS:
        before, after = kl_after_steps(kind, direction, steps)
        yield f"| `{kind}` | {direction} | {before:.3f} | {after:.1g} |"


def table() -> Iterator[str]:
    """The rows of the table in `docs/algorithms.md`."""
    yield "| place | kind | direction | level | importance ratio | one token | one token, stale | whole | whole, stale | cosine | a run |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    whole = Policies.random(LENGTH)
    for kind, direction in REWARDS:
        errors = [
            relative_error(p.reward_gradient(kind, direction), p.kl_gradient(direction))
            for p in (Policies.random(1), whole)
        ]
        angle = cosine(whole.reward_gradient(kind, direction), whole.kl_gradient(direction))
        accepted = "accepted" if (kind, direction) == ("k1", "reverse") else "refused"
        yield (
            f"| reward | `{kind}` | {direction} | | | {_cell(errors[0])} | | {_cell(errors[1])} | | {angle:.2f} | {accepted} |"
        )
    for terms in LOSSES:
        one, many = gradient_errors(terms)
        angle = cosine(whole.loss_gradient(terms, whole.live), whole.kl_gradient(terms.direction))
        yield (
            f"| loss | `{terms.kind}` | {terms.direction} | {terms.level} | {terms.importance_ratio} | {_cell(one[0])} | {_cell(one[1])} "
            f"| {_cell(many[0])} | {_cell(many[1])} | {angle:.2f} | {_accepted(terms)} |"
        )


def _cell(error: float) -> str:
    return "**0**" if error < EXACT else f"{error:.2f}"


def _accepted(terms: KLLossTerms) -> str:
    try:
        check_kl_loss(terms)
    except ValueError:
        return "refused"
    return "accepted"
