"""An autoregressive policy that is small enough to enumerate every response.

Expectations, gradients and variances need no sampling.

The policy is a table of logits, one row per context. `context="prefix"` gives every prefix its own
row, so that the scores of different positions are orthogonal; `context="previous_token"` shares a
row among all positions with the same last token, so that they are not and the covariance between
positions, which the derivation of the baselines neglects, appears.

With `end_token=True` token 0 ends a response, and lengths differ; a response that never samples it
has all L tokens.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlsys.algorithms.advantages import AdvantageInputs

Context = Literal["prefix", "previous_token"]


@dataclass(frozen=True)
class ResponseSpace:
    """All S responses of at most L tokens over V tokens.

    `rows` is the row of the table of logits that each position reads.
    """

    tokens: Tensor  # [S, L] int64, 0 after the end
    mask: Tensor  # [S, L] bool
    rows: Tensor  # [S, L] int64
    num_rows: int
    vocabulary: int

    @staticmethod
    def of(
        vocabulary: int, length: int, *, context: Context = "prefix", end_token: bool = False
    ) -> ResponseSpace:
        responses = []
        for tokens in itertools.product(range(vocabulary), repeat=length):
            kept = tokens.index(0) + 1 if end_token and 0 in tokens else length
            # Of all continuations of an ended response only that of zeros is kept.
            if not any(tokens[kept:]):
                responses.append((tokens, kept))
        tokens = torch.tensor([t for t, _ in responses])
        mask = (
            torch.arange(length)[None, :] < torch.tensor([kept for _, kept in responses])[:, None]
        )
        row_of: dict[tuple[int, ...], int] = {}
        rows = torch.tensor(
            [
                [row_of.setdefault(_key(t, s, context), len(row_of)) for s in range(length)]
                for t, _ in responses
            ]
        )
        return ResponseSpace(tokens, mask, rows, len(row_of), vocabulary)

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def random_logits(self, generator: torch.Generator, scale: float = 1.0) -> Tensor:
        """Return [rows, V] float64 the table of a random policy."""
        return scale * torch.randn(
            self.num_rows, self.vocabulary, generator=generator, dtype=torch.float64
        )

    def logprobs(self, logits: Tensor) -> Tensor:
        """Return [S, L] the log-probability of each token, 0 outside the mask."""
        table = logits.log_softmax(dim=1)
        return torch.where(self.mask, table[self.rows, self.tokens], 0.0)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return [S] the probability of each response; they sum to 1."""
        return self.logprobs(logits).sum(dim=1).exp()

    def scores(self, logits: Tensor) -> Tensor:
        """Return [S, L, rows * V] the gradient of each token's log-probability.

        It is with respect to the table: one-hot minus probabilities in its row.
        """
        flat = torch.zeros(*self.tokens.shape, self.num_rows, self.vocabulary, dtype=logits.dtype)
        here = (
            torch.nn.functional.one_hot(self.tokens, self.vocabulary)
            - logits.softmax(dim=1)[self.rows]
        )
        flat.scatter_(
            2, self.rows[:, :, None, None].expand(-1, -1, 1, self.vocabulary), here[:, :, None, :]
        )
        return (flat * self.mask[:, :, None, None]).flatten(2)

    def gradient(self, logits: Tensor, rewards: Tensor) -> Tensor:
        """Return [rows * V] the exact gradient of the expected reward."""
        weights = self.probabilities(logits) * rewards
        return torch.einsum("s,slp->p", weights, self.scores(logits))

    def inputs(
        self, drawn: Tensor, rewards: Tensor, rollout: Tensor, old: Tensor, group_ids: Tensor
    ) -> AdvantageInputs:
        """Return the inputs of an estimator for the responses with the indices `drawn` [B]."""
        return AdvantageInputs(
            rewards=rewards[drawn],
            response_mask=self.mask[drawn],
            group_ids=group_ids,
            rollout_logprobs=self.logprobs(rollout)[drawn],
            old_logprobs=self.logprobs(old)[drawn],
            squared_score_norms=self.scores(old).square().sum(dim=2)[drawn],
        )


class Enumerated:
    """All responses of a random policy, a drifted sampler, and random rewards."""

    def __init__(
        self,
        seed: int,
        context: Context = "prefix",
        end_token: bool = False,
        size: tuple[int, int] = (3, 4),
        drift: float = 0.6,
        scale: float = 1.0,
    ):
        generator = torch.Generator().manual_seed(seed)
        self.space = ResponseSpace.of(*size, context=context, end_token=end_token)
        self.old = self.space.random_logits(generator, scale)
        self.rollout = self.old + drift * self.space.random_logits(generator)
        self.rewards = torch.randn(len(self.space.tokens), generator=generator, dtype=torch.float64)
        self.probability = self.space.probabilities(self.rollout)  # [S] of being sampled
        self.ratios = (
            (self.space.logprobs(self.old) - self.space.logprobs(self.rollout)).cumsum(1).exp()
        )  # [S, L]
        self.scores = self.space.scores(self.old)  # [S, L, P]
        self.gradient = self.space.gradient(self.old, self.rewards)
        self.generator = generator

    def mean(self, values: Tensor) -> Tensor:
        """Return the expectation of a value per response under the sampler."""
        return torch.tensordot(self.probability, values, dims=1)

    def token_gradients(self, beta: Tensor) -> Tensor:
        """Return [S, L, P] rho_{<=t} score_t Delta_t for coefficients beta [L, L].

        These are of (position, horizon >= position).
        """
        later = torch.ones(self.space.length, self.space.length, dtype=torch.float64).triu()
        alpha = self.ratios[:, None, :] / self.ratios[:, :, None]  # [S, t, s]
        residual = alpha[:, :, -1] * self.rewards[:, None] - (alpha * beta * later).sum(2)
        return (self.ratios * residual)[..., None] * self.scores

    def best_beta(self) -> Tensor:
        """Return [L, L] the exact solution of the normal equations of every position."""
        length = self.space.length
        beta = torch.zeros(length, length, dtype=torch.float64)
        norms = self.scores.square().sum(2)
        for t in range(length):
            alpha = self.ratios[:, t:] / self.ratios[:, t : t + 1]
            weight = self.probability * self.ratios[:, t] ** 2 * norms[:, t]
            gram = (alpha * weight[:, None]).T @ alpha
            beta[t, t:] = torch.linalg.pinv(gram, hermitian=True, rtol=1e-11) @ (
                (alpha * weight[:, None]).T @ (alpha[:, -1] * self.rewards)
            )
        return beta

    def drawn(self, groups: int, size: int) -> AdvantageInputs:
        indices = torch.multinomial(
            self.probability, groups * size, replacement=True, generator=self.generator
        )
        return self.space.inputs(
            indices,
            self.rewards,
            self.rollout,
            self.old,
            torch.arange(groups).repeat_interleave(size),
        )


def _key(tokens: tuple[int, ...], position: int, context: Context) -> tuple[int, ...]:
    return tokens[:position] if context == "prefix" else tokens[max(position - 1, 0) : position]
