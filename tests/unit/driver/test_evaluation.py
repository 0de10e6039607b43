"""pass@k against its definition, and the evaluator against responses whose correctness is known."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from math import comb

import numpy as np
import pytest

from rlsys.config import EvaluationConfig, GenerationConfig, RunConfig, TrainerConfig
from rlsys.driver.evaluation import EVALUATION_SEED, Evaluator, pass_at_k
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


def test_pass_at_k_golden() -> None:
    """Two cases by hand.

    n = 4, c = 2, k = 2: of the 6 pairs one has no right sample, so 5/6.
    n = 5, c = 1, k = 3: 6 of 10 triples hold the right one.
    """
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)
    assert pass_at_k(5, 1, 3) == pytest.approx(6 / 10)
    assert pass_at_k(4, 0, 4) == 0.0
    assert pass_at_k(4, 1, 4) == 1.0


def test_pass_at_k_is_the_fraction_of_subsets_with_a_right_one() -> None:
    """The definition itself, by enumeration, for every n up to 7."""
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations(range(n), k))
                fraction = sum(min(subset) < c for subset in subsets) / len(subsets)
                assert pass_at_k(n, c, k) == pytest.approx(fraction, abs=1e-12), (n, c, k)


def test_pass_at_k_is_stable_for_many_samples() -> None:
    """C(10000, 100) overflows a float; exact integers give the reference."""
    exact = 1 - comb(9993, 100) / comb(10000, 100)
    assert pass_at_k(10_000, 7, 100) == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 5), (4, 5, 1), (4, -1, 1), (4, 2, 0)])
def test_pass_at_k_refuses_impossible_counts(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k}, samples={n}, correct={c}"):
        pass_at_k(n, c, k)


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
