"""Batches of enumerated policies for tests of hierarchical baselines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlsys.algorithms.advantages import AdvantageInputs
from tests.support.enumerable_policy import Enumerated

HORIZONS = ("final", "current", "current_and_final", "blocks", "all")


class LearnedPrompt(Enumerated):
    """A policy that is a step of 0.3 along the exact gradient ahead of its sampler.

    The reward is the fraction of one token in the response.
    """

    def __init__(self, seed: int):
        super().__init__(seed, "previous_token", size=(3, 5), drift=0.0)
        self.rewards = (self.space.tokens == 1).double().mean(1)
        step = self.space.gradient(self.rollout, self.rewards).reshape(self.rollout.shape)
        self.old = self.rollout + 0.3 * step / step.std()
        self.ratios = (
            (self.space.logprobs(self.old) - self.space.logprobs(self.rollout)).cumsum(1).exp()
        )
        self.scores = self.space.scores(self.old)
        self.gradient = self.space.gradient(self.old, self.rewards)

    def draw(self, number: int, generator: torch.Generator) -> Tensor:
        return torch.multinomial(self.probability, number, replacement=True, generator=generator)


def joined(prompts: list[LearnedPrompt], drawn: list[Tensor]) -> AdvantageInputs:
    """Return one batch with a group per prompt."""
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
        "squared_score_norms",
    )
    arrays: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in names
    }
    return AdvantageInputs(**arrays)
