"""The records that pass between the stages of a step.

    PromptBatch -> RolloutBatch -> RewardBatch ---+
                        +--------> LogprobBatch --+--> ScoredBatch -> TrainBatch
                        +--------> ValueBatch ----+

Arrays are NumPy (Ray shares them zero-copy and read-only), ragged and flat, as in
`TokenSequences`, which a `RolloutBatch` contains. Nothing is padded here and no mask is inferred
from a pad id.

B responses, P prompts, N tokens. A sequence is a prompt followed by its response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlsys.data.sequences import TokenSequences


class StopReason(IntEnum):
    """The reason why a response ended; the values are stored in `RolloutBatch.stop_reasons`."""

    END = 0  # the end-of-sequence token, or a stop string
    LENGTH = 1  # max_tokens reached: the response is truncated


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One problem as the policy sees it. `token_ids` are final: the text is not tokenized again."""

    problem_id: str
    token_ids: tuple[int, ...]
    text: str  # the rendered prompt, for people
    problem: str
    ground_truth: str
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)  # for rewards


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """P prompts.

    `group_ids` are unique within the run for training, within the call for evaluation.
    """

    batch_id: int
    prompts: tuple[Prompt, ...]
    group_ids: NDArray[np.int64]  # [P]

    def __post_init__(self) -> None:
        assert self.group_ids.shape == (len(self.prompts),)

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True, kw_only=True)
class SamplingParameters:
    """Parameters of sampling.

    `temperature` 0 is greedy; log-probabilities are taken at temperature 1 then.
    """

    samples_per_prompt: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_tokens: int = 0
    max_tokens: int
    stop: tuple[str, ...] = ()
    seed: int = 0  # equal seeds, prompts and weights give equal responses


@dataclass(frozen=True, kw_only=True)
class RolloutBatch:
    """B sampled responses: whole groups only, each contiguous, in the order of `prompts`."""

    prompts: PromptBatch
    sequences: TokenSequences  # the loss mask is True where the policy sampled the token
    rollout_logprobs: NDArray[np.float32]  # [N] 0 outside the mask
    oldest_weight_version: NDArray[np.int32]  # [B]
    newest_weight_version: NDArray[np.int32]  # [B]
    stop_reasons: NDArray[np.int8]  # [B] StopReason
    response_texts: tuple[str, ...]  # [B]
    # At which rollout_logprobs are taken, and every other log-probability must be.
    temperature: float

    def __post_init__(self) -> None:
        responses = len(self.sequences)
        assert self.rollout_logprobs.shape == self.sequences.token_ids.shape
        assert self.stop_reasons.shape == (responses,)
        assert len(self.response_texts) == responses

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def batch_id(self) -> int:
        return self.prompts.batch_id

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """[N] of prompts and responses."""
        return self.sequences.token_ids

    @property
    def sequence_offsets(self) -> NDArray[np.int64]:
        """[B + 1] begin of each sequence in the flat arrays."""
        return self.sequences.offsets

    @property
    def prompt_lengths(self) -> NDArray[np.int32]:
        """[B] tokens of the prompt."""
        return self.sequences.prompt_lengths

    @property
    def response_mask(self) -> NDArray[np.bool_]:
        """[N] True where the policy sampled the token."""
        return self.sequences.loss_mask

    @property
    def group_ids(self) -> NDArray[np.int64]:
        """[B] equal exactly where two responses answer the same prompt."""
        return self.sequences.group_ids

    @property
    def sequence_lengths(self) -> NDArray[np.int64]:
        """[B] tokens of prompt and response."""
        return self.sequences.lengths

    @property
    def response_lengths(self) -> NDArray[np.int64]:
        """[B] sampled tokens."""
        return self.sequences.loss_lengths

    @property
    def num_response_tokens(self) -> int:
        return self.sequences.num_loss_tokens

    @property
    def weight_versions(self) -> NDArray[np.int32]:
        """[N] of the weights that sampled each token; -1 for the tokens of prompts."""
        # A worker installs weights between its groups, so a response is of one version.
        assert np.array_equal(self.oldest_weight_version, self.newest_weight_version)
        versions = np.repeat(self.newest_weight_version, self.sequence_lengths)
        return np.where(self.response_mask, versions, np.int32(-1))

    @staticmethod
    def concatenate(batches: Sequence[RolloutBatch]) -> RolloutBatch:
        """Join the parts of one step, in the order given; they get the batch id of the first.

        In asynchronous training their prompts may come from several batches of the stream.
        """
        assert batches, "nothing to concatenate"
        if len(batches) == 1:
            return batches[0]

        prompts = PromptBatch(
            batch_id=batches[0].batch_id,
            prompts=tuple(prompt for batch in batches for prompt in batch.prompts.prompts),
            group_ids=np.concatenate([batch.prompts.group_ids for batch in batches]),
        )
        return RolloutBatch(
            prompts=prompts,
            sequences=TokenSequences.concatenate([batch.sequences for batch in batches]),
            rollout_logprobs=np.concatenate([batch.rollout_logprobs for batch in batches]),
            oldest_weight_version=np.concatenate(
                [batch.oldest_weight_version for batch in batches]
            ),
            newest_weight_version=np.concatenate(
                [batch.newest_weight_version for batch in batches]
            ),
            stop_reasons=np.concatenate([batch.stop_reasons for batch in batches]),
            response_texts=tuple(text for batch in batches for text in batch.response_texts),
            temperature=batches[0].temperature,
        )


FailureKind = Literal["error", "timeout", "crash"]


@dataclass(frozen=True, kw_only=True)
class RewardFailure:
    """A failure of one reward function on one response."""

    row: int  # the response, in its batch
    function: str
    kind: FailureKind
    message: str  # one line
    traceback: str = ""  # of the first failure of a function in a part; "" for later ones


@dataclass(frozen=True, kw_only=True)
class StepRewards:
    """The rewards that one function gave the steps of B responses; S steps in all.

    The steps of response b are those from `offsets[b]` to `offsets[b + 1]`. A response on which the
    function failed has none. The ends of a response rise; two steps that end in one token have
    equal ends, and the token gets the sum.
    """

    offsets: NDArray[np.int64]  # [B + 1]
    ends: NDArray[np.int32]  # [S] last token of the step, counted from the response's first
    rewards: NDArray[np.float32]  # [S] unweighted

    def __post_init__(self) -> None:
        assert self.ends.shape == self.rewards.shape == (int(self.offsets[-1]),)

    @property
    def rows(self) -> NDArray[np.int64]:
        """[S] the response of each step."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    @staticmethod
    def of(ends: Sequence[Sequence[int]], rewards: Sequence[Sequence[float]]) -> StepRewards:
        """Return the record of B responses from the ends and the rewards of each one's steps."""
        counts = [len(steps) for steps in ends]
        return StepRewards(
            offsets=np.cumsum([0, *counts], dtype=np.int64),
            ends=np.asarray([end for steps in ends for end in steps], dtype=np.int32),
            rewards=np.asarray([reward for steps in rewards for reward in steps], dtype=np.float32),
        )

    @staticmethod
    def concatenate(parts: Sequence[StepRewards]) -> StepRewards:
        """Join the parts of one batch, in the order given."""
        counts = np.concatenate([np.diff(part.offsets) for part in parts])
        return StepRewards(
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            ends=np.concatenate([part.ends for part in parts]),
            rewards=np.concatenate([part.rewards for part in parts]),
        )


@dataclass(frozen=True, kw_only=True)
class RewardBatch:
    """The rewards of the responses of one `RolloutBatch`, in its order.

    A reward function that failed on a response leaves NaN in its component there, and a
    `RewardFailure`. Its term of the sum is 0, or, with `reward.on_failure: drop`, the whole reward
    is NaN: the response is not `scored`. It does not enter the statistics of its group then, and is
    not trained on.
    """

    batch_id: int
    rewards: NDArray[np.float32]  # [B] weighted sum of the components; NaN: not scored
    # [B] value of the first reward function, clipped to 0..1; NaN: it failed, or is a model
    accuracies: NDArray[np.float32]
    components: Mapping[str, NDArray[np.float32]]  # name -> [B], unweighted; NaN: it failed
    reasons: tuple[str, ...]  # [B] why a response got its reward: "ok", "no_answer", "timeout", ...
    extracted_answers: tuple[str, ...]  # [B] "" where there is none
    failures: tuple[RewardFailure, ...] = ()
    has_accuracy: bool = True  # False: the first reward is a model, and no response is right
    # Of the functions that give rewards of steps, by name. They are not in `rewards`.
    step_rewards: Mapping[str, StepRewards] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """[B] True for correct responses: those of an accuracy of at least 0.5.

        The same holds in training, in evaluation and in the report. A response without an accuracy
        (NaN: its reward could not be computed) is not correct.
        """
        return self.accuracies >= 0.5

    @property
    def scored(self) -> NDArray[np.bool_]:
        """[B] True for responses that have a reward."""
        return ~np.isnan(self.rewards)

    @property
    def all_equal(self) -> bool:
        """True if all responses that have a reward have the same one."""
        rewards = self.rewards[self.scored]
        return len(rewards) == 0 or bool(rewards.max() == rewards.min())

    @staticmethod
    def concatenate(batches: Sequence[RewardBatch]) -> RewardBatch:
        """Join the parts of one step, in the order given; see `RolloutBatch.concatenate`."""
        assert batches, "nothing to concatenate"

        # A failure names its row in the part; in the whole batch it moves by the rows before it.
        starts = np.cumsum([0] + [len(batch) for batch in batches]).tolist()
        failures = []
        for batch, start in zip(batches, starts, strict=False):
            failures += [replace(failure, row=failure.row + start) for failure in batch.failures]

        return RewardBatch(
            batch_id=batches[0].batch_id,
            rewards=np.concatenate([batch.rewards for batch in batches]),
            accuracies=np.concatenate([batch.accuracies for batch in batches]),
            components={
                name: np.concatenate([batch.components[name] for batch in batches])
                for name in batches[0].components
            },
            reasons=tuple(reason for batch in batches for reason in batch.reasons),
            extracted_answers=tuple(
                answer for batch in batches for answer in batch.extracted_answers
            ),
            failures=tuple(failures),
            has_accuracy=batches[0].has_accuracy,
            step_rewards={
                name: StepRewards.concatenate([batch.step_rewards[name] for batch in batches])
                for name in batches[0].step_rewards
            },
        )


@dataclass(frozen=True, kw_only=True)
class ScoreBatch:
    """Scores of some responses of a batch under the reward model, as one rank returns them."""

    batch_id: int
    rows: NDArray[np.int64]  # [b] indices into the whole batch
    scores: NDArray[np.float32]  # [b]

    @staticmethod
    def scatter(parts: Sequence[ScoreBatch], responses: int) -> NDArray[np.float32]:
        """Put the scores of all ranks' parts in the order of the whole batch, `[B]`."""
        rows = np.concatenate([part.rows for part in parts])
        assert sorted(rows) == list(range(responses)), "each row must come from exactly one rank"
        whole = np.zeros(responses, dtype=np.float32)
        whole[rows] = np.concatenate([part.scores for part in parts])
        return whole


@dataclass(frozen=True, kw_only=True)
class StepScoreBatch:
    """Scores of the steps of some responses under a process reward model, as one rank returns them.

    A response without steps has none.
    """

    batch_id: int
    rows: NDArray[np.int64]  # [s] the response of each step, an index into the whole batch
    ends: NDArray[np.int64]  # [s] last token of the step, counted from the response's first
    scores: NDArray[np.float32]  # [s]
    # Responses whose tokens decode to another text than the engine's, so that steps have no tokens;
    # every rank lists all of them.
    unplaced: tuple[int, ...] = ()

    @staticmethod
    def gather(parts: Sequence[StepScoreBatch], responses: int) -> list[list[tuple[int, float]]]:
        """Return the ends and scores of all ranks' steps for each response, in their order."""
        steps: list[dict[int, float]] = [{} for _ in range(responses)]
        for part in parts:
            columns = (part.rows.tolist(), part.ends.tolist(), part.scores.tolist())
            for row, end, score in zip(*columns, strict=True):
                assert end not in steps[row], "each step must come from exactly one rank"
                steps[row][end] = score
        return [sorted(found.items()) for found in steps]


@dataclass(frozen=True, kw_only=True)
class LogprobBatch:
    """Log-probabilities of some rows of a batch under one policy, as one rank returns them.

    `logprobs` holds the rows' tokens one after the other (prompt and response, as in
    `RolloutBatch`), 0 outside the mask.
    """

    batch_id: int
    rows: NDArray[np.int64]  # [b] indices into the whole batch
    logprobs: NDArray[np.float32]  # [n]
    # [n] proxy of ||grad log pi||^2; None: no estimator reads them
    squared_score_norms: NDArray[np.float32] | None = None
    # [n] KL to the reference over the vocabulary; None: algorithm.kl.kind is not exact
    exact_kl: NDArray[np.float32] | None = None

    @staticmethod
    def scatter(
        parts: Sequence[LogprobBatch],
        sequence_offsets: NDArray[np.int64],
        array: Literal["logprobs", "squared_score_norms", "exact_kl"] = "logprobs",
    ) -> NDArray[np.float32]:
        """Put one array of all ranks' parts in the order of the whole batch.

        Return `[N]` in the precision of the parts. Every row must come exactly once.
        """
        return _scattered([(part.rows, getattr(part, array)) for part in parts], sequence_offsets)


@dataclass(frozen=True, kw_only=True)
class ValueBatch:
    """Values of some rows of a batch under the critic, as one rank returns them.

    `values` holds the rows' tokens one after the other, as in `LogprobBatch`: the value before each
    sampled token, 0 elsewhere.
    """

    batch_id: int
    rows: NDArray[np.int64]  # [b] indices into the whole batch
    values: NDArray[np.float32]  # [n]

    @staticmethod
    def scatter(
        parts: Sequence[ValueBatch], sequence_offsets: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Put the values of all ranks' parts in the order of the whole batch, `[N]`."""
        return _scattered([(part.rows, part.values) for part in parts], sequence_offsets)


def _scattered(
    parts: Sequence[tuple[NDArray[np.int64], NDArray[np.float32]]],
    sequence_offsets: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Return [N] the values of (rows, values) of all ranks, in the precision of the parts."""
    precision = np.result_type(*(values.dtype for _, values in parts))
    whole = np.zeros(int(sequence_offsets[-1]), dtype=precision)
    seen = np.zeros(len(sequence_offsets) - 1, dtype=np.int64)

    for rows, values in parts:
        start = 0
        for row in rows:
            first = sequence_offsets[row]
            last = sequence_offsets[row + 1]
            whole[first:last] = values[start : start + last - first]
            start += last - first
            seen[row] += 1
        assert start == len(values)

    assert (seen == 1).all(), "each row must come from exactly one rank"
    return whole


@dataclass(frozen=True, kw_only=True)
class ScoredBatch:
    """Responses with their rewards and everything else that an update needs, but no advantages.

    Responses that dynamic sampling did not keep stay in this form, and so does a batch whose
    advantages the policy's ranks estimate before each mini-batch (`advantage.recompute`). Flat
    arrays are aligned with `rollouts.token_ids` and 0 outside the mask.
    """

    rollouts: RolloutBatch
    rewards: RewardBatch
    # [N]; None: one update per batch, at which old and live are the same
    old_logprobs: NDArray[np.float32] | None = None
    ref_logprobs: NDArray[np.float32] | None = None  # [N]; None: no KL term
    values: NDArray[np.float32] | None = (
        None  # [N] of the critic before its update; None: no critic
    )
    kl_coefficient: float = 0.0  # of the KL term in the loss
    trained: NDArray[np.bool_] | None = None  # [B] responses that enter the loss; None: all

    def __post_init__(self) -> None:
        assert len(self.rewards) == len(self.rollouts)
        assert self.trained is None or self.trained.shape == (len(self.rollouts),)

    def __len__(self) -> int:
        return len(self.rollouts)

    @property
    def batch_id(self) -> int:
        return self.rollouts.batch_id

    def credited(
        self,
        advantages: NDArray[np.float32],
        *,
        returns: NDArray[np.float32] | None = None,
        old_logprobs: NDArray[np.float32] | None = None,
    ) -> TrainBatch:
        """Return the batch with its advantages, optionally with other `old` log-probabilities."""
        known = {field.name: getattr(self, field.name) for field in fields(ScoredBatch)}
        if old_logprobs is not None:
            known["old_logprobs"] = old_logprobs
        return TrainBatch(**known, advantages=advantages, returns=returns)


@dataclass(frozen=True, kw_only=True)
class TrainBatch(ScoredBatch):
    """Everything that an update needs."""

    advantages: NDArray[np.float32]  # [N]
    returns: NDArray[np.float32] | None = None  # [N] critic targets

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.advantages.shape == self.rollouts.token_ids.shape
