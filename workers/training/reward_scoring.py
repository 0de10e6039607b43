"""Frozen reward models that score the responses of RL training, exactly as sampled.

A reward model: the score of a response is the value of the head after its end token, minus the mean
reward that the model's config.json holds. A response without an end token gets one
(`with_end_tokens`).

A process reward model: the score of a step is the sigmoid of the value after the token with the
step's last character that is not white space, where `ExampleEncoder.steps` puts its label.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlsys.config import RunConfig
from rlsys.data.batches import RolloutBatch, ScoreBatch, StepScoreBatch
from rlsys.data.response_ends import marked_after_last, with_end_tokens
from rlsys.data.response_text import lengths_after_tokens
from rlsys.models.loading import UnsupportedModelError, end_token_ids, load_tokenizer
from rlsys.models.value_models import ValueLayout
from rlsys.rewards.learned import PATH_FIELD, reward_model_role, scored_steps, scores_steps
from rlsys.rewards.steps import Step, tokens_at
from workers.training.backends import build_backend
from workers.training.backends.backend import ModelBackend
from workers.training.model_setup import prepare, value_model
from workers.training.offline import REWARD_MEAN
from workers.training.rank_worker import RankWorker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _FrozenRewardModelWorker(RankWorker):
    """One rank of a frozen model with a scalar head."""

    role = "reward_model"
    layout: ValueLayout

    def build(self, device: torch.device) -> tuple[ModelBackend[Any], str | None]:
        """See `RankWorker`.

        Raises:
            UnsupportedModelError: the model can give no right scores.
        """
        kind = value_model(self.layout)
        try:
            module, verdict = prepare(
                kind, self.config, self.settings, self.model_directory, device
            )
        except UnsupportedModelError as error:
            reason = str(error).removeprefix("model.path: ")
            raise UnsupportedModelError(f"{PATH_FIELD}: {reason}") from error
        backend = build_backend(module, self.settings, device, self.model_directory)
        return backend, verdict.reason


class ScoringWorker(_FrozenRewardModelWorker):
    """One rank of the reward model."""

    layout = "sequence"

    def __init__(self, config: RunConfig, model_directory: str, rank: int, world_size: int) -> None:
        # A truncated response gets an end token, so the longest one is longer by a token.
        longest = config.generation.max_tokens + 1
        generation = config.generation.model_copy(update={"max_tokens": longest})
        own = config.model_copy(update={"generation": generation})
        super().__init__(own, reward_model_role(config), model_directory, rank, world_size)

        tokenizer = load_tokenizer(
            model_directory, trust_remote_code=config.model.trust_remote_code
        )
        ends = end_token_ids(model_directory, tokenizer)
        # The policy's engine may end a response with another special token than this model's own.
        self.end_tokens = ends | frozenset(tokenizer.all_special_ids)
        own_end = tokenizer.eos_token_id
        self.end = own_end if isinstance(own_end, int) else min(ends)

        facts = json.loads((self.model_directory / "config.json").read_text())
        self.reward_mean = float(facts.get(REWARD_MEAN) or 0.0)

    @torch.no_grad()
    def scores(self, rollouts: RolloutBatch) -> ScoreBatch:
        """Return the scores of this rank's responses; collective."""
        ended = with_end_tokens(rollouts.sequences, self.end_tokens, self.end)
        rows = [np.zeros(0, dtype=np.int64)]
        scores = [np.zeros(0, dtype=np.float32)]
        for pack in self.packs_of_sequences(marked_after_last(ended), np.arange(len(rollouts))):
            values = self.run(pack, 1.0).values
            # A padding pack repeats rows that another pack already has.
            if pack.is_padding:
                continue
            rows.append(pack.rows[pack.response_index])
            scores.append(values.cpu().numpy() - np.float32(self.reward_mean))

        return ScoreBatch(
            batch_id=rollouts.batch_id, rows=np.concatenate(rows), scores=np.concatenate(scores)
        )


class StepScoringWorker(_FrozenRewardModelWorker):
    """One rank of the process reward model."""

    layout = "token"

    def __init__(self, config: RunConfig, model_directory: str, rank: int, world_size: int) -> None:
        super().__init__(config, reward_model_role(config), model_directory, rank, world_size)
        self.tokenizer = load_tokenizer(
            model_directory, trust_remote_code=config.model.trust_remote_code
        )

    @torch.no_grad()
    def scores(self, rollouts: RolloutBatch) -> StepScoreBatch:
        """Return the scores of the steps of this rank's responses; collective."""
        placed = step_end_tokens(
            rollouts, self.tokenizer, lambda text: scored_steps(self.config, text)
        )
        sequences = rollouts.sequences
        starts = sequences.offsets[:-1] + sequences.prompt_lengths
        marks = np.zeros(len(sequences.token_ids), dtype=np.bool_)
        for start, ends in zip(starts, placed, strict=True):
            marks[start + np.asarray(ends or (), dtype=np.int64)] = True

        rows = [np.zeros(0, dtype=np.int64)]
        ends_of_steps = [np.zeros(0, dtype=np.int64)]
        scores = [np.zeros(0, dtype=np.float32)]
        # Every rank finds the same responses without steps, and no pack can be empty.
        with_steps = np.asarray([row for row, ends in enumerate(placed) if ends], dtype=np.int64)
        marked = sequences.marked_after(marks)
        for pack in self.packs_of_sequences(marked, with_steps) if len(with_steps) else ():
            values = self.run(pack, 1.0).values
            # A padding pack repeats rows that another pack already has.
            if pack.is_padding:
                continue
            rows.append(pack.rows[pack.response_index])
            # `marked_after` has moved the marks by a token.
            ends_of_steps.append(pack.response_positions - 1)
            scores.append(torch.sigmoid(values).cpu().numpy())

        return StepScoreBatch(
            batch_id=rollouts.batch_id,
            rows=np.concatenate(rows),
            ends=np.concatenate(ends_of_steps),
            scores=np.concatenate(scores),
            unplaced=tuple(row for row, ends in enumerate(placed) if ends is None),
        )


def scoring_worker(config: RunConfig) -> type[ScoringWorker] | type[StepScoringWorker]:
    """Return the kind of ranks that the model among the rewards has."""
    return StepScoringWorker if scores_steps(config) else ScoringWorker


def step_end_tokens(
    rollouts: RolloutBatch,
    tokenizer: PreTrainedTokenizerBase,
    split: Callable[[str], Sequence[Step]],
) -> list[list[int] | None]:
    """Return the tokens at which the steps of each response end, counted from its first token.

    Conventions: steps that end in one token are one, as in training. A response whose tokens do not
    decode to its text has None.
    """
    placed: list[list[int] | None] = []
    for row, completion in enumerate(rollouts.response_texts):
        lengths = lengths_after_tokens(rollouts, row, tokenizer)
        if lengths is None:
            placed.append(None)
            continue
        tokens = tokens_at([step.end for step in split(completion)], lengths)
        placed.append(list(dict.fromkeys(tokens)))
    return placed
