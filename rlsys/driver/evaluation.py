"""Held-out evaluation: greedy accuracy, mean@k, pass@k."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlsys.config import RunConfig
from rlsys.data.batches import PromptBatch, RewardBatch, SamplingParameters
from rlsys.driver.ports import Generator, RewardScorer
from rlsys.run.reward_failures import RewardFailureWatch, failure_counts

EVALUATION_SEED = (
    20240401  # always the same, so that evaluations of one run differ by the policy alone
)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k samples is right.

        pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{i=n-c+1..n} (1 - k / i)

    Source: Chen et al. 2021, Evaluating Large Language Models Trained on Code, section 2.1 (arXiv:2107.03374).

    Example: n = 4, c = 2, k = 2: 1 - C(2, 2) / C(4, 2) = 5/6.

    Raises:
        ValueError: k > samples, or correct > samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(
            f"pass@k needs 1 <= k <= samples and 0 <= correct <= samples, not k={k}, samples={samples}, correct={correct}"
        )
    if samples - correct < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(samples - correct + 1, samples + 1)))


@dataclass(frozen=True, kw_only=True)
class _Sampled:
    """Responses to the held-out prompts."""

    correct: NDArray[np.int64]  # [P] right responses of each prompt
    tokens: int  # sampled in all
    rewards: Sequence[RewardBatch]


class Evaluator:
    """Runs the held-out prompts through the same generation group and reward worker as training."""

    def __init__(
        self,
        config: RunConfig,
        prompts: PromptBatch,
        generator: Generator,
        scorer: RewardScorer,
        stop: tuple[str, ...],
        reward_failures: RewardFailureWatch | None = None,
    ) -> None:
        self._reward_failures = reward_failures or RewardFailureWatch()
        self._config = config
        self._prompts = prompts
        self._generator = generator
        self._scorer = scorer
        self._stop = stop

    async def evaluate(self) -> dict[str, float]:
        """Metrics `eval/accuracy` (greedy), `eval/response_length`, and with samples `eval/mean@k` and each `eval/pass@k`; where rewards failed
        `eval/timeouts`, `eval/crashes` and `eval/errors`. A response is right or wrong as in training: `RewardBatch.correct`.
        """
        settings = self._config.trainer.evaluation
        greedy = await self._sample(samples=1, temperature=0.0)
        parts = greedy.rewards
        values = {
            "eval/accuracy": float(greedy.correct.mean()),
            "eval/response_length": greedy.tokens / len(self._prompts),
        }
        samples = settings.samples_per_prompt
        if samples > 1:
            sampled = await self._sample(samples=samples, temperature=settings.temperature)
            counts, parts = sampled.correct, [*parts, *sampled.rewards]
            values[f"eval/mean@{samples}"] = float(counts.mean()) / samples
            for k in settings.pass_at:
                values[f"eval/pass@{k}"] = float(
                    np.mean([pass_at_k(samples, int(count), k) for count in counts])
                )
        return values | {f"eval/{name}": float(n) for name, n in failure_counts(parts).items() if n}

    async def _sample(self, *, samples: int, temperature: float) -> _Sampled:
        """So many responses to each prompt, scored."""
        generation = self._config.generation
        sampling = SamplingParameters(
            samples_per_prompt=samples,
            temperature=temperature,
            top_p=generation.top_p if temperature else 1.0,
            top_k=generation.top_k if temperature else 0,
            min_tokens=generation.min_tokens,
            max_tokens=generation.max_tokens,
            stop=self._stop,
            seed=EVALUATION_SEED,
        )
        indices, scores, tokens = [], [], 0
        async for part in self._generator.generate(self._prompts, sampling):
            indices.append(part.prompt_index)
            scores.append(self._scorer.score(part.rollouts))
            tokens += part.num_response_tokens
        assert sorted(indices) == list(range(len(self._prompts))), (
            "the generation group must answer each prompt once"
        )
        rewards: Sequence[RewardBatch] = await asyncio.gather(*scores)
        self._reward_failures.check(rewards, "evaluation")
        counts = np.zeros(len(self._prompts), dtype=np.int64)
        for index, batch in zip(indices, rewards, strict=True):
            counts[index] = batch.correct.sum()
        return _Sampled(correct=counts, tokens=tokens, rewards=rewards)
