"""Held-out evaluation: greedy accuracy, mean@k, pass@k, and the loss of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlsys.config import RunConfig
from rlsys.data.batches import PromptBatch, RewardBatch
from rlsys.data.example_stream import ExampleBatch
from rlsys.driver.ports import Workers
from rlsys.driver.sampling import Sampler
from rlsys.evaluation.estimators import pass_at_k
from rlsys.metrics import values
from rlsys.rewards import has_accuracy, reward_model_of
from rlsys.run.reward_failures import failure_counts

# Always the same, so that evaluations of one run differ by the policy alone.
EVALUATION_SEED = 20240401


@dataclass(frozen=True, kw_only=True)
class _Sampled:
    """Responses to the held-out prompts."""

    correct: NDArray[np.int64]  # [P] right responses of each prompt
    tokens: int  # sampled in all
    rewards: Sequence[RewardBatch]


class Evaluator:
    """Evaluation of held-out prompts by the generation group and the reward worker of training."""

    def __init__(self, config: RunConfig, prompts: PromptBatch, sampler: Sampler) -> None:
        self._config = config
        self._prompts = prompts
        self._sampler = sampler

    async def evaluate(self) -> dict[str, float]:
        """Return the metrics of the current weights.

        These are `eval/accuracy` (greedy), `eval/response_length`, and with samples `eval/mean@k`
        and each `eval/pass@k`; where rewards failed also `eval/timeouts`, `eval/crashes` and
        `eval/errors`. A response is right or wrong as in training: `RewardBatch.correct`.

        Where a reward is a model, the mean rewards of the greedy responses are added. Where it is
        the first one, no response is right or wrong, and nothing is sampled.
        """
        settings, functions = self._config.trainer.evaluation, self._config.reward.functions
        judges = has_accuracy(functions)
        greedy = await self._sample(samples=1, temperature=0.0)
        rewards = [*greedy.rewards]
        found = {"eval/accuracy": float(greedy.correct.mean())} if judges else {}
        found["eval/response_length"] = greedy.tokens / len(self._prompts)
        if reward_model_of(functions) is not None:
            found |= _mean_rewards(greedy.rewards)

        samples = settings.samples_per_prompt
        if samples > 1 and judges:
            sampled = await self._sample(samples=samples, temperature=settings.temperature)
            rewards += sampled.rewards
            counts = sampled.correct
            found[f"eval/mean@{samples}"] = float(counts.mean()) / samples
            for k in settings.pass_at:
                chances = [pass_at_k(samples, int(count), k) for count in counts]
                found[f"eval/pass@{k}"] = float(np.mean(chances))

        failures = {f"eval/{name}": float(n) for name, n in failure_counts(rewards).items() if n}
        return found | failures

    async def _sample(self, *, samples: int, temperature: float) -> _Sampled:
        """Sample `samples` responses to each prompt, with their rewards."""
        sampling = self._sampler.parameters(
            samples=samples, temperature=temperature, seed=EVALUATION_SEED
        )
        groups = await self._sampler.sample(self._prompts, sampling)
        rewards = await self._sampler.rewards(groups, "evaluation")
        return _Sampled(
            correct=np.array([batch.correct.sum() for batch in rewards], dtype=np.int64),
            tokens=sum(group.part.num_response_tokens for group in groups),
            rewards=rewards,
        )


def _mean_rewards(batches: Sequence[RewardBatch]) -> dict[str, float]:
    """Return `eval/reward`, each `eval/component/<function>` and `eval/step_mean/<function>`.

    What is missing does not count, and a mean without any value is left out.
    """
    whole = RewardBatch.concatenate(batches)
    columns = {"reward": whole.rewards}
    columns |= {f"component/{name}": column for name, column in whole.components.items()}
    columns |= {f"step_mean/{name}": steps.rewards for name, steps in whole.step_rewards.items()}
    return {
        f"eval/{name}": float(np.nanmean(column))
        for name, column in columns.items()
        if not np.isnan(column).all()
    }


class TextEvaluator:
    """Evaluation of the loss of held-out text, beside that of held-out prompts."""

    def __init__(
        self, workers: Workers, held_out: ExampleBatch, prompts: Evaluator | None = None
    ) -> None:
        """Create an evaluator; `prompts` evaluates held-out prompts, None: there are none."""
        self._workers = workers
        self._held_out = held_out
        self._prompts = prompts

    async def evaluate(self) -> dict[str, float]:
        """Return `eval/text_loss`, and the metrics of `Evaluator`."""
        assert self._workers.put is not None, "workers of a run with texts can store them"
        texts = self._workers.put(self._held_out)
        report = values(await self._workers.policy.text_loss(texts))
        if self._prompts is None:
            return report
        return await self._prompts.evaluate() | report
