"""The advantage estimator's inputs, built here and nowhere else, and its call.

    rewards ------------------------------+
    log-probs, values, norms, ... (flat) -+--> AdvantageInputs --> estimator --> AdvantageOutput
    costs of tokens (KL, entropy) --------+         [B, T]                           [B, T]

The advantage controller estimates once per batch; with `algorithm.advantage.recompute` the ranks of
the policy estimate before each mini-batch. Both call the functions here.
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
from rlsys.data.batches import LogprobBatch, RewardBatch, RolloutBatch, StopReason, ValueBatch
from rlsys.data.padding import ResponsePadding
from rlsys.run.required_inputs import estimator_parameters


@dataclass(frozen=True, kw_only=True)
class TokenArrays:
    """Values per token from policy, reference and critic, flat. None: they were not computed."""

    old: NDArray[np.float32] | None = None  # [N]
    ref: NDArray[np.float32] | None = None  # [N]
    values: NDArray[np.float32] | None = None  # [N]
    squared_score_norms: NDArray[np.float32] | None = None  # [N]
    exact_kl: NDArray[np.float32] | None = None  # [N] of old and reference, over the vocabulary
    auxiliary: NDArray[np.float32] | None = None  # [N, p] of the estimator's network

    @staticmethod
    def join(
        rollouts: RolloutBatch,
        old: Sequence[LogprobBatch],
        ref: Sequence[LogprobBatch],
        values: Sequence[ValueBatch] = (),
    ) -> TokenArrays:
        """Join the parts of all ranks, in the order of the batch."""
        offsets = rollouts.sequence_offsets
        norms = None
        if old and all(part.squared_score_norms is not None for part in old):
            norms = LogprobBatch.scatter(old, offsets, "squared_score_norms")
        exact_kl = None
        if old and all(part.exact_kl is not None for part in old):
            exact_kl = LogprobBatch.scatter(old, offsets, "exact_kl")

        return TokenArrays(
            old=LogprobBatch.scatter(old, offsets) if old else None,
            ref=LogprobBatch.scatter(ref, offsets) if ref else None,
            values=ValueBatch.scatter(values, offsets) if values else None,
            squared_score_norms=norms,
            exact_kl=exact_kl,
        )


@dataclass(frozen=True, kw_only=True)
class TokenCosts:
    """Current coefficients of the costs per token; they may be adapted from batch to batch."""

    kl_coefficient: float = 0.0
    entropy_temperature: float = 0.0


@dataclass(frozen=True, kw_only=True)
class EstimatorContext:
    """Inputs of an estimator besides the responses and their log-probabilities."""

    costs: TokenCosts = TokenCosts()
    # Of one greedy response per prompt, in the order of the prompts.
    greedy: RewardBatch | None = None
    # Kept by the estimator from the batch before.
    state: Mapping[str, Any] = field(default_factory=dict)
    # Of the reward functions, by name.
    reward_weights: Mapping[str, float] = field(default_factory=dict)


def advantage_inputs(
    algorithm: AlgorithmConfig,
    rollouts: RolloutBatch,
    rewards: RewardBatch,
    arrays: TokenArrays,
    context: EstimatorContext,
    rows: NDArray[np.int64] | None = None,
) -> AdvantageInputs:
    """Return the inputs of the configured estimator for the responses `rows`.

    They are padded to the longest response of the batch. `rows` None: all. A response without a
    reward must not be among them: the estimator does not see it, so its group is one smaller.

    Raises:
        ValueError: `algorithm.kl` puts an estimate of the KL into the reward that has no right
            gradient there.
    """
    padding = ResponsePadding.of(rollouts.sequences)
    index = torch.arange(len(rollouts)) if rows is None else torch.from_numpy(rows)

    def padded(values: NDArray | None) -> Tensor | None:
        return None if values is None else padding.pad(values)[index]

    def chosen(values: NDArray) -> Tensor:
        return torch.from_numpy(values.copy())[index]

    mask = padding.pad(rollouts.response_mask)[index]
    old = padded(arrays.old)
    ref = padded(arrays.ref)
    greedy = context.greedy
    in_advantage = algorithm.kl.placement == "advantage"
    components, weights = _reward_components(rewards, context.reward_weights)

    return AdvantageInputs(
        rewards=chosen(rewards.rewards),
        response_mask=mask,
        group_ids=chosen(rollouts.group_ids),
        token_rewards=_token_rewards(
            algorithm, context.costs, mask, old=old, ref=ref, exact_kl=padded(arrays.exact_kl)
        ),
        rollout_logprobs=padded(rollouts.rollout_logprobs),
        old_logprobs=old,
        ref_logprobs=ref,
        values=padded(arrays.values),
        squared_score_norms=padded(arrays.squared_score_norms),
        greedy_rewards=None if greedy is None else chosen(of_each_response(rollouts, greedy)),
        truncated=chosen(rollouts.stop_reasons == StopReason.LENGTH),
        reward_components=None if components is None else chosen(components),
        reward_weights=weights,
        problem_ids=_problem_ids(rollouts, index.tolist()),
        auxiliary=padded(arrays.auxiliary),
        kl_coefficient=context.costs.kl_coefficient if in_advantage else 0.0,
        state=context.state,
    )


def _token_rewards(
    algorithm: AlgorithmConfig,
    costs: TokenCosts,
    mask: Tensor,
    *,
    old: Tensor | None,
    ref: Tensor | None,
    exact_kl: Tensor | None,
) -> Tensor | None:
    """Return [B, T] the sum of each token's KL penalty and entropy bonus; None without either."""
    kl = algorithm.kl
    parts = []
    if kl.placement == "reward" and costs.kl_coefficient > 0 and kl.estimator == "exact":
        assert exact_kl is not None, "an exact KL is computed with the old log-probabilities"
        parts.append(-costs.kl_coefficient * torch.where(mask, exact_kl, 0.0))
    elif kl.placement == "reward" and costs.kl_coefficient > 0:
        check_kl_in_reward(kl.estimator, kl.direction, kl.placement)
        assert old is not None, "a KL in the reward has old log-probabilities computed"
        assert ref is not None, "and those of the reference"
        parts.append(kl_rewards(old, ref, mask, costs.kl_coefficient))

    if costs.entropy_temperature > 0:
        assert old is not None, "an entropy in the reward has old log-probabilities computed"
        parts.append(entropy_rewards(old, mask, costs.entropy_temperature))

    return sum(parts[1:], parts[0]) if parts else None


def reward_weights(config: RunConfig) -> dict[str, float]:
    """Return the weight of each reward function, by name."""
    return {function.name: function.weight for function in config.reward.functions}


def _reward_components(
    rewards: RewardBatch, weights: Mapping[str, float]
) -> tuple[NDArray[Any] | None, Tensor | None]:
    """Return [B, K] the rewards of the functions in `weights`, and [K] their weights."""
    names = [name for name in weights if name in rewards.components]
    if not names or len(names) < len(weights):
        return None, None
    columns = np.stack([rewards.components[name] for name in names], axis=1)
    return columns, torch.tensor([weights[name] for name in names], dtype=torch.float64)


def _problem_ids(rollouts: RolloutBatch, rows: Sequence[int]) -> list[str] | None:
    """Return the id of the problem that each of the responses `rows` answers.

    None: the batch has no prompts, as one that was read from a file of responses.
    """
    prompts = rollouts.prompts
    if not len(prompts):
        return None
    ids = {
        int(group): prompt.problem_id
        for group, prompt in zip(prompts.group_ids, prompts.prompts, strict=True)
    }
    return [ids[int(rollouts.group_ids[row])] for row in rows]


def of_each_response(rollouts: RolloutBatch, greedy: RewardBatch) -> NDArray[np.float32]:
    """Return [B] the reward of the greedy response to each response's prompt."""
    index = {int(group): i for i, group in enumerate(rollouts.prompts.group_ids)}
    return greedy.rewards[[index[int(group)] for group in rollouts.group_ids]]


def estimate_advantages(config: RunConfig, inputs: AdvantageInputs) -> AdvantageOutput:
    """Run the configured estimator on `inputs`.

    Raises:
        ValueError: an input that it needs is missing, or its result has the wrong type or shape, or
            is not finite.
    """
    return run_estimator(config.algorithm.advantage.name, inputs, estimator_parameters(config))
