"""Small rollout batches for tests."""

from dataclasses import replace

import numpy as np

from rlsys.data.batches import Prompt, PromptBatch, RewardBatch, RolloutBatch, TrainBatch
from rlsys.data.sequences import TokenSequences


def rollouts(
    groups: list[tuple[list[int], list[list[int]]]],
    *,
    holes: dict[int, list[int]] | None = None,
    batch_id: int = 0,
    first_group: int = 0,
) -> RolloutBatch:
    """Return a batch from (prompt tokens, responses' tokens) of each group.

    `holes[row]` are response positions that the policy did not sample.
    """
    prompts = tuple(
        Prompt(
            problem_id=f"p{i}",
            token_ids=tuple(prompt),
            text=f"prompt {i}",
            problem=f"problem {i}",
            ground_truth=str(i),
            metadata={"of": i},
        )
        for i, (prompt, _) in enumerate(groups)
    )

    ids = np.arange(first_group, first_group + len(groups), dtype=np.int64)
    rows = [
        (prompt, response, group)
        for (prompt, responses), group in zip(groups, ids, strict=True)
        for response in responses
    ]
    sequences = TokenSequences.of(
        [prompt for prompt, _, _ in rows],
        [response for _, response, _ in rows],
        group_ids=[group for _, _, group in rows],
    )

    sampled = sequences.loss_mask.copy()
    for row, columns in (holes or {}).items():
        start = sequences.offsets[row] + sequences.prompt_lengths[row]
        sampled[start + np.asarray(columns)] = False
    noise = -np.random.default_rng(0).random(len(sampled))

    return RolloutBatch(
        prompts=PromptBatch(batch_id=batch_id, prompts=prompts, group_ids=ids),
        sequences=replace(sequences, loss_mask=sampled),
        rollout_logprobs=np.where(sampled, noise, 0.0).astype(np.float32),
        oldest_weight_version=np.zeros(len(rows), dtype=np.int32),
        newest_weight_version=np.zeros(len(rows), dtype=np.int32),
        stop_reasons=np.zeros(len(rows), dtype=np.int8),
        response_texts=tuple(f"response {i}" for i in range(len(rows))),
        temperature=1.0,
    )


def random_rollouts(
    seed: int, *, groups: int = 4, samples: int = 3, vocabulary: int = 300
) -> RolloutBatch:
    """Return groups with prompts of 3 to 12 tokens and responses of 1 to 9."""
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> list[int]:
        return rng.integers(5, vocabulary, int(rng.integers(low, high + 1))).tolist()

    return rollouts(
        [(tokens(3, 12), [tokens(1, 9) for _ in range(samples)]) for _ in range(groups)]
    )


def rewards_of(batch: RolloutBatch, seed: int = 0) -> RewardBatch:
    """Return rewards of 0 or 1."""
    values = np.random.default_rng(seed).integers(0, 2, len(batch)).astype(np.float32)
    return RewardBatch(
        batch_id=batch.batch_id,
        rewards=values,
        accuracies=values,
        components={"math": values},
        reasons=tuple("correct" if value else "wrong" for value in values),
        extracted_answers=("",) * len(batch),
    )


def train_batch(batch: RolloutBatch, seed: int = 0) -> TrainBatch:
    """Return a train batch with random advantages for each token."""
    noise = np.random.default_rng(seed).normal(size=len(batch.token_ids))
    return TrainBatch(
        rollouts=batch,
        rewards=rewards_of(batch),
        advantages=np.where(batch.response_mask, noise, 0.0).astype(np.float32),
    )
