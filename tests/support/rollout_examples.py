"""Small rollout batches for tests."""

import numpy as np

from rlsys.data.batches import Prompt, PromptBatch, RewardBatch, RolloutBatch, TrainBatch


def rollouts(
    groups: list[tuple[list[int], list[list[int]]]],
    *,
    holes: dict[int, list[int]] | None = None,
    batch_id: int = 0,
    first_group: int = 0,
) -> RolloutBatch:
    """A batch from (prompt tokens, responses' tokens) of each group. `holes[row]` are response positions that the policy did not sample."""
    prompts = tuple(
        Prompt(
            problem_id=f"p{i}",
            token_ids=tuple(prompt),
            text=f"prompt {i}",
            problem=f"problem {i}",
            ground_truth=str(i),
        )
        for i, (prompt, _) in enumerate(groups)
    )
    ids = np.arange(first_group, first_group + len(groups), dtype=np.int64)
    rows = [
        (prompt, response, group)
        for (prompt, responses), group in zip(groups, ids, strict=True)
        for response in responses
    ]
    mask = []
    for row, (prompt, response, _) in enumerate(rows):
        sampled = np.ones(len(response), dtype=np.bool_)
        sampled[(holes or {}).get(row, [])] = False
        mask.append(np.concatenate([np.zeros(len(prompt), dtype=np.bool_), sampled]))
    tokens = np.concatenate(
        [np.asarray(prompt + response, dtype=np.int32) for prompt, response, _ in rows]
    )
    response_mask = np.concatenate(mask)
    rng = np.random.default_rng(0)
    return RolloutBatch(
        prompts=PromptBatch(batch_id=batch_id, prompts=prompts, group_ids=ids),
        token_ids=tokens,
        sequence_offsets=np.cumsum([0] + [len(p) + len(r) for p, r, _ in rows]).astype(np.int64),
        prompt_lengths=np.asarray([len(p) for p, _, _ in rows], dtype=np.int32),
        response_mask=response_mask,
        rollout_logprobs=np.where(response_mask, -rng.random(len(tokens)), 0.0).astype(np.float32),
        group_ids=np.asarray([g for _, _, g in rows], dtype=np.int64),
        oldest_weight_version=np.zeros(len(rows), dtype=np.int32),
        newest_weight_version=np.zeros(len(rows), dtype=np.int32),
        stop_reasons=np.zeros(len(rows), dtype=np.int8),
        response_texts=tuple(f"response {i}" for i in range(len(rows))),
        temperature=1.0,
    )


def random_rollouts(
    seed: int, *, groups: int = 4, samples: int = 3, vocabulary: int = 300
) -> RolloutBatch:
    """Groups with prompts of 3 to 12 tokens and responses of 1 to 9."""
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> list[int]:
        return rng.integers(5, vocabulary, int(rng.integers(low, high + 1))).tolist()

    return rollouts(
        [(tokens(3, 12), [tokens(1, 9) for _ in range(samples)]) for _ in range(groups)]
    )


def rewards_of(batch: RolloutBatch, seed: int = 0) -> RewardBatch:
    """Rewards of 0 or 1."""
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
    """A train batch with random advantages for each token."""
    noise = np.random.default_rng(seed).normal(size=len(batch.token_ids))
    return TrainBatch(
        rollouts=batch,
        rewards=rewards_of(batch),
        advantages=np.where(batch.response_mask, noise, 0.0).astype(np.float32),
    )
