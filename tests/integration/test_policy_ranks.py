"""The actor group on real Ray and gloo: updates do not depend on ranks, packing, microbatches."""

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsys.algorithms.kl import exact_token_kl
from rlsys.config import (
    AdvantageConfig,
    AlgorithmConfig,
    AuxiliaryConfig,
    DiagnosticsConfig,
    EntropyConfig,
    GenerationConfig,
    KLConfig,
    ModelConfig,
    ObjectiveConfig,
    OldKLConfig,
    OptimizerConfig,
    PolicyConfig,
    ReferenceConfig,
    RolloutCorrectionConfig,
    RunConfig,
    TrainerConfig,
)
from rlsys.data.batches import LogprobBatch, RolloutBatch, ScoredBatch, TrainBatch
from rlsys.metrics import values
from rlsys.models import resolve_model
from rlsys.models.loading import UnsupportedModelError, load_causal_lm
from rlsys.models.sharded_state import ShardedState
from rlsys.models.weight_files import file_names
from rlsys.models.weights import unpack_weights
from tests.support.rank_processes import RankProcesses
from tests.support.rollout_examples import random_rollouts, rewards_of, train_batch
from tests.support.saved_weights import contents, saved_weights
from workers.training.rank_group import PolicyGroup, ReferenceGroup
from workers.training.reference import ReferenceWorker

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def config(ranks: int, **policy: object) -> RunConfig:
    settings = {
        "ranks": ranks,
        "compute_dtype": "float32",
        "optimizer": OptimizerConfig(learning_rate=1e-3, max_grad_norm=0.5),
        **policy,
    }
    return RunConfig(
        model=ModelConfig(path="tiny"),
        generation=GenerationConfig(dtype="float32"),
        policy=PolicyConfig.model_validate(settings),
        algorithm=AlgorithmConfig(kl=KLConfig(coefficient=0.05), entropy=EntropyConfig(bonus=0.01)),
        trainer=TrainerConfig(steps=10, prompts_per_step=12),
    )


@pytest.fixture(scope="module")
def ranks(ray_cluster: None) -> Iterator[RankProcesses]:
    processes = RankProcesses()
    yield processes
    processes.kill()


@asynccontextmanager
async def reference_group(config: RunConfig) -> AsyncIterator[ReferenceGroup]:
    """Start a reference group with processes of its own, and kill them at the end."""
    remote_class: Any = ray.remote(ReferenceWorker)
    model = str(resolve_model("tiny"))
    count = config.reference_role().ranks
    actors = [
        remote_class.options(num_cpus=0).remote(config, model, rank, count) for rank in range(count)
    ]
    group = ReferenceGroup(actors)
    await group.setup()
    yield group
    for actor in actors:
        ray.kill(actor)


async def weights_of(group: PolicyGroup) -> dict[str, torch.Tensor]:
    """Return copies of the exported weights."""
    manifest, refs = await group.export_weights(1)
    shards = [await ref for ref in refs]
    return {name: tensor.clone() for name, tensor in unpack_weights(manifest, shards)}


async def logprobs_of(group: PolicyGroup | ReferenceGroup, batch: ScoredBatch) -> np.ndarray:
    """Return the group's log-probabilities of the responses, [N]."""
    parts = await group.logprobs([ray.put(batch.rollouts)])
    return LogprobBatch.scatter([await part for part in parts], batch.rollouts.sequence_offsets)


def example() -> TrainBatch:
    """Return 24 responses, with old and ref log-probabilities near those of the tiny model."""
    batch = random_rollouts(0, groups=6, samples=4)
    estimated = train_batch(batch)
    noise = np.random.default_rng(9).normal(scale=0.1, size=len(batch.token_ids))
    near = np.where(batch.response_mask, -5.7 + noise, 0).astype(np.float32)
    return TrainBatch(
        rollouts=batch,
        rewards=estimated.rewards,
        advantages=estimated.advantages,
        old_logprobs=near,
        ref_logprobs=near,
        kl_coefficient=0.05,
    )


async def updated(
    ranks: RankProcesses, policy: RunConfig, batch: TrainBatch
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Return weights and metrics after one update by new ranks."""
    async with ranks.group(policy) as group:
        report = values(await group.update(ray.put(batch)))
        return await weights_of(group), report


async def test_update_does_not_depend_on_ranks_or_packing(ranks: RankProcesses):
    batch = example()
    async with ranks.group(config(1)) as group:
        start = await weights_of(group)
        report = values(await group.update(ray.put(batch)))
        reference = await weights_of(group)

    plans = [
        config(1, shared_prefix_packing=False, microbatch_tokens=64, logit_chunk_tokens=3),
        config(2, microbatch_tokens=50, gradient_checkpointing=True),
        config(2, microbatch_tokens=50, packing=False, gradient_checkpointing=True),
    ]
    results = [await updated(ranks, plan, batch) for plan in plans]

    moved = max(float((reference[name] - start[name]).abs().max()) for name in reference)
    assert moved > 5e-4  # the update did something
    for weights, other in results:
        for name, tensor in weights.items():
            # Adam's first step is lr * g / (|g| + eps): where a gradient is about 0, its sign is
            # rounding, so a few entries may differ.
            agree = (tensor - reference[name]).abs() < 1e-5
            assert agree.float().mean() > 0.999, name

        for metric in (
            "policy/loss",
            "policy/grad_norm",
            "policy/entropy",
            "policy/ratio_mean",
            "policy/ratio_max",
            "policy/kl_ref_k3",
        ):
            assert other[metric] == pytest.approx(report[metric], rel=1e-4, abs=1e-6), metric
        assert other["policy/effective_sample_size"] == pytest.approx(
            report["policy/effective_sample_size"], rel=1e-5
        )
        assert other["policy/tokens"] == report["policy/tokens"]


def kl_over_the_vocabulary(
    batch: RolloutBatch, weights: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> np.ndarray:
    """Return [N] the KL of two models, from their own forward passes on single sequences."""
    logits = []
    for state in (weights, start):
        model = load_causal_lm(resolve_model("tiny"), dtype=torch.float32, attention="eager")
        model.load_state_dict(state, strict=False)
        with torch.no_grad():
            logits.append(
                [
                    model(torch.from_numpy(row.astype(np.int64))[None]).logits[0]
                    for row in np.split(batch.token_ids, batch.sequence_offsets[1:-1])
                ]
            )

    flat = np.zeros(len(batch.token_ids), dtype=np.float32)
    for first, policy, reference in zip(batch.sequence_offsets[:-1], *logits, strict=True):
        kl = exact_token_kl(policy, reference, temperature=batch.temperature)
        # The logits at a position predict the token after it.
        flat[first + 1 : first + len(kl)] = kl[:-1].numpy()
    return np.where(batch.response_mask, flat, 0)


async def test_exact_kl_does_not_depend_on_ranks_or_packing(ranks: RankProcesses):
    batch = example()
    directory = resolve_model("tiny")
    kl = KLConfig(coefficient=0.05, kind="exact", placement="reward")
    algorithm = AlgorithmConfig(kl=kl, advantage=AdvantageConfig(name="rloo"))
    rollouts = [ray.put(batch.rollouts)]

    reports = []
    for plan in (config(1), config(2, microbatch_tokens=50, logit_chunk_tokens=3)):
        settings = plan.model_copy(update={"algorithm": algorithm})
        async with ranks.group(settings) as policy, reference_group(settings) as reference:
            await policy.load_reference_head([str(directory)] * settings.policy.ranks)
            _, hidden = await reference.logprobs_and_hidden(rollouts)
            start = await weights_of(policy)
            first = values(await policy.update(ray.put(batch), hidden))
            assert first["policy/kl_ref_exact"] == pytest.approx(0, abs=1e-5)  # the same model

            moved = await weights_of(policy)
            old = [await part for part in await policy.logprobs(rollouts, hidden)]
            found = LogprobBatch.scatter(old, batch.rollouts.sequence_offsets, "exact_kl")
            expected = kl_over_the_vocabulary(batch.rollouts, moved, start)
            assert expected.max() > 1e-3
            np.testing.assert_allclose(found, expected, atol=2e-5)

            second = values(await policy.update(ray.put(batch), hidden))
            tokens = batch.rollouts.num_response_tokens
            mean_kl = float(expected.sum()) / tokens
            assert second["policy/kl_ref_exact"] == pytest.approx(mean_kl, rel=1e-3)
            reports.append(second)

    for metric in ("policy/loss", "policy/grad_norm", "policy/kl_ref_exact"):
        assert reports[1][metric] == pytest.approx(reports[0][metric], rel=2e-3), metric


async def test_exact_kl_is_refused_for_padded_models(ranks: RankProcesses):
    async with ranks.group(config(1, packing=False)) as policy:
        with pytest.raises(UnsupportedModelError, match="needs the packed forward pass"):
            await policy.load_reference_head([str(resolve_model("tiny"))])

    padded = config(1, packing=False)
    exact = AlgorithmConfig(kl=KLConfig(coefficient=0.05, kind="exact"))
    # The command line refuses this; `packing: auto` finds some models unfit at set-up only.
    settings = padded.model_copy(update={"algorithm": exact})
    with pytest.raises(UnsupportedModelError, match="model of the reference runs padded"):
        async with reference_group(settings):
            pass


async def test_batch_statistics_and_corrections_do_not_depend_on_ranks_or_packing(
    ranks: RankProcesses,
):
    """Update with everything that is computed over more than a token or a pack.

    adaptive_power takes its q from the whole mini-batch, the mismatch correction its ratio from
    whole responses, and masked responses leave no trace.
    """
    batch = example()
    trained = np.arange(len(batch.rollouts)) % 3 != 0
    batch = dataclasses.replace(batch, trained=trained)
    algorithm = AlgorithmConfig(
        objective=ObjectiveConfig(
            ratio="sequence", weight="adaptive_power", parameters={"target_ess": 0.999}
        ),
        rollout_correction=RolloutCorrectionConfig(
            level="sequence",
            cap=1.5,
            mask_below=1e-9,
            max_sequence_kl=5.0,
            sequence_kl="k1",
            off_policy_mask=3.0,
        ),
        aggregation="token_mean",
    )

    reports = []
    for plan in (
        config(1),
        config(1, shared_prefix_packing=False, microbatch_tokens=64),
        config(2, microbatch_tokens=50),
    ):
        _, report = await updated(ranks, plan.model_copy(update={"algorithm": algorithm}), batch)
        reports.append(report)

    first = reports[0]
    assert 0.01 < first["policy/q"] < 0.99
    assert first["policy/tokens"] == batch.rollouts.response_lengths[trained].sum()
    assert 0 < first["policy/rollout_masked_fraction"] < 1
    for report in reports[1:]:
        for metric in (
            "policy/q",
            "policy/loss",
            "policy/grad_norm",
            "policy/rollout_correction",
            "policy/rollout_masked_fraction",
        ):
            assert report[metric] == pytest.approx(first[metric], rel=1e-4, abs=1e-6), metric


@pytest.mark.parametrize(
    ("weight", "parameters"),
    [
        ("clip_cov", {"fraction": 0.2, "lowest": 0.05}),
        ("kl_cov", {"fraction": 0.2}),
        ("gmpo", {}),
    ],
)
async def test_choices_of_tokens_do_not_depend_on_ranks_or_packing(
    ranks: RankProcesses, weight: str, parameters: dict[str, float]
):
    """Choose a fifth of the tokens of the whole mini-batch, and leave out every third response.

    `gmpo` needs whole responses.
    """
    batch = dataclasses.replace(example(), trained=np.arange(24) % 3 != 0)
    algorithm = AlgorithmConfig(
        objective=ObjectiveConfig(weight=weight, parameters=parameters), aggregation="token_mean"
    )
    plain = AlgorithmConfig(objective=ObjectiveConfig(), aggregation="token_mean")

    reports = []
    for plan, chosen in (
        (config(1), algorithm),
        (config(1, shared_prefix_packing=False, microbatch_tokens=64), algorithm),
        (config(2, microbatch_tokens=50), algorithm),
        (config(1), plain),
    ):
        _, report = await updated(ranks, plan.model_copy(update={"algorithm": chosen}), batch)
        reports.append(report)

    *same, without = reports
    assert abs(same[0]["policy/grad_norm"] / without["policy/grad_norm"] - 1) > 0.01
    assert "policy/selected" not in same[0]
    for report in same[1:]:
        for metric in ("policy/loss", "policy/grad_norm", "policy/clip_fraction"):
            assert report[metric] == pytest.approx(same[0][metric], rel=1e-4, abs=1e-6), metric


async def test_the_penalty_to_the_old_policy_adapts_on_any_ranks_and_is_saved(
    tmp_path: Path, ranks: RankProcesses
):
    """Set the target far below what two updates reach, and far above.

    The coefficient doubles or halves. KL terms of whole responses are in the same loss.
    """
    batch = example()
    logged: list[dict[str, float]] = []
    for count, target in ((1, 1e-9), (2, 1e-9), (1, 1e9)):
        plan = config(count, num_mini_batches=2, microbatch_tokens=4096 if count == 1 else 50)
        algorithm = AlgorithmConfig(
            kl=KLConfig(coefficient=0.05, level="sequence", importance_ratio="product"),
            kl_old=OldKLConfig(coefficient=0.5, target=target),
            objective=ObjectiveConfig(weight="importance"),
            aggregation="sequence_sum",
        )
        plan = plan.model_copy(update={"algorithm": algorithm})

        async with ranks.group(plan) as group:
            first = values(await group.update(ray.put(batch)))
            directory = tmp_path / f"{count}-{target}"
            directory.mkdir()
            await group.save(directory)

        async with ranks.group(plan) as group:
            await group.load(directory)
            second = values(await group.update(ray.put(batch)))

        assert first["kl/old_coefficient"] == 0.5
        assert second["kl/old_coefficient"] == (1.0 if target < 1 else 0.25)
        assert first["policy/kl_old"] > 0
        logged.append(first)

    for name in ("policy/kl_old", "policy/loss", "policy/grad_norm"):
        assert logged[1][name] == pytest.approx(logged[0][name], rel=1e-3, abs=1e-6), name


async def test_gradient_diagnostics_do_not_depend_on_ranks_and_leave_the_update_alone(
    ranks: RankProcesses,
):
    batch = example()
    rollouts = dataclasses.replace(batch.rollouts, rollout_logprobs=batch.old_logprobs)
    batch = dataclasses.replace(batch, rollouts=rollouts)
    plain, silent = await updated(ranks, config(1), batch)
    assert not any(name.startswith("gradient/") for name in silent)

    diagnostics = {"diagnostics": DiagnosticsConfig(gradient=True)}
    reports = []
    for plan in (
        config(1),
        config(2, microbatch_tokens=50),
        config(1, gradient_checkpointing=True),
    ):
        weights, report = await updated(ranks, plan.model_copy(update=diagnostics), batch)
        reports.append(
            {name: value for name, value in report.items() if name.startswith("gradient/")}
        )
        if plan.policy.ranks == 1:
            for name, tensor in plain.items():
                assert (weights[name] - tensor).abs().max() < 1e-6

    assert reports[0]["gradient/variance_ratio/leave_one_out"] == 1
    for report in reports[1:]:
        assert report == pytest.approx(reports[0], rel=1e-3, abs=1e-5)


async def test_a_mini_batch_without_trained_responses_is_skipped(ranks: RankProcesses):
    batch = dataclasses.replace(example(), trained=np.zeros(24, dtype=np.bool_))
    _, report = await updated(ranks, config(2, num_mini_batches=3, epochs=2), batch)
    assert report["policy/skipped_updates"] == 6  # counted once, not once per rank
    assert report["policy/updates"] == report["policy/nonfinite_gradients"] == 0
    assert "policy/grad_norm" not in report


async def test_masked_responses_stay_in_recomputed_advantages(ranks: RankProcesses):
    """Recompute the same advantages with and without the mask, which only affects the loss."""
    plain = dataclasses.replace(example(), ref_logprobs=None, kl_coefficient=0.0)
    trained = np.arange(len(plain.rollouts)) % 3 != 0
    masked = dataclasses.replace(plain, trained=trained)
    algorithm = AlgorithmConfig(
        advantage=AdvantageConfig(name="hierarchical", recompute=True),
        objective=ObjectiveConfig(weight="none"),
        aggregation="sequence_sum",
    )

    names = ("advantage/mean_abs", "advantage/shrinkage_group", "advantage/condition_number")
    reports = []
    for count, batch in ((1, plain), (1, masked), (2, masked)):
        plan = config(count).model_copy(update={"algorithm": algorithm})
        _, report = await updated(ranks, plan, batch)
        reports.append(report)

    for report in reports[1:]:
        assert report["policy/tokens"] == plain.rollouts.response_lengths[trained].sum()
        for name in names:
            assert report[name] == pytest.approx(reports[0][name], rel=1e-5), name


@pytest.mark.parametrize("count", [1, 2])
async def test_weight_decay_acts_on_matrices_alone(ranks: RankProcesses, count: int):
    """Update without a gradient: matrices shrink by rate times decay, 1e-3 * 10, norms do not."""
    batch = example()
    silent = TrainBatch(
        rollouts=batch.rollouts,
        rewards=batch.rewards,
        advantages=np.zeros_like(batch.rollouts.rollout_logprobs),
    )
    plan = config(count, optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=10.0))
    plan = plan.model_copy(update={"algorithm": AlgorithmConfig()})

    async with ranks.group(plan) as group:
        before = await weights_of(group)
        await group.update(ray.put(silent))
        after = await weights_of(group)

    norms = [name for name in before if "norm" in name]
    assert 0 < len(norms) < len(before)
    for name, tensor in before.items():
        factor = 1.0 if name in norms else 0.99
        torch.testing.assert_close(after[name], factor * tensor)


async def test_loss_and_counts_do_not_grow_with_ranks_mini_batches_and_epochs(
    ranks: RankProcesses,
):
    """Take steps too small to move the policy.

    The mean loss of mini-batches of equal size is then the loss of the whole batch.
    """
    batch = example()
    still = OptimizerConfig(learning_rate=1e-12)
    reports = {}
    for count, mini_batches, epochs in ((1, 1, 1), (1, 3, 2), (2, 1, 1), (2, 3, 2)):
        plan = config(count, num_mini_batches=mini_batches, epochs=epochs, optimizer=still)
        _, reports[count, mini_batches, epochs] = await updated(ranks, plan, batch)

    whole = reports[1, 1, 1]
    assert abs(whole["policy/loss"]) > 1e-3
    for (_, mini_batches, epochs), report in reports.items():
        assert report["policy/loss"] == pytest.approx(whole["policy/loss"], rel=1e-3)
        assert report["policy/updates"] == mini_batches * epochs
        assert report["policy/skipped_updates"] == 0
        assert report["policy/tokens"] == epochs * whole["policy/tokens"]


@pytest.mark.parametrize("with_gradient", [1, 0], ids=["one row", "no row"])
async def test_rows_without_gradient_are_left_out_on_any_ranks(
    ranks: RankProcesses, with_gradient: int
):
    """Keep the advantages of at most one response, so that a rank has a padding pack alone."""
    batch = example()
    rows = np.arange(len(batch.rollouts)) < with_gradient
    kept = np.repeat(rows, batch.rollouts.sequence_lengths)
    batch = dataclasses.replace(
        batch, advantages=np.where(kept, batch.advantages, 0.0), ref_logprobs=None
    )
    results = []
    for count, budget in ((1, 4096), (2, 50)):
        plan = config(count, microbatch_tokens=budget)
        plan = plan.model_copy(update={"algorithm": AlgorithmConfig()})
        results.append(await updated(ranks, plan, batch))

    (weights, report), (other_weights, other_report) = results
    assert report["policy/skipped_fraction"] == pytest.approx(1 - with_gradient / 24)
    assert (report["policy/grad_norm"] > 0) == bool(with_gradient)
    for name, tensor in weights.items():
        assert torch.allclose(other_weights[name], tensor, atol=1e-6), name
    for metric in ("skipped_fraction", "tokens", "entropy", "grad_norm", "loss"):
        found = other_report[f"policy/{metric}"]
        assert found == pytest.approx(report[f"policy/{metric}"], rel=1e-4, abs=1e-7), metric


@pytest.mark.parametrize("count", [1, 2])
async def test_estimates_of_the_ranks_come_back_and_drift_is_not_mismatch(
    ranks: RankProcesses, count: int
):
    """Estimate advantages of the trained responses on the ranks, in one mini-batch and in two.

    The policy of the second mini-batch has moved: the log-prob mismatch is that of the first alone.
    """
    rollouts = random_rollouts(0, groups=6, samples=4)
    trained = np.arange(len(rollouts)) != 5
    drawn = rewards_of(rollouts)
    # Rewards of 1 and 2: no row is without a gradient, so the metrics are over all of them.
    rewarded = dataclasses.replace(drawn, rewards=drawn.rewards + 1)
    batch = ScoredBatch(rollouts=rollouts, rewards=rewarded, trained=trained)
    algorithm = AlgorithmConfig(
        advantage=AdvantageConfig(name="reinforce", recompute=True),
        objective=ObjectiveConfig(weight="none"),
    )
    update = {"algorithm": algorithm}

    async with ranks.group(config(count).model_copy(update=update)) as group:
        before = await logprobs_of(group, batch)
        once = values(await group.update(ray.put(batch)))

    plan = config(count, num_mini_batches=2).model_copy(update=update)
    async with ranks.group(plan) as group:
        report = values(await group.update(ray.put(batch)))
        handle = await group.estimated_advantages()
        assert handle is not None
        estimated = await handle
        assert await group.estimated_advantages() is not None

    tokens = np.repeat(trained, batch.rollouts.sequence_lengths)
    rewards = np.repeat(batch.rewards.rewards, batch.rollouts.sequence_lengths)
    mask = batch.rollouts.response_mask
    np.testing.assert_array_equal(np.isnan(estimated), ~tokens)
    np.testing.assert_allclose(estimated[tokens & mask], rewards[tokens & mask], atol=1e-6)

    mismatch = np.abs(batch.rollouts.rollout_logprobs - before)[tokens & mask].mean()
    assert once["policy/logprob_difference_mean"] == pytest.approx(mismatch, rel=1e-4)
    assert "policy/drift_mean" not in once
    assert report["policy/drift_mean"] > 0
    assert report["policy/drift_max"] >= report["policy/drift_mean"]


async def test_an_update_with_the_advantages_of_the_batch_estimates_none(
    ranks: RankProcesses,
):
    async with ranks.group(config(1)) as group:
        await group.update(ray.put(example()))
        assert await group.estimated_advantages() is None


async def test_squared_score_norms_are_computed_only_where_they_are_read(ranks: RankProcesses):
    batch = example().rollouts
    for estimator, wanted in (("grpo", False), ("opo", False), ("optimal_baseline", True)):
        plan = config(1).model_copy(
            update={"algorithm": AlgorithmConfig(advantage=AdvantageConfig(name=estimator))}
        )
        async with ranks.group(plan) as group:
            (part,) = [await handle for handle in await group.logprobs([ray.put(batch)])]

        assert (part.squared_score_norms is not None) == wanted
        if wanted:
            norms = LogprobBatch.scatter([part], batch.sequence_offsets, "squared_score_norms")
            assert (norms[~batch.response_mask] == 0).all()
            assert ((norms > 0) & (norms < 2))[batch.response_mask].all()


async def test_logprobs_and_probe_agree_over_ranks_and_with_the_reference(ranks: RankProcesses):
    batch = example()
    tokens = [batch.rollouts.token_ids[:12], batch.rollouts.token_ids[12:19]]
    found, probes = [], []
    for plan in (config(1), config(2)):
        async with ranks.group(plan) as group:
            found.append(await logprobs_of(group, batch))
            probes.append(await group.probe_logprobs(tokens, 1.0))

    alone = config(2).model_copy(update={"reference": ReferenceConfig(ranks=1)})
    for plan in (config(2), alone):
        async with reference_group(plan) as reference:
            found.append(await logprobs_of(reference, batch))

    first, *others = found
    for other in others:
        assert np.allclose(first, other, atol=1e-5)
    for one, two, sequence in zip(*probes, tokens, strict=True):
        assert one.shape == two.shape == (len(sequence) - 1,)
        assert np.allclose(one, two, atol=1e-5)
    assert (first[~batch.rollouts.response_mask] == 0).all()
    assert (first[batch.rollouts.response_mask] < 0).all()


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (1, 2), (2, 1)])
async def test_saved_and_loaded_continues_to_the_same_weights(
    tmp_path: Path, ranks: RankProcesses, before: int, after: int
):
    """The learning rate falls linearly, so that the schedule counts too."""
    optimizer = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, schedule="linear")
    batch = example()

    def plan(count: int) -> RunConfig:
        return config(count, epochs=2, num_mini_batches=2, optimizer=optimizer)

    async with ranks.group(plan(before)) as group:
        await group.update(ray.put(batch))
        await group.save(tmp_path)
        uninterrupted = values(await group.update(ray.put(batch)))
        straight = await weights_of(group)

    async with ranks.group(plan(after)) as group:
        await group.load(tmp_path)
        again = tmp_path / "again"
        again.mkdir()
        await group.save(again)  # nothing is lost on the way through another number of ranks
        report = values(await group.update(ray.put(batch)))
        resumed = await weights_of(group)

    first, second = saved_tensors(tmp_path), saved_tensors(again)
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name, tensor in straight.items():
        if before == after:
            assert torch.equal(resumed[name], tensor), name
        # See `test_update_does_not_depend_on_ranks_or_packing`.
        assert ((resumed[name] - tensor).abs() < 1e-5).float().mean() > 0.999, name
    for metric in ("policy/loss", "policy/grad_norm", "policy/kl_ref_k3", "policy/learning_rate"):
        assert report[metric] == pytest.approx(uninterrupted[metric], rel=1e-5, abs=1e-6), metric

    # The checkpoint is a Hugging Face directory.
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.model_type == "llama"
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template
    files = {file.name for file in tmp_path.glob("*.safetensors")}
    assert files == set(file_names(before))


def saved_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Return weights and optimizer state of a checkpoint, whole."""
    state = ShardedState.of(directory)
    moments = {
        name: state.read(name, 0, facts.numel).reshape(facts.shape)
        for name, facts in state.tensors.items()
    }
    return {**saved_weights(directory), **moments}


@pytest.mark.parametrize("before", [1, 2])
async def test_a_checkpoint_of_an_earlier_version_continues_on_any_ranks(
    tmp_path: Path, ranks: RankProcesses, before: int
):
    batch = example()
    async with ranks.group(config(before)) as group:
        await group.update(ray.put(batch))
        await group.save(tmp_path)
        calls = [worker.rewrite_as_former.remote(str(tmp_path)) for worker in group.workers]
        await asyncio.gather(*calls)
        uninterrupted = values(await group.update(ray.put(batch)))
    names = {file.name for file in tmp_path.iterdir()}
    assert names >= {"model.safetensors", "optimizer_rank0.pt"}
    assert not any("shard" in name for name in names)

    async with ranks.group(config(3 - before)) as group:
        await group.load(tmp_path)
        report = values(await group.update(ray.put(batch)))
    for metric in ("policy/loss", "policy/grad_norm", "policy/kl_ref_k3"):
        assert report[metric] == pytest.approx(uninterrupted[metric], rel=1e-5, abs=1e-6), metric


async def test_a_checkpoint_that_lacks_a_shard_is_refused_by_every_rank(
    tmp_path: Path, ranks: RankProcesses
):
    batch = example()
    async with ranks.group(config(2)) as group:
        await group.update(ray.put(batch))
        await group.save(tmp_path)
        (tmp_path / "optimizer-00002-of-00002.shard").unlink()
        with pytest.raises(Exception, match=r"optimizer-00002-of-00002\.shard is missing"):
            await group.load(tmp_path)


async def test_a_rank_that_cannot_write_does_not_leave_the_others_waiting(
    tmp_path: Path, ranks: RankProcesses
):
    async with ranks.group(config(2)) as group:
        await group.update(ray.put(example()))
        (tmp_path / "model-00002-of-00002.safetensors").mkdir()  # where the second rank writes
        with pytest.raises(Exception, match=r"IsADirectoryError.*model-00002-of-00002"):
            await asyncio.wait_for(group.save(tmp_path), 60)


def with_baseline_network(ranks: int) -> RunConfig:
    """Return a run of the hierarchical estimator with a baseline network."""
    advantage = AdvantageConfig(
        name="hierarchical",
        parameters={"solver": "network"},
        recompute=True,
        auxiliary=AuxiliaryConfig(learning_rate=0.05),
    )
    algorithm = AlgorithmConfig(
        advantage=advantage, objective=ObjectiveConfig(weight="none"), aggregation="sequence_sum"
    )
    plan = config(ranks, num_mini_batches=3, microbatch_tokens=4096 if ranks == 1 else 50)
    return plan.model_copy(update={"algorithm": algorithm})


async def test_the_baseline_network_learns_the_same_on_any_ranks_and_is_saved(
    tmp_path: Path, ranks: RankProcesses
):
    """Train on three mini-batches: the network is untrained, trained but unproven, then in use."""
    batch = dataclasses.replace(example(), ref_logprobs=None, kl_coefficient=0.0)
    assert batch.old_logprobs is not None
    batch = dataclasses.replace(
        batch, rollouts=dataclasses.replace(batch.rollouts, rollout_logprobs=batch.old_logprobs)
    )
    async with ranks.group(with_baseline_network(1)) as group:
        first = values(await group.update(ray.put(batch)))
        await group.save(tmp_path)
        second = values(await group.update(ray.put(batch)))
        straight = await weights_of(group)

    async with ranks.group(with_baseline_network(1)) as group:
        await group.load(tmp_path)
        again = values(await group.update(ray.put(batch)))
        resumed = await weights_of(group)
    assert again["advantage/shrinkage_network"] == second["advantage/shrinkage_network"]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())

    _, two = await updated(ranks, with_baseline_network(2), batch)
    for name in (
        "advantage/shrinkage_network",
        "advantage/variance_ratio/used",
        "policy/grad_norm",
    ):
        assert two[name] == pytest.approx(first[name], rel=1e-3, abs=1e-5), name
    assert second["advantage/shrinkage_network"] > 0


async def test_two_ranks_write_in_the_background_what_they_were(
    tmp_path: Path, ranks: RankProcesses
):
    """Threads that wait while the ranks train on write the files of a save at once, to the bit."""
    batch = dataclasses.replace(example(), ref_logprobs=None, kl_coefficient=0.0)
    assert batch.old_logprobs is not None
    batch = dataclasses.replace(
        batch, rollouts=dataclasses.replace(batch.rollouts, rollout_logprobs=batch.old_logprobs)
    )
    once, later, afterwards = (tmp_path / name for name in ("once", "later", "afterwards"))
    for directory in (once, later, afterwards):
        directory.mkdir()

    async with ranks.group(with_baseline_network(2)) as group:
        await group.update(ray.put(batch))
        await group.save(once)
        await asyncio.gather(*(worker.hold_files.remote() for worker in group.workers))
        written = asyncio.ensure_future((await group.copy_state(later))())
        await asyncio.wait_for(group.update(ray.put(batch)), 60)
        assert not written.done()
        await asyncio.gather(*(worker.release_files.remote() for worker in group.workers))
        await asyncio.wait_for(written, 60)
        await group.save(afterwards)

    assert len(list(later.glob("*.safetensors"))) == len(list(later.glob("*.shard"))) == 2
    assert contents(later) == contents(once)
    assert contents(later) != contents(afterwards)


async def test_what_the_estimator_keeps_between_mini_batches_is_saved(
    tmp_path: Path, ranks: RankProcesses
):
    """Save a moving average, which the ranks hold because they estimate the advantages."""
    advantage = AdvantageConfig(
        name="reinforce_baseline",
        parameters={"baseline": "moving_average"},
        recompute=True,
    )

    algorithm = AlgorithmConfig(
        advantage=advantage, objective=ObjectiveConfig(weight="none"), aggregation="sequence_sum"
    )

    plan = config(1, num_mini_batches=3).model_copy(update={"algorithm": algorithm})

    batch = dataclasses.replace(example(), ref_logprobs=None, kl_coefficient=0.0)
    assert batch.old_logprobs is not None
    batch = dataclasses.replace(
        batch, rollouts=dataclasses.replace(batch.rollouts, rollout_logprobs=batch.old_logprobs)
    )

    kept = []
    for directory in (tmp_path / "first", tmp_path / "second"):
        directory.mkdir()
        async with ranks.group(plan) as group:
            if kept:
                await group.load(tmp_path / "first")
            else:
                await group.update(ray.put(batch))
            await group.save(directory)

        kept.append(json.loads((directory / "policy_state.json").read_text())["estimator"])

    assert kept[0]["weight"] > 0
    assert kept[0] == kept[1]


async def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(ranks: RankProcesses):
    batch = example()
    broken = TrainBatch(
        rollouts=batch.rollouts,
        rewards=batch.rewards,
        advantages=np.where(batch.rollouts.response_mask, np.nan, 0).astype(np.float32),
        old_logprobs=batch.old_logprobs,
    )
    async with ranks.group(config(1)) as group:
        before = await weights_of(group)
        report = values(await group.update(ray.put(broken)))
        after = await weights_of(group)
    assert report["policy/skipped_updates"] == report["policy/nonfinite_gradients"] == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
