"""The choice of the responses that expert iteration learns, as tokens, with its metrics.

    sampled --correct--> --with an end, if wanted--> --the first of its copies--> kept

A kept response enters the loss exactly as it was sampled: its token ids, not its text.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlsys.config.expert_iteration import ExpertConfig
from rlsys.data.batches import RewardBatch, RolloutBatch, ScoredBatch, StopReason
from rlsys.data.example_stream import ExampleBatch
from rlsys.data.sequences import TokenSequences
from rlsys.driver.batch_metrics import batch_metrics
from rlsys.metrics import Metric, mean, total


class Chosen(NamedTuple):
    """The responses of a step, and those of them that are learned."""

    batch: ExampleBatch  # the kept responses; may be empty
    sampled: ScoredBatch  # all of them; `trained` is True where one was kept
    metrics: dict[str, Metric]


def choose_responses(
    rollouts: RolloutBatch, rewards: RewardBatch, settings: ExpertConfig
) -> Chosen:
    """Return the correct responses of a step, each once unless `deduplicate` is false.

    Correct is `RewardBatch.correct`; a response that could not be scored is not. Copies have the
    same prompt and the same response, token by token; the first one is kept.
    """
    wanted = rewards.correct & (rollouts.response_lengths > 0)
    if not settings.keep_truncated:
        wanted &= rollouts.stop_reasons != StopReason.LENGTH
    copies = copies_of_earlier(rollouts.sequences, wanted)
    kept = wanted & ~copies if settings.deduplicate else wanted

    rows = np.flatnonzero(kept)
    batch = ExampleBatch(
        batch_id=rollouts.batch_id,
        sequences=rollouts.sequences.take(rows),
        ranks=np.zeros(len(rows), dtype=np.int64),
    )
    sampled = ScoredBatch(rollouts=rollouts, rewards=rewards, trained=kept)
    metrics = batch_metrics(sampled) | _own_metrics(rollouts, kept, copies)
    return Chosen(batch, sampled, metrics)


def copies_of_earlier(sequences: TokenSequences, wanted: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return [B] True at each wanted sequence whose tokens are those of an earlier wanted one."""
    copies = np.zeros(len(sequences), dtype=np.bool_)
    seen: set[tuple[int, bytes]] = set()
    for row in np.flatnonzero(wanted):
        start, end = sequences.offsets[row : row + 2]
        # With the length of the prompt, since equal tokens may be divided at another place.
        key = (int(sequences.prompt_lengths[row]), sequences.token_ids[start:end].tobytes())
        copies[row] = key in seen
        seen.add(key)
    return copies


def _own_metrics(
    rollouts: RolloutBatch, kept: NDArray[np.bool_], copies: NDArray[np.bool_]
) -> dict[str, Metric]:
    groups = rollouts.prompts.group_ids
    solved = np.isin(groups, rollouts.group_ids[kept])
    tokens = rollouts.num_response_tokens
    surprise = -rollouts.rollout_logprobs[rollouts.response_mask].astype(np.float64)
    return {
        "expert/kept_fraction": mean(float(kept.mean()), len(kept)),
        "expert/solved_fraction": mean(float(solved.mean()), len(groups)),
        "expert/duplicates": total(int(copies.sum())),
        "rollout/entropy": mean(float(surprise.mean()) if tokens else 0.0, tokens),
    }
