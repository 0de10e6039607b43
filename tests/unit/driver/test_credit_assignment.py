"""From rewards to a train batch: penalties, costs of tokens, adaptive numbers, and what a checkpoint keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.config import (
    AdvantageConfig,
    AlgorithmConfig,
    EntropyConfig,
    GenerationConfig,
    KLConfig,
    OverlongConfig,
    PolicyConfig,
    RunConfig,
)
from rlsys.data.batches import LogprobBatch, RewardBatch, RolloutBatch
from rlsys.data.rollout_files import read_rollouts, write_rollouts
from rlsys.driver.credit_assignment import CreditAssigner, LiveLogprobs, recomputed, required_inputs
from rlsys.driver.metrics import values
from tests.rollout_examples import rollouts


def make_config(
    estimator: str = "reinforce",
    *,
    mini_batches: int = 1,
    parameters: dict | None = None,
    recompute: bool = False,
    **algorithm: Any,
) -> RunConfig:
    return RunConfig(
        generation=GenerationConfig(max_tokens=4, min_tokens=0),
        policy=PolicyConfig(mini_batches=mini_batches),
        algorithm=AlgorithmConfig(
            advantage=AdvantageConfig(
                name=estimator, parameters=parameters or {}, recompute=recompute
            ),
            **algorithm,
        ),
    )


def batch() -> RolloutBatch:
    """Two groups of two: responses of 2, 4, 1 and 3 tokens."""
    return rollouts([([9], [[1, 2], [1, 2, 3, 4]]), ([8, 8], [[5], [5, 6, 7]])])


def rewards(values: list[float]) -> RewardBatch:
    array = np.asarray(values, dtype=np.float32)
    count = len(values)
    return RewardBatch(
        batch_id=0,
        rewards=array,
        accuracies=array,
        components={"math": array},
        reasons=("ok",) * count,
        extracted_answers=("",) * count,
    )


def logprobs(made: RolloutBatch, value: float, *, norm: float | None = None) -> list[LogprobBatch]:
    """The same log-probability at every sampled token, from one rank."""
    flat = np.where(made.response_mask, value, 0.0).astype(np.float32)
    norms = None if norm is None else np.where(made.response_mask, norm, 0.0).astype(np.float32)
    return [LogprobBatch(batch_id=0, rows=np.arange(len(made)), logprobs=flat, score_norms=norms)]


def advantages_of(made: RolloutBatch, flat: np.ndarray | None) -> list[list[float]]:
    assert flat is not None
    ends, starts = made.sequence_offsets[1:], made.sequence_offsets[:-1] + made.prompt_lengths
    return [flat[start:end].tolist() for start, end in zip(starts, ends, strict=True)]


def test_required_inputs():
    assert required_inputs(make_config()) == frozenset()
    assert required_inputs(make_config(mini_batches=2)) == {"old_logprobs"}
    assert required_inputs(make_config("opo", kl=KLConfig(coefficient=0.1))) == {"ref_logprobs"}
    assert required_inputs(make_config(kl=KLConfig(coefficient=0.1, target=1.0))) == {
        "ref_logprobs",
        "old_logprobs",
    }
    assert required_inputs(make_config("optimal_baseline")) == {"score_norms", "old_logprobs"}
    assert required_inputs(make_config("remax")) == {"greedy_rewards"}
    assert (
        required_inputs(make_config("hierarchical", recompute=True, mini_batches=4)) == frozenset()
    )  # the ranks ask themselves


def test_the_kl_in_the_reward_is_paid_by_the_tokens_up_to_it():
    """K = 0.5 a token, beta 0.1: a token pays 0.05 for itself and for each that follows; the loss has no KL term of its own then."""
    made = batch()
    assigner = CreditAssigner(
        make_config(kl=KLConfig(coefficient=0.1, placement="reward", kind="k1"))
    )
    train, metrics = assigner.assign(
        made, rewards([1, 0, 1, 0]), logprobs(made, -1.0), logprobs(made, -1.5)
    )
    expected = [[0.9, 0.95], [-0.2, -0.15, -0.1, -0.05], [0.95], [-0.15, -0.1, -0.05]]
    for found, wanted in zip(advantages_of(made, train.advantages), expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-6)
    assert train.kl_coefficient == 0.0
    assert values(metrics)["kl/coefficient"] == 0.1


def test_entropy_in_the_reward():
    made = batch()
    assigner = CreditAssigner(make_config(entropy=EntropyConfig(temperature=0.1)))
    train, _ = assigner.assign(made, rewards([0, 0, 0, 0]), logprobs(made, -2.0), [])
    assert advantages_of(made, train.advantages)[1] == pytest.approx([0.8, 0.6, 0.4, 0.2], abs=1e-6)


def test_the_kl_in_the_loss_leaves_the_advantages_alone():
    made = batch()
    assigner = CreditAssigner(make_config(kl=KLConfig(coefficient=0.1)))
    train, _ = assigner.assign(made, rewards([1, 0, 1, 0]), [], logprobs(made, -1.5))
    assert train.kl_coefficient == 0.1
    assert advantages_of(made, train.advantages)[0] == [1.0, 1.0]


def test_the_kl_in_the_advantage_reaches_the_estimator():
    """r_j = r - (beta / H) sum K with H 4, K = 1 and beta 1: lengths 2 and 4 pay (2/4, 1/4) and (4/4, 3/4, 2/4, 1/4)."""
    made = batch()
    assigner = CreditAssigner(
        make_config("token_kl_grpo", kl=KLConfig(coefficient=1.0, placement="advantage"))
    )
    train, _ = assigner.assign(
        made, rewards([1, 1, 1, 1]), logprobs(made, -1.0), logprobs(made, -2.0)
    )
    first, second = advantages_of(made, train.advantages)[:2]
    assert first == pytest.approx([1.0, 1.0], abs=1e-4)
    assert second == pytest.approx([-1.0, -1.0, 0.0, 0.0], abs=1e-4)  # alone at the last two


def test_what_each_mini_batch_estimates_for_itself_is_not_estimated_before(tmp_path: Path):
    """Group rewards (1, 0): advantages 1/2 under the mean of the group, 1 under that of the other."""
    made, config = batch(), make_config("rloo", recompute=True)
    train, metrics = CreditAssigner(config).assign(made, rewards([1, 0, 1, 0]), [], [])
    assert train.advantages is None
    assert "advantage/mean_abs" not in metrics
    write_rollouts(train, tmp_path / "step.parquet")
    assert [row["advantages"] for row in read_rollouts(tmp_path / "step.parquet")] == [None] * 4

    zeros = np.zeros(len(made.token_ids), dtype=np.float32)
    later = recomputed(
        config, train, np.array([0, 1]), LiveLogprobs(logprobs=zeros - 1, score_norms=zeros), {}
    )
    assert later.batch.advantages is not None
    assert advantages_of(made, later.batch.advantages) == [[1, 1], [-1, -1, -1, -1], [0], [0, 0, 0]]
    assert values(later.metrics)["advantage/mean_abs"] == 1.0
    assert later.batch.old_logprobs is not None
    assert (later.batch.old_logprobs == -1).all()


def test_truncated_responses_can_be_left_out_of_the_loss():
    made = batch()
    object.__setattr__(made, "stop_reasons", np.array([0, 1, 0, 0], dtype=np.int8))
    train, _ = CreditAssigner(make_config(overlong=OverlongConfig(mask_truncated=True))).assign(
        made, rewards([1, 1, 1, 1]), [], []
    )
    assert train.trained is not None
    assert train.trained.tolist() == [True, False, True, True]
    assert (
        CreditAssigner(make_config()).assign(made, rewards([1, 1, 1, 1]), [], [])[0].trained is None
    )


def test_greedy_rewards_reach_the_responses_of_their_prompt():
    made = batch()
    greedy = rewards([0.25, 0.75])
    train, _ = CreditAssigner(make_config("remax")).assign(
        made, rewards([1, 0, 1, 0]), [], [], greedy
    )
    assert [row[0] for row in advantages_of(made, train.advantages)] == [0.75, -0.25, 0.25, -0.75]


def test_score_norms_come_with_the_old_logprobs():
    """Lengths 2 and 4 with equal norms weigh 1 to 2: b = 1/3 for rewards 1 and 0."""
    made = batch()
    train, _ = CreditAssigner(make_config("optimal_baseline")).assign(
        made, rewards([1, 0, 0, 0]), logprobs(made, -1.0, norm=0.5), []
    )
    assert [row[0] for row in advantages_of(made, train.advantages)] == pytest.approx(
        [2 / 3, -1 / 3, 0.0, 0.0]
    )


def test_adaptive_numbers_move_and_survive_a_checkpoint():
    """KL of k3 at d = 0.5: e^-0.5 - 0.5 = 0.107, above its target; entropy 1, below its own: both numbers rise, and the next batch is made with them."""
    config = make_config(
        "reinforce_baseline",
        parameters={"baseline": "moving_average"},
        kl=KLConfig(coefficient=0.1, target=0.05, horizon=10),
        entropy=EntropyConfig(temperature=0.2, target=2.0, learning_rate=0.1),
    )
    made, scores = batch(), rewards([1, 0, 1, 0])
    first = CreditAssigner(config)
    train, metrics = first.assign(made, scores, logprobs(made, -1.0), logprobs(made, -1.5))
    assert train.kl_coefficient == 0.1
    assert values(metrics)["entropy/temperature"] == 0.2
    second = CreditAssigner(config)
    second.load_state(json.loads(json.dumps(first.state())))
    for assigner in (first, second):
        train, metrics = assigner.assign(made, scores, logprobs(made, -1.0), logprobs(made, -1.5))
        assert train.kl_coefficient == pytest.approx(0.1 * 1.02)
        assert values(metrics)["entropy/temperature"] == pytest.approx(0.2 * np.exp(0.1))
        assert values(metrics)["advantage/baseline"] == pytest.approx(
            1.0
        )  # of the batch before: 0.5, and 0.2 for each of 2.5 tokens


def test_a_batch_without_sampled_tokens_leaves_the_kl_coefficient_alone():
    made = rollouts([([9], [[1], [2]])], holes={0: [0], 1: [0]})
    assigner = CreditAssigner(make_config(kl=KLConfig(coefficient=0.1, target=0.05)))
    assigner.assign(made, rewards([1, 0]), logprobs(made, -1.0), logprobs(made, -1.5))
    assert assigner.state()["kl_coefficient"] == 0.1


def test_the_start_of_the_sweeps_survives_a_checkpoint():
    parameters = {"solver": "gauss_seidel", "scope": "batch", "ridge": 1.0, "diagnostics": False}
    config = make_config("hierarchical", parameters=parameters)
    made, scores = (
        rollouts([([9], [[1, 2], [1, 2, 3, 4], [5]]), ([8, 8], [[5], [5, 6, 7], [6]])]),
        rewards([1, 0, 1, 0, 1, 0]),
    )
    first = CreditAssigner(config)
    first.assign(made, scores, logprobs(made, -1.0), [])
    second = CreditAssigner(config)
    second.load_state(json.loads(json.dumps(first.state())))
    assert np.any(np.array(first.state()["estimator"]["pooled"]))
    for assigner in (first, second):
        assigner.assign(made, scores, logprobs(made, -1.3), [])
    assert first.state() == second.state()


def test_fixed_numbers_follow_the_configuration_after_a_resume():
    assigner = CreditAssigner(make_config(kl=KLConfig(coefficient=0.3)))
    assigner.load_state({"kl_coefficient": 0.1, "entropy_temperature": 0.0, "estimator": {}})
    assert assigner.state()["kl_coefficient"] == 0.3


def test_advantages_that_are_not_finite_are_refused():
    made = batch()
    with pytest.raises(
        ValueError,
        match=r"algorithm\.advantage\.name: 'reinforce' gave advantages that are not finite",
    ):
        CreditAssigner(make_config()).assign(made, rewards([1, float("inf"), 0, 0]), [], [])
