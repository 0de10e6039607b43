"""The advantage estimator's inputs, built here and nowhere else, and its call.

    rewards, rewards of steps ------------+
    log-probs, values, norms, ... (flat) -+--> AdvantageInputs --> estimator --> AdvantageOutput
    costs of tokens (KL, entropy) --------+         [B, T]                           [B, T]

The advantage controller estimates once per batch; with `algorithm.advantage.recompute` the ranks of
the policy estimate before each mini-batch. Both call the functions here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

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
    # Of the reward functions, by name; needed where one gives rewards of steps.
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

    whole_mask = padding.pad(rollouts.response_mask)
    mask = whole_mask[index]
    old = padded(arrays.old)
    ref = padded(arrays.ref)
    greedy = context.greedy
    in_advantage = algorithm.kl.placement == "advantage"
    costs = _token_costs(
        algorithm, context.costs, mask, old=old, ref=ref, exact_kl=padded(arrays.exact_kl)
    )
    components, weights = _reward_components(rewards, context.reward_weights)
    baseline = None if greedy is None else _greedy_totals(rollouts, greedy, context)
    steps = _steps(rewards, context.reward_weights, whole_mask)

    return AdvantageInputs(
        rewards=chosen(rewards.rewards),
        response_mask=mask,
        group_ids=chosen(rollouts.group_ids),
        token_rewards=_sum_of(costs, None if steps is None else steps.rewards[index]),
        rollout_logprobs=padded(rollouts.rollout_logprobs),
        old_logprobs=old,
        ref_logprobs=ref,
        values=padded(arrays.values),
        squared_score_norms=padded(arrays.squared_score_norms),
        greedy_rewards=None if baseline is None else chosen(baseline),
        step_ends=None if steps is None else steps.ends[index],
        truncated=chosen(rollouts.stop_reasons == StopReason.LENGTH),
        reward_components=None if components is None else chosen(components),
        reward_weights=weights,
        problem_ids=_problem_ids(rollouts, index.tolist()),
        auxiliary=padded(arrays.auxiliary),
        kl_coefficient=context.costs.kl_coefficient if in_advantage else 0.0,
        state=context.state,
    )


def _token_costs(
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

    return _sum_of(*parts)


def _sum_of(*parts: Tensor | None) -> Tensor | None:
    """Return the sum of the parts that are there; None without any."""
    present = [part for part in parts if part is not None]
    return sum(present[1:], present[0]) if present else None


class _Steps(NamedTuple):
    """The steps of a batch, of all functions that reward steps."""

    rewards: Tensor  # [B, T] float32, the weighted sum of the steps that end at each token
    ends: Tensor  # [B, T] bool


def _steps(
    rewards: RewardBatch, weights: Mapping[str, float], response_mask: Tensor
) -> _Steps | None:
    """Return the steps of the responses; None where no function gives rewards of steps.

    Conventions: a token that the policy did not sample earns nothing, so a step that ends there
    counts for the last sampled token before it, or else for the first of the response.

    Example: a function of weight 2 with steps of rewards 1 and 0.5 that end at the tokens 1 and 3
    of four: rewards (0, 2, 0, 1), ends at 1 and 3.
    """
    if not rewards.step_rewards:
        return None

    sampled = _sampled_at_or_before(response_mask)
    total = torch.zeros(response_mask.shape)
    ends = torch.zeros_like(response_mask)
    for name, steps in rewards.step_rewards.items():
        rows = torch.from_numpy(steps.rows)
        columns = sampled[rows, torch.from_numpy(steps.ends.astype(np.int64))]
        weighted = torch.from_numpy(steps.rewards * np.float32(weights[name]))
        total.index_put_((rows, columns), weighted, accumulate=True)
        ends[rows, columns] = True

    return _Steps(total, ends & response_mask)


def _sampled_at_or_before(response_mask: Tensor) -> Tensor:
    """Return [B, T] the last sampled token up to each one; the first one where none is before."""
    columns = torch.arange(response_mask.shape[1]).expand(response_mask.shape)
    before = torch.where(response_mask, columns, -1).cummax(1).values
    first = response_mask.int().argmax(1, keepdim=True)
    return torch.where(before < 0, first, before)


def _greedy_totals(
    rollouts: RolloutBatch, greedy: RewardBatch, context: EstimatorContext
) -> NDArray[Any]:
    """Return [B] the reward of each prompt's greedy response, with the rewards of its steps."""
    totals = greedy.rewards.copy()
    for name, steps in greedy.step_rewards.items():
        weight = np.float32(context.reward_weights[name])
        np.add.at(totals, steps.rows, steps.rewards * weight)
    return of_each_response(rollouts, replace(greedy, rewards=totals))


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
