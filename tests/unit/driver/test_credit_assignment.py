"""Credit assignment: costs per token, masks, adaptive coefficients, and the saved state."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.config import (
    AdvantageConfig,
    AlgorithmConfig,
    DynamicSamplingConfig,
    EntropyConfig,
    GenerationConfig,
    KLConfig,
    ObjectiveConfig,
    OverlongConfig,
    PolicyConfig,
    RewardFunctionConfig,
    RunConfig,
)
from rlsys.data.batches import (
    LogprobBatch,
    RewardBatch,
    RolloutBatch,
    ScoredBatch,
    TrainBatch,
)
from rlsys.data.rollout_files import read_rollouts, write_rollouts
from rlsys.driver.credit_assignment import CreditAssigner, LiveLogprobs, recomputed
from rlsys.driver.dynamic_sampling import keeps_group
from rlsys.metrics import values
from rlsys.run.required_inputs import required_inputs
from tests.support.rollout_examples import rollouts


def make_config(
    estimator: str = "reinforce",
    *,
    num_mini_batches: int = 1,
    parameters: dict | None = None,
    recompute: bool = False,
    **algorithm: Any,
) -> RunConfig:
    if recompute:
        algorithm["objective"] = ObjectiveConfig(weight="none")
    return RunConfig(
        generation=GenerationConfig(max_tokens=4, min_tokens=0),
        policy=PolicyConfig(num_mini_batches=num_mini_batches),
        algorithm=AlgorithmConfig(
            advantage=AdvantageConfig(
                name=estimator, parameters=parameters or {}, recompute=recompute
            ),
            **algorithm,
        ),
    )


def batch() -> RolloutBatch:
    """Return two groups of two: responses of 2, 4, 1 and 3 tokens."""
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
    """Return the same log-probability for every sampled token, from one rank."""
    flat = np.where(made.response_mask, value, 0.0).astype(np.float32)
    norms = None if norm is None else np.where(made.response_mask, norm, 0.0).astype(np.float32)
    return [
        LogprobBatch(
            batch_id=0, rows=np.arange(len(made)), logprobs=flat, squared_score_norms=norms
        )
    ]


def advantages_of(made: RolloutBatch, batch: ScoredBatch) -> list[list[float]]:
    assert isinstance(batch, TrainBatch)
    flat = batch.advantages
    ends, starts = made.sequence_offsets[1:], made.sequence_offsets[:-1] + made.prompt_lengths
    return [flat[start:end].tolist() for start, end in zip(starts, ends, strict=True)]


def test_required_inputs():
    assert required_inputs(make_config()) == frozenset()
    assert required_inputs(make_config(num_mini_batches=2)) == {"old_logprobs"}
    assert required_inputs(make_config("opo", kl=KLConfig(coefficient=0.1))) == {"ref_logprobs"}
    assert required_inputs(make_config(kl=KLConfig(coefficient=0.1, target=1.0))) == {
        "ref_logprobs",
        "old_logprobs",
    }
    assert required_inputs(make_config("optimal_baseline")) == {
        "squared_score_norms",
        "old_logprobs",
    }
    assert required_inputs(make_config("remax")) == {"greedy_rewards"}
    # With `recompute` the ranks compute the inputs themselves.
    recomputing = make_config("hierarchical", recompute=True, num_mini_batches=4)
    assert required_inputs(recomputing) == frozenset()


def test_the_kl_in_the_reward_is_charged_to_the_tokens_up_to_it():
    """With K = 0.5 per token and beta 0.1, a token costs 0.05 for itself and each later one.

    The loss has no KL term of its own then.
    """
    made = batch()
    assigner = CreditAssigner(
        make_config(kl=KLConfig(coefficient=0.1, placement="reward", kind="k1"))
    )
    train, metrics = assigner.assign(
        made, rewards([1, 0, 1, 0]), logprobs(made, -1.0), logprobs(made, -1.5)
    )
    expected = [[0.9, 0.95], [-0.2, -0.15, -0.1, -0.05], [0.95], [-0.15, -0.1, -0.05]]
    for found, wanted in zip(advantages_of(made, train), expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-6)
    assert train.kl_coefficient == 0.0
    assert values(metrics)["kl/coefficient"] == 0.1


def test_entropy_in_the_reward():
    made = batch()
    assigner = CreditAssigner(make_config(entropy=EntropyConfig(temperature=0.1)))
    train, _ = assigner.assign(made, rewards([0, 0, 0, 0]), logprobs(made, -2.0), [])
    assert advantages_of(made, train)[1] == pytest.approx([0.8, 0.6, 0.4, 0.2], abs=1e-6)


def test_the_kl_in_the_loss_leaves_the_advantages_alone():
    made = batch()
    assigner = CreditAssigner(make_config(kl=KLConfig(coefficient=0.1)))
    train, _ = assigner.assign(made, rewards([1, 0, 1, 0]), [], logprobs(made, -1.5))
    assert train.kl_coefficient == 0.1
    assert advantages_of(made, train)[0] == [1.0, 1.0]


def test_the_kl_in_the_advantage_reaches_the_estimator():
    """r_j = r - (beta / H) sum K with H 4, K = 1 and beta 1.

    Responses of lengths 2 and 4 are charged (2/4, 1/4) and (4/4, 3/4, 2/4, 1/4).
    """
    made = batch()
    assigner = CreditAssigner(
        make_config("token_kl_grpo", kl=KLConfig(coefficient=1.0, placement="advantage"))
    )
    train, _ = assigner.assign(
        made, rewards([1, 1, 1, 1]), logprobs(made, -1.0), logprobs(made, -2.0)
    )
    first, second = advantages_of(made, train)[:2]
    assert first == pytest.approx([1.0, 1.0], abs=1e-4)
    assert second == pytest.approx([-1.0, -1.0, 0.0, 0.0], abs=1e-4)  # alone at the last two


def test_with_recompute_advantages_are_estimated_before_each_mini_batch_only(tmp_path: Path):
    """For group rewards (1, 0) the leave-one-out baseline gives advantages of 1 and -1."""
    made, config = batch(), make_config("rloo", recompute=True)
    train, metrics = CreditAssigner(config).assign(made, rewards([1, 0, 1, 0]), [], [])
    assert not isinstance(train, TrainBatch)
    assert "advantage/mean_abs" not in metrics
    write_rollouts(train, tmp_path / "step.parquet")
    assert [row["advantages"] for row in read_rollouts(tmp_path / "step.parquet")] == [None] * 4

    zeros = np.zeros(len(made.token_ids), dtype=np.float32)
    later = recomputed(
        config,
        train,
        np.array([0, 1]),
        LiveLogprobs(logprobs=zeros - 1, squared_score_norms=zeros),
        {},
    )
    assert advantages_of(made, later.batch) == [[1, 1], [-1, -1, -1, -1], [0], [0, 0, 0]]
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


def test_masking_truncated_responses_leaves_the_statistics_alone():
    """Advantages are the same with and without the mask, and with and without `recompute`.

    All ratios are 1, so the estimator equals RLOO.
    """
    made = batch()
    object.__setattr__(made, "stop_reasons", np.array([0, 1, 0, 0], dtype=np.int8))
    flat = made.rollout_logprobs
    norms = np.ones_like(flat)
    found = []
    for masked in (False, True):
        for recompute in (False, True):
            config = make_config(
                "hierarchical",
                recompute=recompute,
                overlong=OverlongConfig(mask_truncated=masked),
            )
            old = [
                LogprobBatch(
                    batch_id=0, rows=np.arange(4), logprobs=flat, squared_score_norms=norms
                )
            ]
            train, _ = CreditAssigner(config).assign(made, rewards([1, 0, 1, 0]), old, [])
            if recompute:
                live = LiveLogprobs(logprobs=flat, squared_score_norms=norms)
                train = recomputed(config, train, np.arange(4), live, {}).batch
            found.append(advantages_of(made, train))
    assert found[0] == [[1, 1], [-1, -1, -1, -1], [1], [-1, -1, -1]]
    assert all(other == found[0] for other in found)


def scored(accuracies: list[float], total: list[float]) -> RewardBatch:
    """Return rewards that differ from the accuracies."""
    return dataclasses.replace(rewards(total), accuracies=np.asarray(accuracies, dtype=np.float32))


def test_groups_that_dynamic_sampling_does_not_keep_stay_out_of_the_loss():
    """Both groups have different rewards; the second has two wrong responses, one penalized."""
    made, mixed = batch(), scored([1, 0, 0, 0], [1, 0, 0, -0.5])
    kept = {}
    for by in ("accuracy", "reward"):
        config = make_config("grpo", dynamic_sampling=DynamicSamplingConfig(max_rounds=2, by=by))
        train, _ = CreditAssigner(config).assign(made, mixed, [], [])
        assert train.trained is not None
        kept[by] = train.trained.tolist()
        assert advantages_of(made, train)[2][0] > 0.9  # which would train it
    assert kept == {"accuracy": [True, True, False, False], "reward": [True] * 4}
    off, _ = CreditAssigner(make_config("grpo")).assign(made, mixed, [], [])
    assert off.trained is None


@pytest.mark.parametrize(
    ("accuracies", "total", "by_accuracy", "by_reward"),
    [
        ([1, 0, 0], [1, 0, 0], True, True),
        ([0, 0, 0], [0, 0, -1], False, True),  # wrong, of different lengths
        ([1, 1, 1], [1, 0.5, 1], False, True),
        ([1, 1, 1], [1, 1, 1], False, False),
        ([0.4, 0.6, 0.6], [1, 1, 1], True, False),  # correct from 0.5 on
        ([1, 1, 0], [1, 1, float("nan")], False, False),  # the third has no reward
    ],
)
def test_which_groups_are_kept(
    accuracies: list[float], total: list[float], by_accuracy: bool, by_reward: bool
):
    group = scored(accuracies, total)
    assert keeps_group(group, "accuracy") is by_accuracy
    assert keeps_group(group, "reward") is by_reward


LONG, LONGER = 70, 60  # tokens of the response, and how many more it gets


def own_advantages(seed: int, *, longer: bool, parameters: dict) -> np.ndarray:
    """Return the advantages of the first LONG tokens of response 0.

    Its ratio is 1 from there on, so with `longer` only its length changes.
    """
    rng = np.random.default_rng(seed)
    groups, size = 16, 8
    lengths = rng.integers(LONG // 2, LONG, groups * size)
    lengths[0] = LONG
    width = LONG + LONGER
    rollout = -1 + 0.1 * rng.normal(size=(groups * size, width))
    old = rollout + 0.05 * rng.normal(size=rollout.shape)
    norms = rng.random(rollout.shape)
    old[0, LONG:] = rollout[0, LONG:]
    drift = np.where(np.arange(width) < lengths[:, None], old - rollout, 0.0).sum(1)
    outcomes = (rng.random(len(lengths)) < 1 / (1 + np.exp(-4 * drift))).astype(np.float32)
    lengths[0] += LONGER * longer

    of_group = lengths.reshape(groups, size)
    made = rollouts([([9], [[1] * int(n) for n in row]) for row in of_group])
    inside = np.arange(width) < lengths[:, None]

    def flat(values: np.ndarray) -> np.ndarray:
        out = np.zeros(len(made.token_ids), dtype=np.float32)
        out[made.response_mask] = values[inside]
        return out

    made = dataclasses.replace(made, rollout_logprobs=flat(rollout))
    part = LogprobBatch(
        batch_id=0, rows=np.arange(len(made)), logprobs=flat(old), squared_score_norms=flat(norms)
    )
    config = make_config("hierarchical", parameters=parameters | {"diagnostics": False})
    generation = config.generation.model_copy(update={"max_tokens": 140})
    config = config.model_copy(update={"generation": generation})
    train, _ = CreditAssigner(config).assign(made, rewards(outcomes.tolist()), [part], [])
    assert isinstance(train, TrainBatch)
    return train.advantages[1 : 1 + LONG]


@pytest.mark.parametrize(
    "parameters", [{}, {"max_tokens": None}, {"horizons": "blocks", "block_size": 20}]
)
@pytest.mark.parametrize("seed", [7, 10, 21])
def test_a_responses_own_length_does_not_move_its_own_baselines(seed: int, parameters: dict):
    """Horizons and shrinkage depend on generation.max_tokens, not on the longest response."""
    short = own_advantages(seed, longer=False, parameters=parameters)
    long = own_advantages(seed, longer=True, parameters=parameters)
    assert np.abs(short).max() > 0.1
    np.testing.assert_allclose(long, short, rtol=0, atol=1e-5)


def test_greedy_rewards_reach_the_responses_of_their_prompt():
    made = batch()
    greedy = rewards([0.25, 0.75])
    train, _ = CreditAssigner(make_config("remax")).assign(
        made, rewards([1, 0, 1, 0]), [], [], greedy
    )
    assert [row[0] for row in advantages_of(made, train)] == [0.75, -0.25, 0.25, -0.75]


def test_the_rewards_of_each_function_and_their_weights_reach_the_estimator():
    """Two functions of weights 2 and 1 that contradict each other; the sum alone would give 0.

    A_1 = (1, -1), A_2 = (-1, 1), S = (1, -1) and 0 for the second group, std over the batch
    sqrt(1/2).
    """
    functions = (
        RewardFunctionConfig(name="math", weight=2.0),
        RewardFunctionConfig(name="format_boxed", weight=1.0),
    )
    config = make_config("gdpo", parameters={"eps": 0.0})
    config = config.model_copy(
        update={"reward": config.reward.model_copy(update={"functions": functions})}
    )
    outcomes = rewards([0.0, 0.0, 0.0, 0.0])
    components = {  # in another order than in the configuration
        "format_boxed": np.array([0.0, 1.0, 0.5, 0.5], dtype=np.float32),
        "math": np.array([1.0, 0.0, 1.0, 1.0], dtype=np.float32),
    }
    made = batch()
    train, _ = CreditAssigner(config).assign(
        made, dataclasses.replace(outcomes, components=components), [], []
    )
    first = [row[0] for row in advantages_of(made, train)]
    assert first == pytest.approx([2**0.5, -(2**0.5), 0.0, 0.0])

    with pytest.raises(ValueError, match="'gdpo' needs reward_components, which this batch does"):
        CreditAssigner(config).assign(made, outcomes, [], [])


def test_averages_of_problems_follow_the_problem_and_survive_a_checkpoint():
    """The second batch has the first one's second problem, under another group id."""
    config = make_config("rae", parameters={"decay": 0.5})
    first = CreditAssigner(config)
    made = batch()
    train, _ = first.assign(made, rewards([1, 0, 1, 1]), [], [])
    assert [row[0] for row in advantages_of(made, train)] == [1.0, 0.0, 1.0, 1.0]

    later = rollouts([([8, 8], [[5], [5, 6]])], first_group=7)
    prompt = dataclasses.replace(later.prompts.prompts[0], problem_id="p1")
    later = dataclasses.replace(
        later, prompts=dataclasses.replace(later.prompts, prompts=(prompt,))
    )
    second = CreditAssigner(config)
    second.load_state(json.loads(json.dumps(first.state())))
    train, metrics = second.assign(later, rewards([1, 0]), [], [])
    assert [row[0] for row in advantages_of(later, train)] == [0.0, -1.0]
    assert values(metrics)["advantage/seen_before"] == 1.0


def test_a_response_without_a_reward_takes_its_problem_with_it():
    config = make_config("rae", parameters={"decay": 0.5})
    assigner = CreditAssigner(config)
    assigner.assign(batch(), rewards([float("nan"), 1, 1, float("nan")]), [], [])
    averages = assigner.state()["estimator"]["averages"]
    assert averages == {"p0": [0.5, 0.5], "p1": [0.5, 0.5]}


def test_squared_score_norms_come_with_the_old_logprobs():
    """Responses of 2 and 4 tokens with equal norms weigh 1 to 2: b = 1/3 for rewards 1 and 0."""
    made = batch()
    train, _ = CreditAssigner(make_config("optimal_baseline")).assign(
        made, rewards([1, 0, 0, 0]), logprobs(made, -1.0, norm=0.5), []
    )
    assert [row[0] for row in advantages_of(made, train)] == pytest.approx(
        [2 / 3, -1 / 3, 0.0, 0.0]
    )


def test_adaptive_numbers_move_and_survive_a_checkpoint():
    """Both coefficients rise, and the next batch uses their new values.

    The KL of k3 at d = 0.5 is e^-0.5 - 0.5 = 0.107, above its target; the entropy of 1 is below its
    target.
    """
    config = make_config(
        "reinforce_baseline",
        parameters={"baseline": "moving_average"},
        kl=KLConfig(coefficient=0.1, target=0.05, horizon=10),
        entropy=EntropyConfig(temperature=0.2, target=2.0, learning_rate=0.1),
    )
    made, outcomes = batch(), rewards([1, 0, 1, 0])
    first = CreditAssigner(config)
    train, metrics = first.assign(made, outcomes, logprobs(made, -1.0), logprobs(made, -1.5))
    assert train.kl_coefficient == 0.1
    assert values(metrics)["entropy/temperature"] == 0.2

    second = CreditAssigner(config)
    second.load_state(json.loads(json.dumps(first.state())))
    for assigner in (first, second):
        train, metrics = assigner.assign(made, outcomes, logprobs(made, -1.0), logprobs(made, -1.5))
        assert train.kl_coefficient == pytest.approx(0.1 * 1.02)
        assert values(metrics)["entropy/temperature"] == pytest.approx(0.2 * np.exp(0.1))
        # The mean of the batch before: rewards of 0.5, and 0.2 for each of 2.5 tokens.
        assert values(metrics)["advantage/baseline"] == pytest.approx(1.0)


def test_a_batch_without_sampled_tokens_leaves_the_kl_coefficient_alone():
    made = rollouts([([9], [[1], [2]])], holes={0: [0], 1: [0]})
    assigner = CreditAssigner(make_config(kl=KLConfig(coefficient=0.1, target=0.05)))
    assigner.assign(made, rewards([1, 0]), logprobs(made, -1.0), logprobs(made, -1.5))
    assert assigner.state()["kl_coefficient"] == 0.1


def test_fixed_numbers_follow_the_configuration_after_a_resume():
    assigner = CreditAssigner(make_config(kl=KLConfig(coefficient=0.3)))
    assigner.load_state({"kl_coefficient": 0.1, "entropy_temperature": 0.0, "estimator": {}})
    assert assigner.state()["kl_coefficient"] == 0.3


def test_advantages_that_are_not_finite_are_refused():
    made = batch()
    with pytest.raises(
        ValueError,
        match=r"algorithm\.advantage\.name: 'reinforce' returned advantages of which 4 of 10 .* "
        "not finite",
    ):
        CreditAssigner(make_config()).assign(made, rewards([1, float("inf"), 0, 0]), [], [])
