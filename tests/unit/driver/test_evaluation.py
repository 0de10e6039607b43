"""The evaluator against responses whose correctness is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlsys.config import EvaluationConfig, GenerationConfig, RunConfig, TrainerConfig
from rlsys.driver.evaluation import EVALUATION_SEED, Evaluator
from rlsys.driver.ports import StepHandles
from rlsys.driver.sampling import Sampler
from rlsys.metrics import values as metric_values
from tests.support.in_process_fakes import (
    PROBLEMS,
    VOCABULARY,
    FirstTokenScorer,
    InProcessAdvantages,
    Stage,
    TableGenerator,
    held_out_prompts,
)


def make(
    samples: int,
    pass_at: tuple[int, ...],
    *,
    temperature: float = 1.0,
    scorer: type[FirstTokenScorer] = FirstTokenScorer,
) -> tuple[Stage, TableGenerator, Evaluator]:
    config = RunConfig(
        generation=GenerationConfig(
            temperature=0.7,
            top_k=5,
            top_p=0.9,
            min_tokens=0,
            max_tokens=2,
            stop=("</answer>",),
        ),
        trainer=TrainerConfig(
            evaluation=EvaluationConfig(
                samples_per_prompt=samples, pass_at=pass_at, temperature=temperature, every=1
            )
        ),
    )
    stage = Stage()
    generator = TableGenerator(stage, config)
    generator.logits = np.zeros_like(generator.logits)
    sampler = Sampler(config, generator, scorer(stage))
    return stage, generator, Evaluator(config, held_out_prompts(), sampler)


def teach(generator: TableGenerator, problems: range, logit: float) -> None:
    """Raise the logit of the right first token."""
    for problem in problems:
        generator.logits[problem, 0, (3 * problem + 1) % VOCABULARY] = logit


async def test_greedy_accuracy_counts_the_right_answers() -> None:
    """Four of six problems are known; the last has answer 0, the greedy token of equal logits."""
    _, generator, evaluator = make(1, (1,))
    teach(generator, range(4), 0.1)
    assert await evaluator.evaluate() == {
        "eval/accuracy": pytest.approx(5 / 6),
        "eval/response_length": 2.0,
    }
    (request,) = generator.requests
    assert (request.temperature, request.samples_per_prompt) == (0.0, 1)
    assert (request.top_k, request.top_p) == (0, 1.0)
    assert (request.max_tokens, request.stop, request.seed) == (2, ("</answer>",), EVALUATION_SEED)


async def test_sampled_metrics_follow_the_counts_of_each_problem() -> None:
    """Problems 0 to 2 are always right, 3 to 5 never.

    mean@8 = pass@1 = pass@8 = 1/2, in any order of the parts.
    """
    _, generator, evaluator = make(8, (1, 8), temperature=0.5)
    teach(generator, range(3), 50.0)
    teach(generator, range(3, PROBLEMS), -50.0)
    values = await evaluator.evaluate()
    for name in ("eval/mean@8", "eval/pass@1", "eval/pass@8"):
        assert values[name] == pytest.approx(0.5)
    greedy, sampled = generator.requests
    assert (greedy.temperature, sampled.temperature) == (0.0, 0.5)
    assert (sampled.samples_per_prompt, sampled.top_k, sampled.top_p) == (8, 5, 0.9)


async def test_pass_at_k_of_a_mixture() -> None:
    """At chance 1/8 the estimates must be near 1/8 and 1 - (7/8)^4.

    The standard errors with 6 x 512 samples are sqrt(7/64 / 3072) = 0.006, and 4 (7/8)^3 times
    that, 0.016. Five of each bound the error: a false alarm for fewer than one in a million seeds,
    and the seed is fixed.
    """
    _, _, evaluator = make(512, (1, 4))
    values = await evaluator.evaluate()
    assert values["eval/pass@1"] == pytest.approx(values["eval/mean@512"])
    assert values["eval/mean@512"] == pytest.approx(1 / 8, abs=0.03)
    assert values["eval/pass@4"] == pytest.approx(1 - (7 / 8) ** 4, abs=0.08)


async def test_right_means_the_same_in_training_and_in_evaluation() -> None:
    """A first reward function with values between 0 and 1: at least 0.5 is right, in both.

    The mean of the values, 0.4 here, is that of the rewards and not the accuracy.
    """

    class HalfScorer(FirstTokenScorer):
        async def _score(self, rollouts):
            rewards = await super()._score(rollouts)
            graded = np.where(np.arange(len(rewards)) % 2 == 0, 0.2, 0.6).astype(np.float32)
            return replace(rewards, rewards=graded, accuracies=graded)

    stage, generator, evaluator = make(8, (1,), scorer=HalfScorer)
    scorer = HalfScorer(stage)
    values = await evaluator.evaluate()
    assert values["eval/mean@8"] == 0.5

    config = RunConfig(
        generation=GenerationConfig(samples_per_prompt=8, min_tokens=0, max_tokens=2)
    )
    parts = [part async for part in generator.generate(held_out_prompts(), generator.requests[-1])]
    advantages = InProcessAdvantages(stage, config)
    rollouts = [part.rollouts for part in parts]
    rewards = [scorer.score(part) for part in rollouts]
    credited = await advantages.credit(StepHandles(rollouts=rollouts, rewards=rewards))
    trained = metric_values(credited.metrics)
    assert trained["reward/accuracy"] == 0.5
    assert trained["reward/mean"] == pytest.approx(0.4)


async def test_two_evaluations_of_one_policy_are_equal() -> None:
    _, _, evaluator = make(16, (1, 4))
    assert await evaluator.evaluate() == await evaluator.evaluate()


async def test_nothing_is_held_after_an_evaluation() -> None:
    """The evaluator can open rewards only, and keeps no handle."""
    stage, _, evaluator = make(4, (1,))
    await evaluator.evaluate()
    assert len(stage.handles) == 0
    assert stage.journal.count("score") == 2 * PROBLEMS


async def test_a_lost_prompt_is_detected() -> None:
    _, generator, evaluator = make(1, (1,))
    generate = generator.generate

    async def lossy(prompts, sampling):
        async for part in generate(prompts, sampling):
            if part.prompt_index:
                yield part

    generator.generate = lossy
    with pytest.raises(AssertionError, match="must answer each prompt once"):
        await evaluator.evaluate()
