"""A frozen reward model that scores the responses of RL training.

The score of a response is the value of the head after its end token, minus the mean reward that
the model's config.json holds. It is computed on prompt and response exactly as sampled; a response
without an end token gets one (`with_end_tokens`).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlsys.config import RunConfig
from rlsys.data.batches import RolloutBatch, ScoreBatch
from rlsys.data.response_ends import marked_after_last, with_end_tokens
from rlsys.models.loading import UnsupportedModelError, end_token_ids, load_tokenizer
from rlsys.rewards.learned import PATH_FIELD, reward_model_role
from workers.training.backends import build_backend
from workers.training.backends.backend import ModelBackend
from workers.training.model_setup import prepare, value_model
from workers.training.offline import REWARD_MEAN
from workers.training.rank_worker import RankWorker


class ScoringWorker(RankWorker):
    """One rank of the reward model."""

    role = "reward_model"

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

    def build(self, device: torch.device) -> tuple[ModelBackend[Any], str | None]:
        """See `RankWorker`.

        Raises:
            UnsupportedModelError: the model can give no right scores.
        """
        kind = value_model("sequence")
        try:
            module, verdict = prepare(
                kind, self.config, self.settings, self.model_directory, device
            )
        except UnsupportedModelError as error:
            reason = str(error).removeprefix("model.path: ")
            raise UnsupportedModelError(f"{PATH_FIELD}: {reason}") from error
        backend = build_backend(module, self.settings, device, self.model_directory)
        return backend, verdict.reason

    @torch.no_grad()
    def scores(self, rollouts: RolloutBatch) -> ScoreBatch:
        """Return the scores of this rank's responses; collective."""
        ended = with_end_tokens(rollouts.sequences, self.end_tokens, self.end)
        rows: list[NDArray[np.int64]] = []
        scores: list[NDArray[np.float32]] = []
        for pack in self.packs_of_sequences(marked_after_last(ended), np.arange(len(rollouts))):
            values = self.run(pack, 1.0).values
            # A padding pack repeats rows that another pack already has.
            if pack.is_padding:
                continue
            rows.append(pack.rows[pack.response_index])
            scores.append(values.cpu().numpy() - np.float32(self.reward_mean))

        nothing = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.float32)]
        return ScoreBatch(
            batch_id=rollouts.batch_id,
            rows=np.concatenate(rows or nothing[0]),
            scores=np.concatenate(scores or nothing[1]),
        )
