"""A response that ends at once, with the end token alone and no text, is an ordinary one."""

import numpy as np
import pytest
import torch

from rlsys.algorithms.advantages import (
    AdvantageInputs,
    available_advantage_estimators,
    get_advantage_estimator,
)
from rlsys.data.batches import Prompt, PromptBatch, SamplingParameters, StopReason
from rlsys.math_verifier import verify_math
from workers.generation.engines.engine import SampledGroup, SampledResponse
from workers.generation.worker import build_rollouts


def test_the_verifier_finds_no_answer():
    verdict = verify_math("", "4")
    assert verdict.score == 0
    assert verdict.reason == "no_answer"


def test_its_one_token_counts_in_the_batch():
    prompt = Prompt(problem_id="1", token_ids=(5, 6), text="p", problem="p", ground_truth="4")
    prompts = PromptBatch(batch_id=0, prompts=(prompt,), group_ids=np.zeros(1, dtype=np.int64))
    responses = (
        SampledResponse(token_ids=(2,), logprobs=(-1.5,), text="", stop_reason=StopReason.END),
        SampledResponse(token_ids=(7, 2), logprobs=(-1, -2), text="4", stop_reason=StopReason.END),
    )
    sampling = SamplingParameters(samples_per_prompt=2, temperature=1.0, max_tokens=4)
    batch = build_rollouts(prompts, [SampledGroup(index=0, responses=responses)], sampling, 0)
    assert batch.response_lengths.tolist() == [1, 2]
    assert batch.response_mask.tolist() == [False, False, True, False, False, True, True]
    assert batch.rollout_logprobs[2] == -1.5


@pytest.mark.parametrize("name", available_advantage_estimators())
def test_estimators_give_its_token_an_advantage(name: str):
    mask = torch.tensor([[True, False, False], [True, True, True], [True, True, False]])
    logprobs = torch.where(mask, -1.0, 0.0)
    inputs = AdvantageInputs(
        rewards=torch.tensor([0.0, 1.0, 0.0]),
        response_mask=mask,
        group_ids=torch.zeros(3, dtype=torch.int64),
        rollout_logprobs=logprobs,
        old_logprobs=logprobs,
        ref_logprobs=logprobs,
        squared_score_norms=mask.float(),
        greedy_rewards=torch.zeros(3),
        reward_components=torch.tensor([[0.0], [1.0], [0.0]]),
        problem_ids=["a"] * 3,
        values=torch.zeros(3, 3),
    )
    advantages = get_advantage_estimator(name)(inputs).advantages
    assert torch.isfinite(advantages).all()
    assert (advantages[~mask] == 0).all()
