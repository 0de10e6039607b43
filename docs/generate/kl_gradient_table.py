"""The gradient of each KL estimator in each place: exact relative errors by enumeration.

The policy is a table of logits, one row per prefix, over three tokens of which the first ends a
response; responses have one token, or up to three. Everything is a sum over all responses, nothing
is sampled.
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
    """All responses of up to `length` tokens, and the tables of logits of three policies."""

    tokens: Tensor  # [S, L]
    mask: Tensor  # [S, L]
    rows: Tensor  # [S, L]
    live: Tensor  # [rows, V]
    old: Tensor  # an older policy
    ref: Tensor

    @staticmethod
    def random(length: int, seed: int = 0) -> Policies:
        """Return random policies; the older one is DRIFT away from the live one."""
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
        """Return [S, L] log-probabilities under a table of logits, 0 outside the mask."""
        return torch.where(self.mask, table.log_softmax(1)[self.rows, self.tokens], 0.0)

    def kl(self) -> float:
        """Return KL(live || ref) of whole responses."""
        logs = self.logprobs(self.live).sum(1)
        ref = self.logprobs(self.ref).sum(1)
        return float((logs.exp() * (logs - ref)).sum())

    def kl_gradient(self, direction: str) -> Tensor:
        """Return the gradient of the KL of whole responses with respect to the live table."""
        table = self.live.clone().requires_grad_()
        logs = self.logprobs(table).sum(1)
        ref = self.logprobs(self.ref).sum(1)
        difference = logs - ref

        value = -(ref.exp() * difference).sum()
        if direction == "reverse":
            value = (logs.exp() * difference).sum()
        return torch.autograd.grad(value, table)[0]

    def loss_gradient(self, terms: KLLossTerms, sampler: Tensor) -> Tensor:
        """Return the expected gradient of the KL term of a loss, with samples of `sampler`."""
        table = self.live.clone().requires_grad_()
        old = self.logprobs(sampler)
        ref = self.logprobs(self.ref)
        values = _unchecked_loss(self.logprobs(table), old, ref, self.mask, terms)

        expected = (old.sum(1).exp() * values.sum(1)).sum()
        return torch.autograd.grad(expected, table)[0]

    def reward_gradient(self, kind: str, direction: str) -> Tensor:
        """Return the expected score-function gradient of a KL penalty in the reward.

        Responses are those of the live policy, and each token gets the penalty to go. The sign is
        that of a loss.
        """
        table = self.live.clone().requires_grad_()
        logs = self.logprobs(table)
        ref = self.logprobs(self.ref)
        if (kind, direction) == ("k1", "reverse"):
            costs = -kl_rewards(logs, ref, self.mask, 1.0)
        else:
            costs = kl_estimate(logs.detach(), ref, kind, direction=direction)

        costs = torch.where(self.mask, costs, 0.0)
        to_go = costs.flip(1).cumsum(1).flip(1)
        probabilities = logs.detach().sum(1).exp()
        expected = (probabilities * (to_go * logs).sum(1)).sum()
        return torch.autograd.grad(expected, table)[0]


def _unchecked_loss(
    logprobs: Tensor, old: Tensor, ref: Tensor, mask: Tensor, terms: KLLossTerms
) -> Tensor:
    """Compute `kl_loss` also for terms that it refuses: the table shows why it does."""
    if terms.importance_ratio == "none" and terms.level == "token":
        estimate = kl_estimate(logprobs, ref, terms.kind, direction=terms.direction)
        return torch.where(mask, estimate, 0.0)
    return kl_loss(logprobs, old, ref, mask, terms)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return |found - exact| / |exact|."""
    return float((found - exact).norm() / exact.norm())


def cosine(found: Tensor, exact: Tensor) -> float:
    """Return the cosine of the angle between two gradients; 0 for a vanishing one."""
    size = float(found.norm() * exact.norm())
    if not size > EXACT:
        return 0.0
    return float((found * exact).sum()) / size


def gradient_errors(
    terms: KLLossTerms, seed: int = 0
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the errors of a loss to the KL that it names: (one token, up to three tokens).

    Each is a pair: samples of the live policy, and of an older one.
    """
    errors = []
    for length in (1, LENGTH):
        policies = Policies.random(length, seed)
        exact = policies.kl_gradient(terms.direction)
        fresh = relative_error(policies.loss_gradient(terms, policies.live), exact)
        stale = relative_error(policies.loss_gradient(terms, policies.old), exact)
        errors.append((fresh, stale))
    return errors[0], errors[1]


def kl_after_steps(kind: str, direction: str, steps: int, rate: float = 2.0) -> tuple[float, float]:
    """Return KL(live || ref) before and after `steps` exact steps down a KL penalty in the reward.

    There is no other reward, and the policy starts near the reference.
    """
    start = Policies.random(LENGTH)
    policies = replace(start, live=start.ref + 0.1 * (start.live - start.ref))
    before = policies.kl()

    for _ in range(steps):
        step = policies.reward_gradient(kind, direction)
        policies = replace(policies, live=policies.live - rate * step)
    return before, policies.kl()


def step_table(steps: int = 100) -> Iterator[str]:
    """Yield the rows of the table of exact steps."""
    yield (
        "| cost in the reward | direction | KL to the reference at the start "
        f"| after {steps} exact steps |"
    )
    yield "|---|---|---|---|"
    for kind, direction in REWARDS:
        before, after = kl_after_steps(kind, direction, steps)
        yield f"| `{kind}` | {direction} | {before:.3f} | {after:.1g} |"


def table() -> Iterator[str]:
    """Yield the rows of the table in `docs/algorithms.md`."""
    yield (
        "| place | kind | direction | level | importance ratio | one token | one token, stale "
        "| whole | whole, stale | cosine | a run |"
    )
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
            f"| reward | `{kind}` | {direction} | | | {_cell(errors[0])} | | {_cell(errors[1])} "
            f"| | {angle:.2f} | {accepted} |"
        )

    for terms in LOSSES:
        one, many = gradient_errors(terms)
        angle = cosine(whole.loss_gradient(terms, whole.live), whole.kl_gradient(terms.direction))
        yield (
            f"| loss | `{terms.kind}` | {terms.direction} | {terms.level} "
            f"| {terms.importance_ratio} | {_cell(one[0])} | {_cell(one[1])} "
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
