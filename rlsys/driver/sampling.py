"""Sampling of responses with their rewards, for every loop that generates.

    prompts ---> generation group ---group by group---> reward worker

A group goes to the reward worker as soon as it is complete, so rewards are computed while the
engines continue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlsys.config import RunConfig
from rlsys.data.batches import PromptBatch, RewardBatch, SamplingParameters
from rlsys.data.prompt_templates import stop_strings
from rlsys.driver.dynamic_sampling import keeps_group
from rlsys.driver.ports import Generator, Handle, PromptSource, RewardScorer, RolloutPart
from rlsys.metrics import Metric, MetricMap, total
from rlsys.run.required_inputs import required_inputs
from rlsys.run.reward_failures import RewardFailureWatch


@dataclass(frozen=True, kw_only=True)
class ScoredGroup:
    """The responses to one prompt, with their rewards."""

    part: RolloutPart
    rewards: Handle[RewardBatch]
    greedy: ScoredGroup | None = None  # one greedy response, where the estimator compares with it


@dataclass(frozen=True, kw_only=True)
class SampledGroups:
    """Everything that was sampled for one step."""

    kept: Sequence[ScoredGroup]
    dropped: Sequence[ScoredGroup] = ()  # by dynamic sampling
    metrics: MetricMap  # of the sampling itself


def sampling_parameters(
    config: RunConfig,
    *,
    samples: int,
    temperature: float,
    seed: int,
    stop: tuple[str, ...] | None = None,
) -> SamplingParameters:
    """Return the parameters of sampling; at temperature 0 it is greedy, without top_p and top_k.

    Args:
        stop: strings that end a response; None: those of the configuration, which may mean that
            the file of the prompt template is read.
    """
    generation = config.generation
    greedy = temperature == 0
    return SamplingParameters(
        samples_per_prompt=samples,
        temperature=temperature,
        top_p=1.0 if greedy else generation.top_p,
        top_k=0 if greedy else generation.top_k,
        min_tokens=generation.min_tokens,
        max_tokens=generation.max_tokens,
        stop=stop_strings(config.data.template, generation.stop) if stop is None else stop,
        seed=seed,
    )


def batch_seed(run_seed: int, batch_id: int, round_number: int = 0) -> int:
    """Return the seed of one batch of prompts.

    It depends on the run's seed and the batch alone, so that a resumed run samples the same
    responses as an uninterrupted one.
    """
    entropy = [run_seed, batch_id]
    if round_number:
        entropy.append(round_number)
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


class Sampler:
    """The source of groups of responses with rewards. Training and evaluation share one."""

    def __init__(
        self,
        config: RunConfig,
        generator: Generator,
        scorer: RewardScorer,
        notify: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Create a sampler; `notify` shows the user the first failure of each reward function."""
        self._config = config
        self._generator = generator
        self._scorer = scorer
        self._reward_failures = RewardFailureWatch(notify)
        # Read once: a call of a worker takes microseconds and the template milliseconds, and a run
        # must not change where somebody edits the file.
        self._stop = stop_strings(config.data.template, config.generation.stop)
        self._compares_with_greedy = "greedy_rewards" in required_inputs(config)

    async def sample(self, prompts: PromptBatch, sampling: SamplingParameters) -> list[ScoredGroup]:
        """Return one group per prompt, in prompt order; their rewards may still be pending."""
        groups: dict[int, ScoredGroup] = {}
        async for part in self._generator.generate(prompts, sampling):
            groups[part.prompt_index] = self.scored(part)

        # A generation group that lost a prompt would silently bias the update.
        assert sorted(groups) == list(range(len(prompts))), (
            "the generation group must answer each prompt once"
        )
        return [groups[index] for index in sorted(groups)]

    def scored(self, part: RolloutPart) -> ScoredGroup:
        """Start computing the rewards of a finished group."""
        return ScoredGroup(part=part, rewards=self._scorer.score(part.rollouts))

    def keeps(self, rewards: RewardBatch) -> bool:
        """Return whether a group with these rewards may be trained; with dynamic sampling."""
        dynamic = self._config.algorithm.dynamic_sampling
        return dynamic.max_rounds == 1 or keeps_group(rewards, dynamic.by)

    def parameters(self, *, samples: int, temperature: float, seed: int) -> SamplingParameters:
        """See `sampling_parameters`."""
        return sampling_parameters(
            self._config, samples=samples, temperature=temperature, seed=seed, stop=self._stop
        )

    def training_parameters(self, batch_id: int, round_number: int = 0) -> SamplingParameters:
        """Return the parameters with which the prompts of a batch of the stream are sampled."""
        generation = self._config.generation
        return self.parameters(
            samples=generation.samples_per_prompt,
            temperature=generation.temperature,
            seed=batch_seed(self._config.trainer.seed, batch_id, round_number),
        )

    async def rewards(self, groups: Sequence[ScoredGroup], occasion: str) -> list[RewardBatch]:
        """Wait for the rewards of `groups`; they are small records, a few numbers per response.

        Raises:
            RewardFailureError: a function failed on more than half of the first batch of this
                `occasion`, which is "training" or "evaluation".
        """
        scored = await asyncio.gather(*(group.rewards for group in groups))
        self._reward_failures.check(scored, occasion)
        return scored

    async def sample_step(self, stream: PromptSource) -> SampledGroups:
        """Sample the groups of one training step, in prompt order.

        With `algorithm.dynamic_sampling`, groups without a learning signal are replaced by those of
        further prompts. After the last allowed round such groups fill the rest of the batch, so
        that it always has its size.
        """
        prompts = stream.next_batch()
        if self._config.algorithm.dynamic_sampling.max_rounds > 1:
            return await self._sample_dynamically(prompts, stream)
        groups = await self._sample_round(prompts, round_number=0)
        return SampledGroups(kept=groups, metrics=_greedy_tokens(groups))

    async def _sample_dynamically(
        self, prompts: PromptBatch, stream: PromptSource
    ) -> SampledGroups:
        """Sample rounds of groups until dynamic sampling keeps enough of them."""
        dynamic = self._config.algorithm.dynamic_sampling
        wanted = self._config.trainer.prompts_per_step
        batch_id = prompts.batch_id
        useful: list[ScoredGroup] = []
        equal: list[ScoredGroup] = []
        rounds = 0
        while len(useful) < wanted and rounds < dynamic.max_rounds:
            if rounds:  # the later rounds belong to the batch of the first
                prompts = replace(stream.next_batch(), batch_id=batch_id)
            groups = await self._sample_round(prompts, round_number=rounds)
            scored = await self.rewards(groups, "training")
            for group, rewards in zip(groups, scored, strict=True):
                if keeps_group(rewards, dynamic.by):
                    useful.append(group)
                else:
                    equal.append(group)
            rounds += 1

        groups = useful + equal
        counts = {
            "sampling/rounds": total(rounds),
            "sampling/replaced_groups": total(min(len(equal), len(groups) - wanted)),
            "sampling/surplus_groups": total(max(0, len(useful) - wanted)),
            "sampling/missing_groups": total(max(0, wanted - len(useful))),
        }
        return SampledGroups(
            kept=groups[:wanted],
            dropped=groups[wanted:],
            metrics=counts | _greedy_tokens(groups),
        )

    async def _sample_round(self, prompts: PromptBatch, round_number: int) -> list[ScoredGroup]:
        """Sample one group per prompt, with a greedy response each where the estimator reads it."""
        sampling = self.training_parameters(prompts.batch_id, round_number)
        groups = await self.sample(prompts, sampling)
        if not self._compares_with_greedy:
            return groups

        one_greedy = self.parameters(samples=1, temperature=0.0, seed=sampling.seed)
        greedy = await self.sample(prompts, one_greedy)
        return [replace(group, greedy=own) for group, own in zip(groups, greedy, strict=True)]


def _greedy_tokens(groups: Sequence[ScoredGroup]) -> dict[str, Metric]:
    """Count the tokens of the greedy responses, where an estimator compares with them."""
    greedy = [group.greedy for group in groups if group.greedy is not None]
    if not greedy:
        return {}
    tokens = sum(group.part.num_response_tokens for group in greedy)
    return {"rollout/greedy_tokens": total(tokens)}
