"""Contracts of the driver's ports, checked on the fakes and on the real parts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rlsys.data.batches import (
    LogprobBatch,
    PromptBatch,
    RewardBatch,
    RolloutBatch,
    SamplingParameters,
    ScoredBatch,
    TrainBatch,
    ValueBatch,
)
from rlsys.data.rollout_files import read_rollouts
from rlsys.driver.ports import Handle, RolloutPart, StepHandles, Workers
from rlsys.metrics import values


@dataclass(frozen=True, kw_only=True)
class System:
    """A set of workers, with the means to open their handles."""

    workers: Workers  # with a reference and a critic, which the estimator reads
    prompts: PromptBatch  # at least three
    sampling: SamplingParameters
    open: Callable[[Handle], Awaitable[Any]]
    put: Callable[[Any], Handle]
    tolerance: float  # of log-probabilities between engine and trainer
    versions: Iterator[int] = field(default_factory=count)  # of weights; engines refuse to go back

    async def sync(self) -> int:
        """Install the policy's weights as a new version, and return it."""
        version = next(self.versions)
        await self.workers.weights.sync(version)
        return version

    async def parts(self, sampling: SamplingParameters | None = None) -> list[RolloutPart]:
        """Generate from the prompts, and return the parts in the order of the prompts."""
        stream = self.workers.generator.generate(self.prompts, sampling or self.sampling)
        parts = [part async for part in stream]
        return sorted(parts, key=lambda part: part.prompt_index)

    async def rollouts(self, sampling: SamplingParameters | None = None) -> RolloutBatch:
        """Generate from the prompts, and return all responses."""
        return RolloutBatch.concatenate(
            [await self.open(part.rollouts) for part in await self.parts(sampling)]
        )

    async def logprobs(self, handles: list[Handle], rollouts: RolloutBatch) -> NDArray[np.float32]:
        """Return the log-probabilities of the policy, [N]."""
        ranks = await self.workers.policy.logprobs(handles)
        return LogprobBatch.scatter(
            [await self.open(rank) for rank in ranks], rollouts.sequence_offsets
        )

    async def train_batch(self) -> Handle[ScoredBatch]:
        """Generate, score and credit a batch."""
        parts = await self.parts()
        handles = [part.rollouts for part in parts]
        rewards = [self.workers.scorer.score(handle) for handle in handles]
        step = StepHandles(rollouts=handles, rewards=rewards)
        return (await self.workers.advantages.credit(step)).batch


async def generator_answers_each_prompt_once(system: System) -> None:
    parts = await system.parts()
    assert [part.prompt_index for part in parts] == list(range(len(system.prompts)))
    for part in parts:
        batch = await system.open(part.rollouts)
        mine = slice(part.prompt_index, part.prompt_index + 1)
        assert batch.prompts.prompts == system.prompts.prompts[mine]
        assert batch.batch_id == system.prompts.batch_id
        assert batch.num_response_tokens == part.num_response_tokens
        groups = np.repeat(system.prompts.group_ids[mine], system.sampling.samples_per_prompt)
        assert batch.group_ids.tolist() == groups.tolist()


async def rollouts_hold_the_prompt_and_what_was_sampled(system: System) -> None:
    version = await system.sync()
    batch = await system.rollouts()
    prompts = dict(zip(system.prompts.group_ids.tolist(), system.prompts.prompts, strict=True))
    for row in range(len(batch)):
        start, end = batch.sequence_offsets[row : row + 2]
        prompt = prompts[int(batch.group_ids[row])].token_ids
        middle = start + len(prompt)
        assert batch.prompt_lengths[row] == len(prompt)
        assert batch.token_ids[start:middle].tolist() == list(prompt)
        assert not batch.response_mask[start:middle].any()
        assert batch.response_mask[middle:end].all()

    lengths = batch.response_lengths
    assert lengths.min() >= system.sampling.min_tokens
    assert lengths.max() <= system.sampling.max_tokens

    assert (batch.rollout_logprobs[batch.response_mask] <= 0).all()
    assert (batch.rollout_logprobs[~batch.response_mask] == 0).all()
    assert set(batch.oldest_weight_version) == set(batch.newest_weight_version) == {version}


async def equal_seeds_give_equal_responses(system: System) -> None:
    first, second = await system.rollouts(), await system.rollouts()
    np.testing.assert_array_equal(first.token_ids, second.token_ids)
    np.testing.assert_array_equal(first.rollout_logprobs, second.rollout_logprobs)

    other = await system.rollouts(replace(system.sampling, seed=system.sampling.seed + 1))
    assert first.token_ids.tolist() != other.token_ids.tolist()

    rows = [row.tolist() for row in np.split(first.token_ids, first.sequence_offsets[1:-1])]
    assert len({tuple(row) for row in rows[: system.sampling.samples_per_prompt]}) > 1, (
        "the samples of a group are all the same"
    )


async def greedy_does_not_depend_on_the_seed(system: System) -> None:
    greedy = replace(system.sampling, temperature=0.0, samples_per_prompt=1)
    first, second = await system.rollouts(greedy), await system.rollouts(replace(greedy, seed=99))
    np.testing.assert_array_equal(first.token_ids, second.token_ids)
    assert first.temperature == 1.0


async def scorer_keeps_the_order(system: System) -> None:
    """Score all parts at once: each answer has the batch id and the order of its responses."""
    parts = await system.parts()
    handles = [system.workers.scorer.score(part.rollouts) for part in parts]
    together: list[RewardBatch] = await asyncio.gather(*handles)
    for part, rewards in zip(parts, together, strict=True):
        rollouts = await system.open(part.rollouts)
        alone = await system.workers.scorer.score(part.rollouts)

        assert rewards.batch_id == rollouts.batch_id
        assert (
            len(rewards) == len(rollouts) == len(rewards.reasons) == len(rewards.extracted_answers)
        )
        assert all(len(component) == len(rollouts) for component in rewards.components.values())
        assert ((rewards.accuracies >= 0) & (rewards.accuracies <= 1)).all()
        np.testing.assert_array_equal(rewards.rewards, alone.rewards)


async def policy_agrees_with_the_engine(system: System) -> None:
    """Compare log-probabilities of policy and engine at the same weights.

    They agree again after each update, once the weights are synced.
    """
    workers = system.workers
    await system.sync()
    for _ in range(2):
        await workers.policy.update(await system.train_batch())
        version = await system.sync()

        parts = await system.parts()
        handles = [part.rollouts for part in parts]
        batch = RolloutBatch.concatenate([await system.open(handle) for handle in handles])
        assert set(batch.newest_weight_version) == {version}
        np.testing.assert_allclose(
            await system.logprobs(handles, batch), batch.rollout_logprobs, atol=system.tolerance
        )


async def reference_does_not_move(system: System) -> None:
    """Update the policy: its log-probabilities change, those of the reference do not."""
    reference = system.workers.reference
    assert reference is not None
    handles = [part.rollouts for part in await system.parts()]
    batch = RolloutBatch.concatenate([await system.open(handle) for handle in handles])

    async def read() -> NDArray[np.float32]:
        return LogprobBatch.scatter(
            [await system.open(part) for part in await reference.logprobs(handles)],
            batch.sequence_offsets,
        )

    before, policy = await read(), await system.logprobs(handles, batch)
    await system.workers.policy.update(await system.train_batch())
    np.testing.assert_array_equal(await read(), before)
    assert np.abs(await system.logprobs(handles, batch) - policy).max() > 0


async def credit_joins_the_parts(system: System, directory: Path) -> None:
    """Credit a step: advantages where tokens were sampled, log-probabilities in their rows.

    The metrics have their names, and the rollouts can be written to a file.
    """
    workers = system.workers
    assert workers.reference is not None
    handles = [part.rollouts for part in await system.parts()]
    rewards = [workers.scorer.score(handle) for handle in handles]
    old, ref = await asyncio.gather(
        workers.policy.logprobs(handles), workers.reference.logprobs(handles)
    )
    step = StepHandles(rollouts=handles, rewards=rewards, old=old, ref=ref)

    credited = await workers.advantages.credit(step)

    train: TrainBatch = await system.open(credited.batch)
    assert train.batch_id == system.prompts.batch_id
    assert (train.advantages[~train.rollouts.response_mask] == 0).all()
    np.testing.assert_array_equal(train.rollouts.prompts.group_ids, system.prompts.group_ids)

    expected = RewardBatch.concatenate([await reward for reward in rewards])
    np.testing.assert_array_equal(train.rewards.rewards, expected.rewards)
    assert train.old_logprobs is not None
    assert train.ref_logprobs is not None
    np.testing.assert_array_equal(
        train.old_logprobs, await system.logprobs(handles, train.rollouts)
    )

    metrics = values(credited.metrics)
    assert metrics["reward/mean"] == pytest.approx(float(expected.rewards.mean()))
    assert metrics["rollout/tokens"] == train.rollouts.num_response_tokens

    await workers.advantages.write_rollouts(credited.batch, directory / "step_000001.parquet")
    rows = read_rollouts(directory / "step_000001.parquet")
    assert [row["response"] for row in rows] == list(train.rollouts.response_texts)


async def dropped_parts_are_counted_and_written(system: System, directory: Path) -> None:
    """Drop the last prompt's responses: they count in metrics and file, not in the batch."""
    workers = system.workers
    handles = [part.rollouts for part in await system.parts()]
    rewards = [workers.scorer.score(handle) for handle in handles]
    step = StepHandles(
        rollouts=handles[:-1],
        rewards=rewards[:-1],
        dropped_rollouts=handles[-1:],
        dropped_rewards=rewards[-1:],
    )

    credited = await workers.advantages.credit(step)
    train: TrainBatch = await system.open(credited.batch)
    assert credited.dropped is not None
    dropped: ScoredBatch = await system.open(credited.dropped)

    everything = RewardBatch.concatenate([await reward for reward in rewards])
    assert len(train.rewards) + len(dropped) == len(everything)

    metrics = values(credited.metrics)
    assert metrics["reward/mean"] == pytest.approx(float(everything.rewards.mean()))
    assert metrics["rollout/responses"] == len(everything)
    assert metrics["trained/responses"] == len(train.rewards)

    path = directory / "step_000001.parquet"
    estimated = np.where(train.rollouts.response_mask, np.float32(0.5), np.float32(0))

    await workers.advantages.write_rollouts(
        credited.batch, path, dropped=credited.dropped, advantages=system.put(estimated)
    )

    rows = read_rollouts(path)
    assert [row["trained"] for row in rows] == [True] * len(train.rewards) + [False] * len(dropped)
    assert [row["advantages"] is None for row in rows] == [not row["trained"] for row in rows]
    assert {max(row["advantages"]) for row in rows if row["trained"]} == {0.5}


async def saved_policy_continues_as_if_nothing_had_happened(
    system: System, directory: Path
) -> None:
    """Save, update, load, and update on the same batch: the second update has the same result."""
    policy = system.workers.policy
    handles = [part.rollouts for part in await system.parts()]
    batch = RolloutBatch.concatenate([await system.open(handle) for handle in handles])

    train = await system.train_batch()
    await policy.update(train)  # so that the optimizer has a state

    await policy.save(directory)
    saved = await system.logprobs(handles, batch)

    await policy.update(train)
    updated = await system.logprobs(handles, batch)
    assert np.abs(updated - saved).max() > 0

    await policy.load(directory)
    np.testing.assert_array_equal(await system.logprobs(handles, batch), saved)
    await policy.update(train)
    np.testing.assert_allclose(await system.logprobs(handles, batch), updated, atol=1e-6)


async def critic_values_of(system: System, handles: list[Handle]) -> NDArray[np.float32]:
    """Return the values of the critic, [N]."""
    assert system.workers.critic is not None
    batch = RolloutBatch.concatenate([await system.open(handle) for handle in handles])
    ranks = await system.workers.critic.values(handles)
    return ValueBatch.scatter([await system.open(rank) for rank in ranks], batch.sequence_offsets)


async def batch_with_values(system: System, handles: list[Handle]) -> Handle:
    """Credit the parts, with the values of the critic."""
    workers = system.workers
    assert workers.critic is not None
    step = StepHandles(
        rollouts=handles,
        rewards=[workers.scorer.score(handle) for handle in handles],
        values=await workers.critic.values(handles),
    )
    return (await workers.advantages.credit(step)).batch


async def critic_approaches_its_targets(system: System) -> None:
    """Update it on one batch: the values come nearer to the returns, which came with them."""
    critic = system.workers.critic
    assert critic is not None
    handles = [part.rollouts for part in await system.parts()]
    before = await critic_values_of(system, handles)
    handle = await batch_with_values(system, handles)
    train: TrainBatch = await system.open(handle)
    mask = train.rollouts.response_mask
    assert train.returns is not None
    np.testing.assert_array_equal(train.values, before)
    assert not before[~mask].any()

    for _ in range(3):
        assert values(await critic.update(handle))["critic/updates"] >= 1
    after = await critic_values_of(system, handles)

    def error(found: NDArray[np.float32]) -> float:
        assert train.returns is not None
        return float(((found - train.returns)[mask] ** 2).mean())

    assert error(after) < error(before)


async def saved_critic_continues_as_if_nothing_had_happened(
    system: System, directory: Path
) -> None:
    """Save, update, load, and update on the same batch: the second update has the same result."""
    critic = system.workers.critic
    assert critic is not None
    handles = [part.rollouts for part in await system.parts()]
    train = await batch_with_values(system, handles)
    await critic.update(train)  # so that the optimizer has a state

    await critic.save(directory)
    saved = await critic_values_of(system, handles)
    await critic.update(train)
    updated = await critic_values_of(system, handles)
    assert np.abs(updated - saved).max() > 0

    await critic.load(directory)
    np.testing.assert_array_equal(await critic_values_of(system, handles), saved)
    await critic.update(train)
    np.testing.assert_allclose(await critic_values_of(system, handles), updated, atol=1e-6)


WITHOUT_FILES = (
    generator_answers_each_prompt_once,
    rollouts_hold_the_prompt_and_what_was_sampled,
    equal_seeds_give_equal_responses,
    greedy_does_not_depend_on_the_seed,
    scorer_keeps_the_order,
    policy_agrees_with_the_engine,
    reference_does_not_move,
    critic_approaches_its_targets,
)
WITH_FILES = (
    credit_joins_the_parts,
    dropped_parts_are_counted_and_written,
    saved_policy_continues_as_if_nothing_had_happened,
    saved_critic_continues_as_if_nothing_had_happened,
)
