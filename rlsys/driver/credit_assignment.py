"""From rewards to advantages: everything that happens to a batch between the reward worker and the update.

    outcome rewards -----------------+
    KL to the reference, per token --+--> advantage estimator --> TrainBatch
    entropy, per token --------------+

Three things outlive a batch: the KL coefficient, the entropy temperature and what the estimator asks to keep. They are saved in checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlsys.algorithms.advantages import (
    AdvantageInputs,
    AdvantageOutput,
    run_estimator,
)
from rlsys.algorithms.advantages.hierarchical.baseline_network import BaselineRegression
from rlsys.algorithms.bounded_ratio import finite_logprobs
from rlsys.algorithms.entropy import entropy_rewards, tuned_temperature
from rlsys.algorithms.kl import adapted_coefficient, kl_estimate, kl_rewards
from rlsys.config import RunConfig
from rlsys.data.batches import LogprobBatch, RewardBatch, RolloutBatch, StopReason, TrainBatch
from rlsys.data.padding import ResponsePadding
from rlsys.driver.dynamic_sampling import kept_responses
from rlsys.metrics import Metric, mean, total
from rlsys.run.required_inputs import estimator_parameters


@dataclass(frozen=True, kw_only=True)
class _Arrays:
    """The log-probabilities of a batch, flat `[N]`."""

    old: NDArray[np.float32] | None
    ref: NDArray[np.float32] | None
    score_norms: NDArray[np.float32] | None

    @staticmethod
    def join(
        rollouts: RolloutBatch, old: Sequence[LogprobBatch], ref: Sequence[LogprobBatch]
    ) -> _Arrays:
        offsets = rollouts.sequence_offsets
        with_norms = bool(old) and all(part.score_norms is not None for part in old)
        return _Arrays(
            old=LogprobBatch.scatter(old, offsets) if old else None,
            ref=LogprobBatch.scatter(ref, offsets) if ref else None,
            score_norms=LogprobBatch.scatter(old, offsets, "score_norms") if with_norms else None,
        )


def _estimate(config: RunConfig, inputs: AdvantageInputs) -> AdvantageOutput:
    """What the configured estimator makes of `inputs`.

    Raises:
        ValueError: its result has the wrong type or shape, or is not finite.
    """
    return run_estimator(config.algorithm.advantage.name, inputs, estimator_parameters(config))


def _advantage_metrics(output: AdvantageOutput, lengths: NDArray[np.int64]) -> dict[str, Metric]:
    """`advantage/<name>` of some responses with so many tokens each; advantages are 0 where there is no token."""
    tokens = int(lengths.sum())
    size = mean(float(output.advantages.abs().sum()) / max(tokens, 1), tokens)
    return {"advantage/mean_abs": size} | {
        f"advantage/{name}": mean(value) for name, value in output.diagnostics.items()
    }


class CreditAssigner:
    """Turns scored rollouts into train batches, one after the other."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._kl_coefficient = config.algorithm.kl.coefficient
        self._temperature = config.algorithm.entropy.temperature
        self._estimator_state: Mapping[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on from here, ready for JSON."""
        return {
            "kl_coefficient": self._kl_coefficient,
            "entropy_temperature": self._temperature,
            "estimator": dict(self._estimator_state),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. A fixed coefficient or temperature stays what the configuration says, and so does what `state` leaves out."""
        if self._config.algorithm.kl.target is not None:
            self._kl_coefficient = state.get("kl_coefficient", self._kl_coefficient)
        if self._config.algorithm.entropy.target is not None:
            self._temperature = state.get("entropy_temperature", self._temperature)
        self._estimator_state = state.get("estimator", {})

    def assign(
        self,
        rollouts: RolloutBatch,
        rewards: RewardBatch,
        old: Sequence[LogprobBatch],
        ref: Sequence[LogprobBatch],
        greedy: RewardBatch | None = None,
    ) -> tuple[TrainBatch, dict[str, Metric]]:
        """The train batch of a joined batch, and metrics. `greedy` has one response for each prompt of `rollouts`, in its order.

        With `algorithm.advantage.recompute` the batch has no advantages yet: `recomputed` estimates those of each mini-batch.

        Raises:
            ValueError: the estimator gave a result of the wrong type or shape, or one that is not finite.
        """
        arrays = _Arrays.join(rollouts, old, ref)
        padding = ResponsePadding.of(rollouts)
        scored = _scored(rollouts, rewards, greedy)
        rows = np.flatnonzero(scored)
        output, metrics = None, {}
        if not self._config.algorithm.advantage.recompute and len(rows):
            inputs = self._inputs(rollouts, rewards, arrays, padding, greedy)
            # A response without a reward is not there for the estimator, so its group is one smaller.
            output = _estimate(self._config, inputs if scored.all() else _of_rows(inputs, rows))
            self._estimator_state = output.state
            metrics = _advantage_metrics(output, rollouts.response_lengths[rows])
        batch = self._train_batch(rollouts, rewards, arrays, output, padding, scored)
        if not scored.all():
            metrics["reward/dropped"] = total(len(scored) - len(rows))
        return batch, metrics | self._adapt(rollouts, arrays)

    def _inputs(
        self,
        rollouts: RolloutBatch,
        rewards: RewardBatch,
        arrays: _Arrays,
        padding: ResponsePadding,
        greedy: RewardBatch | None,
    ) -> AdvantageInputs:
        def padded(values: NDArray[np.float32] | None) -> Tensor | None:
            return None if values is None else padding.pad(values)

        mask, old, ref = padding.pad(rollouts.response_mask), padded(arrays.old), padded(arrays.ref)
        placement = self._config.algorithm.kl.placement
        return AdvantageInputs(
            rewards=torch.from_numpy(rewards.rewards.copy()),
            response_mask=mask,
            group_ids=torch.from_numpy(rollouts.group_ids.copy()),
            token_rewards=self._token_rewards(old, ref, mask),
            rollout_logprobs=padding.pad(rollouts.rollout_logprobs),
            old_logprobs=old,
            ref_logprobs=ref,
            score_norms=padded(arrays.score_norms),
            greedy_rewards=None
            if greedy is None
            else torch.from_numpy(_of_each_response(rollouts, greedy.rewards)),
            truncated=torch.from_numpy(rollouts.stop_reasons == StopReason.LENGTH),
            kl_coefficient=self._kl_coefficient if placement == "advantage" else 0.0,
            state=self._estimator_state,
        )

    def _token_rewards(self, old: Tensor | None, ref: Tensor | None, mask: Tensor) -> Tensor | None:
        """[B, T] what each token pays for its KL and earns for its surprise; None where neither is asked for."""
        kl, parts = self._config.algorithm.kl, []
        if kl.placement == "reward" and self._kl_coefficient > 0:
            assert old is not None, (
                "the driver computes old log-probabilities where the KL is placed in the reward"
            )
            assert ref is not None, "and those of the reference"
            parts.append(kl_rewards(old, ref, mask, self._kl_coefficient))
        if self._temperature > 0:
            assert old is not None, (
                "the driver computes old log-probabilities where entropy is rewarded"
            )
            parts.append(entropy_rewards(old, mask, self._temperature))
        return sum(parts[1:], parts[0]) if parts else None

    def _train_batch(
        self,
        rollouts: RolloutBatch,
        rewards: RewardBatch,
        arrays: _Arrays,
        output: AdvantageOutput | None,
        padding: ResponsePadding,
        scored: NDArray[np.bool_],
    ) -> TrainBatch:
        tokens, algorithm = len(rollouts.token_ids), self._config.algorithm

        def flat(values: Tensor | None) -> NDArray[np.float32] | None:
            if values is None:
                return None
            whole = torch.zeros(padding.shape, dtype=values.dtype)
            whole[torch.from_numpy(scored)] = values
            precision = rollouts.rollout_logprobs.dtype  # float32, but in exact enumerations
            return padding.unpad(whole, tokens, precision)

        advantages = flat(output.advantages if output else None)
        if advantages is None and not algorithm.advantage.recompute:
            advantages = np.zeros(tokens, dtype=np.float32)  # no response has a reward
        return TrainBatch(
            rollouts=rollouts,
            rewards=rewards,
            advantages=advantages,
            old_logprobs=arrays.old,
            ref_logprobs=arrays.ref,
            returns=flat(output.returns if output else None),
            kl_coefficient=self._kl_coefficient if algorithm.kl.placement == "loss" else 0.0,
            trained=_trained(self._config, rollouts, rewards, scored),
        )

    def _adapt(self, rollouts: RolloutBatch, arrays: _Arrays) -> dict[str, Metric]:
        """Move the adaptive coefficient and temperature, from what this batch shows; the values that this batch was made with are reported."""
        kl, entropy, mask = (
            self._config.algorithm.kl,
            self._config.algorithm.entropy,
            rollouts.response_mask,
        )
        metrics: dict[str, Metric] = {}
        if kl.coefficient > 0:
            metrics["kl/coefficient"] = mean(self._kl_coefficient)
        if kl.target is not None and arrays.old is not None and arrays.ref is not None:
            old, ref = torch.from_numpy(arrays.old[mask]), torch.from_numpy(arrays.ref[mask])
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
    """What the live policy says of a batch, flat."""

    logprobs: NDArray[np.float32]  # [N]
    score_norms: NDArray[np.float32]  # [N]
    layer_baselines: NDArray[np.float32] | None = (
        None  # [N, p] of a baseline network; None: there is none
    )


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """A batch whose advantages were estimated again, and what else the estimator gave."""

    batch: TrainBatch
    metrics: dict[str, Metric]
    regression: BaselineRegression | None  # flat [N, ...], what a baseline network is to learn
    state: Mapping[str, Any]  # for the next mini-batch's `recomputed`


def recomputed(
    config: RunConfig,
    batch: TrainBatch,
    rows: NDArray[np.int64],
    live: LiveLogprobs,
    state: Mapping[str, Any],
) -> Recomputed:
    """`batch` with the live log-probabilities as `old_logprobs` and, at the responses `rows`, advantages that were estimated from them.

    For `algorithm.advantage.recompute`. `state` is what the estimator kept of the mini-batch before: not that of `CreditAssigner`, which has seen
    these responses. Costs of tokens and greedy responses do not go with it (refused before a run starts).

    Raises:
        ValueError: the estimator gave a result of the wrong type or shape, or one that is not finite.
    """
    rollouts = batch.rollouts
    rows = rows[batch.rewards.scored[rows]]
    padding, index = ResponsePadding.of(rollouts), torch.from_numpy(rows)
    inputs = AdvantageInputs(
        rewards=torch.from_numpy(batch.rewards.rewards[rows]),
        response_mask=padding.pad(rollouts.response_mask)[index],
        group_ids=torch.from_numpy(rollouts.group_ids[rows]),
        rollout_logprobs=padding.pad(rollouts.rollout_logprobs)[index],
        old_logprobs=padding.pad(live.logprobs)[index],
        score_norms=padding.pad(live.score_norms)[index],
        layer_baselines=None
        if live.layer_baselines is None
        else padding.pad(live.layer_baselines)[index],
        truncated=torch.from_numpy(rollouts.stop_reasons[rows] == StopReason.LENGTH),
        state=state,
    )
    output = _estimate(config, inputs)

    def flat(values: Tensor) -> NDArray[np.float32]:
        """[b, t, ...] of the rows, perhaps without columns at the end -> [N, ...]."""
        whole = torch.zeros(*padding.shape, *values.shape[2:])
        whole[index, : values.shape[1]] = values.float()
        return padding.unpad(whole, len(rollouts.token_ids))

    regression = output.regression
    if regression is not None:
        regression = BaselineRegression(
            *(
                torch.from_numpy(flat(array))
                for array in (regression.features, regression.base, regression.weights)
            )
        )
    return Recomputed(
        batch=replace(batch, advantages=flat(output.advantages), old_logprobs=live.logprobs),
        metrics=_advantage_metrics(output, rollouts.response_lengths[rows]),
        regression=regression,
        state=output.state,
    )


def _trained(
    config: RunConfig,
    rollouts: RolloutBatch,
    rewards: RewardBatch,
    scored: NDArray[np.bool_],
) -> NDArray[np.bool_] | None:
    """[B] the responses that enter the loss; None: all. Statistics are over all that are scored."""
    algorithm = config.algorithm
    conditions = [] if scored.all() else [scored]
    if algorithm.overlong.mask_truncated:
        conditions.append(rollouts.stop_reasons != StopReason.LENGTH)
    if algorithm.dynamic_sampling.max_rounds > 1:
        by = algorithm.dynamic_sampling.by
        conditions.append(kept_responses(rewards, rollouts.group_ids, by))
    return np.logical_and.reduce(conditions) if conditions else None


def _of_rows(inputs: AdvantageInputs, rows: NDArray[np.int64]) -> AdvantageInputs:
    """The inputs of some responses only."""
    index = torch.from_numpy(rows)
    arrays = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    return replace(
        inputs,
        **{name: array[index] for name, array in arrays.items() if isinstance(array, Tensor)},
    )


def _scored(
    rollouts: RolloutBatch, rewards: RewardBatch, greedy: RewardBatch | None
) -> NDArray[np.bool_]:
    """[B] whether a response has a reward, and its prompt's greedy response one too where there is one to compare with."""
    if greedy is None:
        return rewards.scored
    return rewards.scored & ~np.isnan(_of_each_response(rollouts, greedy.rewards))


def _of_each_response(
    rollouts: RolloutBatch, of_prompts: NDArray[np.float32]
) -> NDArray[np.float32]:
    """[P] values in the order of the prompts -> [B] at their responses."""
    index = {int(group): i for i, group in enumerate(rollouts.prompts.group_ids)}
    return of_prompts[[index[int(group)] for group in rollouts.group_ids]]
