"""Credit assignment: the way of a batch from its rewards to its advantages.

    outcome rewards -----------------+
    KL to the reference, per token --+--> advantage estimator --> TrainBatch
    entropy, per token --------------+
    values of a critic --------------+

Three things outlive a batch: the KL coefficient, the entropy temperature and the estimator's own
state. They are saved in checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from rlsys.algorithms.advantages import AdvantageInputs, AdvantageOutput
from rlsys.algorithms.bounded_ratio import finite_logprobs
from rlsys.algorithms.entropy import tuned_temperature
from rlsys.algorithms.kl import adapted_coefficient, kl_estimate
from rlsys.algorithms.value import explained_variance
from rlsys.config import RunConfig
from rlsys.data.batches import (
    LogprobBatch,
    RewardBatch,
    RolloutBatch,
    ScoredBatch,
    StopReason,
    TrainBatch,
    ValueBatch,
)
from rlsys.data.padding import ResponsePadding
from rlsys.driver.advantage_estimation import (
    EstimatorContext,
    TokenArrays,
    TokenCosts,
    advantage_inputs,
    estimate_advantages,
    of_each_response,
    reward_weights,
)
from rlsys.driver.batch_metrics import batch_metrics
from rlsys.driver.dynamic_sampling import kept_responses
from rlsys.driver.ports import StepRecords
from rlsys.driver.staleness_metrics import staleness_metrics
from rlsys.metrics import Metric, mean, total


class Credited(NamedTuple):
    """The result of assigning credit to a step's records."""

    batch: ScoredBatch  # a `TrainBatch`, unless the policy's ranks estimate the advantages
    dropped: ScoredBatch | None  # sampled and not kept; None: everything was kept
    metrics: dict[str, Metric]


def _advantage_metrics(output: AdvantageOutput, lengths: NDArray[np.int64]) -> dict[str, Metric]:
    """Return `advantage/<name>` of responses of `lengths` tokens; padding has advantage 0."""
    tokens = int(lengths.sum())
    size = mean(float(output.advantages.abs().sum()) / max(tokens, 1), tokens)
    own = {f"advantage/{name}": mean(value) for name, value in output.diagnostics.items()}
    return {"advantage/mean_abs": size} | own


def _critic_metrics(
    name: str, inputs: AdvantageInputs, output: AdvantageOutput
) -> dict[str, Metric]:
    """Return `critic/...` of the values before their update.

    Raises:
        ValueError: the estimator `name` returned no targets for the critic.
    """
    if output.returns is None:
        raise ValueError(
            f"algorithm.advantage.name: {name!r} returned no returns, which are the targets of the "
            "critic. Return them in AdvantageOutput, or set critic.enabled to false."
        )
    assert inputs.values is not None, "the critic has computed its values"
    mask = inputs.response_mask
    tokens = int(mask.sum())
    if not tokens:
        return {}

    explained = explained_variance(inputs.values, output.returns, mask)
    metrics = {
        "critic/value_mean": mean(float(inputs.values[mask].mean()), tokens),
        "critic/return_mean": mean(float(output.returns[mask].mean()), tokens),
    }
    if math.isfinite(explained):
        metrics["critic/explained_variance"] = mean(explained, tokens)
    return metrics


class CreditAssigner:
    """A converter of scored rollouts into train batches, one after the other."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._kl_coefficient = config.algorithm.kl.coefficient
        self._temperature = config.algorithm.entropy.temperature
        self._estimator_state: Mapping[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """Return what `load_state` needs to continue from here, ready for JSON."""
        return {
            "kl_coefficient": self._kl_coefficient,
            "entropy_temperature": self._temperature,
            "estimator": dict(self._estimator_state),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`.

        A fixed coefficient or temperature keeps the configured value, and so does one that `state`
        leaves out.
        """
        if self._config.algorithm.kl.target is not None:
            self._kl_coefficient = state.get("kl_coefficient", self._kl_coefficient)
        if self._config.algorithm.entropy.target is not None:
            self._temperature = state.get("entropy_temperature", self._temperature)
        self._estimator_state = state.get("estimator", {})

    def credit(self, records: StepRecords) -> Credited:
        """Return the batch of a step with its advantages, the dropped one, and metrics of both.

        Raises:
            ValueError: see `assign`.
        """
        rollouts = RolloutBatch.concatenate(records.rollouts)
        rewards = RewardBatch.concatenate(records.rewards)
        greedy = RewardBatch.concatenate(records.greedy) if records.greedy else None

        dropped = None
        if records.dropped_rollouts:
            dropped = ScoredBatch(
                rollouts=RolloutBatch.concatenate(records.dropped_rollouts),
                rewards=RewardBatch.concatenate(records.dropped_rewards),
            )

        batch, metrics = self.assign(
            rollouts, rewards, records.old, records.ref, greedy, values=records.values
        )
        if self._config.trainer.max_staleness and records.weight_version is not None:
            metrics |= staleness_metrics(batch, records.weight_version)
        return Credited(batch, dropped, batch_metrics(batch, dropped, greedy) | metrics)

    def assign(
        self,
        rollouts: RolloutBatch,
        rewards: RewardBatch,
        old: Sequence[LogprobBatch],
        ref: Sequence[LogprobBatch],
        greedy: RewardBatch | None = None,
        *,
        values: Sequence[ValueBatch] = (),
    ) -> tuple[ScoredBatch, dict[str, Metric]]:
        """Return the batch of a joined step, and metrics.

        The batch is a `TrainBatch`; with `algorithm.advantage.recompute` a `ScoredBatch`, for which
        `recomputed` estimates each mini-batch. `greedy` has one response for each prompt of
        `rollouts`, in their order.

        Raises:
            ValueError: the estimator lacks an input, or its result has the wrong type or shape, or
                is not finite.
        """
        arrays = TokenArrays.join(rollouts, old, ref, values)
        scored = _scored(rollouts, rewards, greedy)
        batch = self._scored_batch(rollouts, rewards, arrays, scored)
        metrics: dict[str, Metric] = {}

        if not self._config.algorithm.advantage.recompute:
            context = EstimatorContext(
                costs=self._costs(),
                greedy=greedy,
                state=self._estimator_state,
                reward_weights=reward_weights(self._config),
            )
            batch, metrics = self._credited(batch, arrays, context, scored)

        if not scored.all():
            metrics["reward/dropped"] = total(int((~scored).sum()))
        # The coefficients move last: this batch was computed with their present values.
        return batch, metrics | self._adapt(rollouts, arrays)

    def _costs(self) -> TokenCosts:
        return TokenCosts(
            kl_coefficient=self._kl_coefficient, entropy_temperature=self._temperature
        )

    def _credited(
        self,
        batch: ScoredBatch,
        arrays: TokenArrays,
        context: EstimatorContext,
        scored: NDArray[np.bool_],
    ) -> tuple[TrainBatch, dict[str, Metric]]:
        """Return the batch with the advantages of the responses `scored`, and their metrics."""
        rollouts = batch.rollouts
        rows = np.flatnonzero(scored)
        if not len(rows):
            nothing = np.zeros(len(rollouts.token_ids), dtype=np.float32)
            return batch.credited(nothing), {}

        inputs = advantage_inputs(
            self._config.algorithm, rollouts, batch.rewards, arrays, context, rows
        )
        output = estimate_advantages(self._config, inputs)
        self._estimator_state = output.state

        # The precision of the rollouts: float32 in runs, float64 in exact enumerations.
        precision = rollouts.rollout_logprobs.dtype
        advantages = _flat(rollouts, output.advantages, rows, precision)
        returns = None
        if output.returns is not None:
            returns = _flat(rollouts, output.returns, rows, precision)
        credited = batch.credited(advantages, returns=returns)
        metrics = _advantage_metrics(output, rollouts.response_lengths[rows])
        if arrays.values is not None:
            name = self._config.algorithm.advantage.name
            metrics |= _critic_metrics(name, inputs, output)
        return credited, metrics

    def _scored_batch(
        self,
        rollouts: RolloutBatch,
        rewards: RewardBatch,
        arrays: TokenArrays,
        scored: NDArray[np.bool_],
    ) -> ScoredBatch:
        kl = self._config.algorithm.kl
        # As a reward, an exact KL reaches the tokens before it; its own position gets its gradient
        # from the loss.
        in_loss = kl.placement == "loss" or kl.estimator == "exact"
        return ScoredBatch(
            rollouts=rollouts,
            rewards=rewards,
            old_logprobs=arrays.old,
            ref_logprobs=arrays.ref,
            values=arrays.values,
            kl_coefficient=self._kl_coefficient if in_loss else 0.0,
            trained=_trained(self._config, rollouts, rewards, scored),
        )

    def _adapt(self, rollouts: RolloutBatch, arrays: TokenArrays) -> dict[str, Metric]:
        """Adapt the KL coefficient and the entropy temperature to this batch.

        Return the values with which this batch was computed, as metrics.
        """
        kl = self._config.algorithm.kl
        entropy = self._config.algorithm.entropy
        mask = rollouts.response_mask
        metrics: dict[str, Metric] = {}

        if kl.coefficient > 0:
            metrics["kl/coefficient"] = mean(self._kl_coefficient)
        if kl.target is not None and arrays.old is not None and arrays.ref is not None:
            old = torch.from_numpy(arrays.old[mask])
            ref = torch.from_numpy(arrays.ref[mask])
            # NaN where no token was sampled: the coefficient stays then.
            measured = float(kl_estimate(finite_logprobs(old), ref, "k3").mean())
            self._kl_coefficient = adapted_coefficient(
                self._kl_coefficient, measured, target=kl.target, horizon=kl.horizon
            )

        if entropy.temperature > 0:
            metrics["entropy/temperature"] = mean(self._temperature)
            if entropy.target is not None and arrays.old is not None:
                self._temperature = tuned_temperature(
                    self._temperature,
                    -float(arrays.old[mask].mean()),
                    target=entropy.target,
                    learning_rate=entropy.learning_rate,
                )
        return metrics


@dataclass(frozen=True, kw_only=True)
class LiveLogprobs:
    """Values per token of a batch under the live policy, flat."""

    logprobs: NDArray[np.float32]  # [N]
    squared_score_norms: NDArray[np.float32]  # [N]
    # [N, p] of the estimator's auxiliary network; None: there is none
    auxiliary: NDArray[np.float32] | None = None


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """A batch whose advantages were estimated again, with the estimator's other results."""

    batch: TrainBatch
    metrics: dict[str, Metric]
    auxiliary_targets: NDArray[np.float32] | None  # [N, q] targets of its auxiliary network
    state: Mapping[str, Any]  # for the next mini-batch's `recomputed`


def recomputed(
    config: RunConfig,
    batch: ScoredBatch,
    rows: NDArray[np.int64],
    live: LiveLogprobs,
    state: Mapping[str, Any],
) -> Recomputed:
    """Return `batch` with advantages estimated from the live log-probabilities.

    For `algorithm.advantage.recompute`. The live log-probabilities become `old_logprobs`; the
    responses `rows` get advantages. `state` is what the estimator kept of the mini-batch before. It
    is not that of `CreditAssigner`, which has seen these responses. Costs of tokens and greedy
    responses cannot be combined with it (refused before a run starts).

    Raises:
        ValueError: the estimator lacks an input, or its result has the wrong type or shape, or is
            not finite.
    """
    rollouts = batch.rollouts
    rows = rows[batch.rewards.scored[rows]]
    arrays = TokenArrays(
        old=live.logprobs, squared_score_norms=live.squared_score_norms, auxiliary=live.auxiliary
    )
    context = EstimatorContext(state=state, reward_weights=reward_weights(config))
    inputs = advantage_inputs(config.algorithm, rollouts, batch.rewards, arrays, context, rows)
    output = estimate_advantages(config, inputs)

    targets = output.auxiliary_targets
    advantages = _flat(rollouts, output.advantages, rows, np.float32)
    return Recomputed(
        batch=batch.credited(advantages, old_logprobs=live.logprobs),
        metrics=_advantage_metrics(output, rollouts.response_lengths[rows]),
        auxiliary_targets=None if targets is None else _flat(rollouts, targets, rows, np.float32),
        state=output.state,
    )


def _flat(
    rollouts: RolloutBatch, values: Tensor, rows: NDArray[np.int64], precision: DTypeLike
) -> NDArray[Any]:
    """Flatten [b, T, ...] of the responses `rows` into [N, ...]; the other responses get 0."""
    padding = ResponsePadding.of(rollouts.sequences)
    whole = torch.zeros(*padding.shape, *values.shape[2:], dtype=values.dtype)
    whole[torch.from_numpy(rows)] = values
    return padding.unpad(whole, len(rollouts.token_ids), precision)


def _trained(
    config: RunConfig,
    rollouts: RolloutBatch,
    rewards: RewardBatch,
    scored: NDArray[np.bool_],
) -> NDArray[np.bool_] | None:
    """Return [B] which responses enter the loss; None: all.

    Group statistics do not depend on it: they are over all responses that have a reward.
    """
    algorithm = config.algorithm
    conditions = []
    if not scored.all():
        conditions.append(scored)
    if algorithm.overlong.mask_truncated:
        conditions.append(rollouts.stop_reasons != StopReason.LENGTH)
    if algorithm.dynamic_sampling.max_rounds > 1:
        by = algorithm.dynamic_sampling.by
        conditions.append(kept_responses(rewards, rollouts.group_ids, by))
    return np.logical_and.reduce(conditions) if conditions else None


def _scored(
    rollouts: RolloutBatch, rewards: RewardBatch, greedy: RewardBatch | None
) -> NDArray[np.bool_]:
    """Return [B] which responses have a reward.

    Where an estimator compares with greedy responses, the greedy one must have a reward too.
    """
    if greedy is None:
        return rewards.scored
    return rewards.scored & ~np.isnan(of_each_response(rollouts, greedy))
