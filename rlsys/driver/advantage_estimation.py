"""From a scored batch to an advantage estimator and back: the one place that builds its inputs.

    rewards ------------------------------+
    log-probs, norms, auxiliary (flat) ---+--> AdvantageInputs [B, T] --> estimator --> AdvantageOutput
    costs of tokens (KL, entropy) --------+

The advantage controller estimates once per batch; with `algorithm.advantage.recompute` the policy's ranks
estimate before each mini-batch. Both call the functions here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlsys.algorithms.advantages import AdvantageInputs, AdvantageOutput, run_estimator
from rlsys.algorithms.entropy import entropy_rewards
from rlsys.algorithms.kl import check_kl_in_reward, kl_rewards
from rlsys.config import AlgorithmConfig, RunConfig
from rlsys.data.batches import LogprobBatch, RewardBatch, RolloutBatch, StopReason
from rlsys.data.padding import ResponsePadding
from rlsys.run.required_inputs import estimator_parameters


@dataclass(frozen=True, kw_only=True)
class TokenArrays:
    """What policy and reference say of a batch's tokens, flat. None: nobody was asked."""

    old: NDArray[np.float32] | None = None  # [N]
    ref: NDArray[np.float32] | None = None  # [N]
    squared_score_norms: NDArray[np.float32] | None = None  # [N]
    auxiliary: NDArray[np.float32] | None = None  # [N, p] of the estimator's network

    @staticmethod
    def join(
        rollouts: RolloutBatch, old: Sequence[LogprobBatch], ref: Sequence[LogprobBatch]
    ) -> TokenArrays:
        """Return what all ranks' parts say, in the order of the batch."""
        offsets = rollouts.sequence_offsets
        with_norms = bool(old) and all(part.squared_score_norms is not None for part in old)
        return TokenArrays(
            old=LogprobBatch.scatter(old, offsets) if old else None,
            ref=LogprobBatch.scatter(ref, offsets) if ref else None,
            squared_score_norms=LogprobBatch.scatter(old, offsets, "squared_score_norms")
            if with_norms
            else None,
        )


@dataclass(frozen=True, kw_only=True)
class TokenCosts:
    """The present weights of what each token is charged for; they may be adapted from batch to batch."""

    kl_coefficient: float = 0.0
    entropy_temperature: float = 0.0


@dataclass(frozen=True, kw_only=True)
class EstimatorContext:
    """What an estimator reads besides the responses and their log-probabilities."""

    costs: TokenCosts = TokenCosts()
    greedy: RewardBatch | None = (
        None  # of one greedy response per prompt, in the order of the prompts
    )
    state: Mapping[str, Any] = field(default_factory=dict)  # what it kept of the batch before


def advantage_inputs(
    algorithm: AlgorithmConfig,
    rollouts: RolloutBatch,
    rewards: RewardBatch,
    arrays: TokenArrays,
    context: EstimatorContext,
    rows: NDArray[np.int64] | None = None,
) -> AdvantageInputs:
    """Return the inputs of the configured estimator for the responses `rows`, padded to the longest of the batch.

    `rows` None: all. A response without a reward must not be among them: it is not there for the
    estimator, so its group is one smaller.

    Raises:
        ValueError: `algorithm.kl` charges tokens for an estimate of the KL that has no right gradient
            there.
    """
    padding = ResponsePadding.of(rollouts.sequences)
    index = torch.arange(len(rollouts)) if rows is None else torch.from_numpy(rows)

    def padded(values: NDArray | None) -> Tensor | None:
        return None if values is None else padding.pad(values)[index]

    def chosen(values: NDArray) -> Tensor:
        return torch.from_numpy(values.copy())[index]

    mask = padding.pad(rollouts.response_mask)[index]
    old, ref = padded(arrays.old), padded(arrays.ref)
    greedy, in_advantage = context.greedy, algorithm.kl.placement == "advantage"
    return AdvantageInputs(
        rewards=chosen(rewards.rewards),
        response_mask=mask,
        group_ids=chosen(rollouts.group_ids),
        token_rewards=_token_rewards(algorithm, context.costs, old, ref, mask),
        rollout_logprobs=padded(rollouts.rollout_logprobs),
        old_logprobs=old,
        ref_logprobs=ref,
        squared_score_norms=padded(arrays.squared_score_norms),
        greedy_rewards=None if greedy is None else chosen(of_each_response(rollouts, greedy)),
        truncated=chosen(rollouts.stop_reasons == StopReason.LENGTH),
        auxiliary=padded(arrays.auxiliary),
        kl_coefficient=context.costs.kl_coefficient if in_advantage else 0.0,
        state=context.state,
    )


def _token_rewards(
    algorithm: AlgorithmConfig,
    costs: TokenCosts,
    old: Tensor | None,
    ref: Tensor | None,
    mask: Tensor,
) -> Tensor | None:
    """Return [B, T] the KL penalty and the entropy bonus of each token; None where neither is asked for."""
    kl, parts = algorithm.kl, []
    if kl.placement == "reward" and costs.kl_coefficient > 0:
        check_kl_in_reward(kl.estimator, kl.direction, kl.placement)
        assert old is not None, "a KL in the reward has old log-probabilities computed"
        assert ref is not None, "and those of the reference"
        parts.append(kl_rewards(old, ref, mask, costs.kl_coefficient))
    if costs.entropy_temperature > 0:
        assert old is not None, "an entropy in the reward has old log-probabilities computed"
        parts.append(entropy_rewards(old, mask, costs.entropy_temperature))
    return sum(parts[1:], parts[0]) if parts else None


def of_each_response(rollouts: RolloutBatch, greedy: RewardBatch) -> NDArray[np.float32]:
    """Return [B] at each response the reward of its prompt's greedy response."""
    index = {int(group): i for i, group in enumerate(rollouts.prompts.group_ids)}
    return greedy.rewards[[index[int(group)] for group in rollouts.group_ids]]


def estimate_advantages(config: RunConfig, inputs: AdvantageInputs) -> AdvantageOutput:
    """Return what the configured estimator makes of `inputs`.

    Raises:
        ValueError: an input that it needs is missing, or its result has the wrong type or shape, or is
            not finite.
    """
    return run_estimator(config.algorithm.advantage.name, inputs, estimator_parameters(config))
