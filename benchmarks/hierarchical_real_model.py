"""Variance of the true policy gradient under each baseline, on a language model.

The policy is 0 to 8 updates ahead of its sampler.

    python -m recipes.grpo_math --trainer.steps 12 --run.directory runs/warm
    python -m benchmarks.hierarchical_real_model --model runs/warm/checkpoints/step_000012

The results are in docs/hierarchical_log.md.

Real engine, real FSDP2 policy, in one process. For each of P prompts the sampler draws R groups of
G responses. The policy then makes updates of `recipes.hierarchical_math` on other samples of the
same sampler. After some of them the gradient of each group is taken, with respect to the last
layer's down projection, under every baseline:

    g_pr = 1/G sum_i sum_t W_it score_it
    V    = sum_p 1/(R-1) sum_r || g_pr - mean_r g_pr ||^2

V needs no assumption: it contains the covariance between responses, through their baselines, and
between positions. Each of the R replicates is a batch of its own for the estimator. The columns are

    variance ratio       V over that of the leave-one-out mean, with a jackknife error over prompts
    within groups        the same from the spread within groups, as `diagnostics.gradient` has it
    proxy                the same by the proxy
    between positions    the fraction of the second moment between different positions
    bias                 against the leave-one-out mean: R || mean difference ||^2 over the variance
                         of the difference, 1 if both have the same mean
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.hierarchical_variance import hierarchical, plain
from recipes.hierarchical_math import hierarchical_math
from rlsys.algorithms.advantages import AdvantageInputs
from rlsys.algorithms.advantages.hierarchical.diagnostics import effective_fraction
from rlsys.algorithms.gradient_variance import GroupMoments
from rlsys.config import RunConfig
from rlsys.config.command_line import evolve
from rlsys.config.hardware import detect_hardware
from rlsys.data.batches import (
    PromptBatch,
    RewardBatch,
    RolloutBatch,
    SamplingParameters,
    ScoredBatch,
)
from rlsys.data.padding import ResponsePadding
from rlsys.data.prompt_stream import load_prompts
from rlsys.data.prompt_templates import stop_strings
from rlsys.models import resolve_model
from rlsys.models.loading import load_tokenizer
from rlsys.rewards import RewardInput
from rlsys.rewards.scoring import run_functions
from rlsys.run.compute_dtype import choose_dtypes
from workers.generation.engines import make_engine
from workers.generation.engines.engine import RolloutEngine
from workers.generation.worker import build_rollouts
from workers.training.gradient_diagnostics import scores_of_responses
from workers.training.policy import PolicyWorker

HORIZONS = ("final", "current", "current_and_final", "blocks")
BASELINES = ("leave_one_out", "none", "group_mean", "opo", "optimal_token")
METHODS = {name: plain(name) for name in BASELINES} | {
    name: hierarchical(name) for name in HORIZONS
}


@dataclass(frozen=True)
class Scored:
    """Responses of one sampler with their rewards."""

    rollouts: RolloutBatch
    rewards: RewardBatch


def sample_all(
    config: RunConfig, model: str, batches: Sequence[PromptBatch], sizes: Sequence[int]
) -> list[Scored]:
    """Sample one group for each entry of each batch; a group has the size of its batch."""
    engine = make_engine(config, model)
    return [
        sample(engine, config, *each, seed)
        for seed, each in enumerate(zip(batches, sizes, strict=True))
    ]


def sample(
    engine: RolloutEngine, config: RunConfig, prompts: PromptBatch, size: int, seed: int
) -> Scored:
    """Sample one group of `size` responses for each entry of `prompts`."""
    generation = config.generation
    sampling = SamplingParameters(
        samples_per_prompt=size,
        temperature=generation.temperature,
        min_tokens=generation.min_tokens,
        max_tokens=generation.max_tokens,
        stop=stop_strings(config.data.template, generation.stop),
        seed=seed,
    )
    groups = [
        group
        for some in engine.generate(prompts.prompts, range(len(prompts)), sampling)
        for group in some
    ]
    rollouts = build_rollouts(prompts, sorted(groups, key=lambda group: group.index), sampling, 0)

    truths = {
        int(group): prompt.ground_truth
        for group, prompt in zip(prompts.group_ids, prompts.prompts, strict=True)
    }
    scores = [
        run_functions(
            config.reward.functions,
            RewardInput(completion=text, ground_truth=truths[int(group)]),
        )
        for text, group in zip(rollouts.response_texts, rollouts.group_ids, strict=True)
    ]
    rewards = np.asarray([score.components[0] for score in scores], dtype=np.float32)
    return Scored(
        rollouts,
        RewardBatch(
            batch_id=rollouts.batch_id,
            rewards=rewards,
            accuracies=rewards,
            components={"math": rewards},
            reasons=tuple(score.reason for score in scores),
            extracted_answers=tuple(score.answer for score in scores),
        ),
    )


def weights_of(inputs: AdvantageInputs, replicates: int) -> Tensor:
    """Return [M, B, T] policy-gradient weights of each token under each method.

    Replicates lie one after the other.
    """
    names = (
        "rewards",
        "response_mask",
        "group_ids",
        "rollout_logprobs",
        "old_logprobs",
        "squared_score_norms",
    )

    def part(k: int) -> AdvantageInputs:
        arrays: dict[str, Any] = {
            name: getattr(inputs, name).chunk(replicates)[k] for name in names
        }
        return AdvantageInputs(**arrays)

    parts = [part(k) for k in range(replicates)]
    return torch.stack([torch.cat([method(each) for each in parts]) for method in METHODS.values()])


@dataclass(frozen=True)
class PromptMoments:
    """Moments of the R groups of one prompt, for each of M methods; all [M]."""

    between: Tensor  # 1/(R-1) sum_r || g_r - mean ||^2
    within: Tensor  # the same from the responses of each group, as `diagnostics.gradient` has it
    squares: Tensor
    same_position: Tensor
    proxy: Tensor
    shift: Tensor  # R || mean difference to the first method ||^2
    shift_variance: Tensor


def prompt_moments(groups: list[GroupMoments], size: int) -> PromptMoments:
    """Return the moments of one prompt from those of its groups of `size` responses."""
    count = len(groups)
    spread = torch.stack([group.spread(size) for group in groups]).double().sum(0)
    gradients = torch.stack([group.gradient for group in groups]) / size  # [R, M, d, f]
    difference = gradients - gradients[:, :1]

    def about_mean(values: Tensor) -> tuple[Tensor, Tensor]:
        middle = values.mean(0)
        variance = (values - middle).square().sum((0, 2, 3)).double() / (count - 1)
        return variance, count * middle.square().sum((1, 2)).double()

    between, _ = about_mean(gradients)
    shift_variance, shift = about_mean(difference)
    return PromptMoments(
        between,
        spread[0] / (count * size**2),
        *spread[1:],
        shift=shift,
        shift_variance=shift_variance,
    )


class Experiment:
    """A sampler, its samples under examination, and a policy that moves on."""

    def __init__(self, config: RunConfig, prompts: int, replicates: int, size: int) -> None:
        self.config = config
        self.prompts = prompts
        self.replicates = replicates
        self.size = size

        model = str(resolve_model(config.model.path))
        stream = load_prompts(config, load_tokenizer(model)).train
        examined = stream.next_batch().prompts[:prompts]
        trained_on = stream.next_batch()
        repeated = PromptBatch(
            batch_id=0, prompts=examined * replicates, group_ids=np.arange(prompts * replicates)
        )

        # The engine in a process of its own: it would join a process group in this one.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            sizes = (size, config.generation.samples_per_prompt)
            batches = (repeated, trained_on)
            future = process.submit(sample_all, config, model, batches, sizes)
            self.examined, self.trained_on = future.result()

        self.policy = PolicyWorker(config, model, 0, 1)
        self.policy.setup(self.policy.rendezvous())
        self.updates = 0

    def update(self) -> None:
        """Make one update, on the next two groups."""
        rollouts, rewards = self.trained_on.rollouts, self.trained_on.rewards
        chosen = np.unique(rollouts.group_ids)[2 * self.updates : 2 * self.updates + 2]
        rows = np.flatnonzero(np.isin(rollouts.group_ids, chosen))
        self.policy.update_on(ScoredBatch(rollouts=rollouts, rewards=rewards), rows, rows)
        self.updates += 1

    def inputs(self) -> AdvantageInputs:
        """Return the estimators' inputs: the examined responses under the current policy."""
        rollouts = self.examined.rollouts
        padding = ResponsePadding.of(rollouts.sequences)
        live = self.policy.live(rollouts, self.policy.packs_of(rollouts, np.arange(len(rollouts))))
        return AdvantageInputs(
            rewards=torch.from_numpy(self.examined.rewards.rewards),
            response_mask=padding.pad(rollouts.response_mask),
            group_ids=torch.from_numpy(rollouts.group_ids),
            rollout_logprobs=padding.pad(rollouts.rollout_logprobs),
            old_logprobs=padding.pad(live.logprobs),
            squared_score_norms=padding.pad(live.squared_score_norms),
        )

    def moments(self, weights: Tensor) -> list[PromptMoments]:
        """Return the moments of each prompt."""
        found = []
        for prompt in range(self.prompts):
            groups = [
                self._group(weights, replicate * self.prompts + prompt)
                for replicate in range(self.replicates)
            ]
            found.append(prompt_moments(groups, self.size))
        return found

    def _group(self, weights: Tensor, number: int) -> GroupMoments:
        rollouts = self.examined.rollouts
        rows = np.arange(number * self.size, (number + 1) * self.size)
        packs = self.policy.packs_of(rollouts, rows, may_share=False)
        backend = self.policy.backend

        parts: list[GroupMoments] = []
        for scores in scores_of_responses(
            backend.module, packs, rollouts.temperature, backend.device
        ):
            positions = torch.from_numpy(scores.positions)
            parts.append(scores.moments(weights[:, scores.row, positions].float()))
        return sum(parts[1:], start=parts[0])


def jackknife(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return [M] ratios of the variances' sums to the first method's, and [M] errors.

    Shapes:
        values: [P, M] variances by prompt.
    """
    ratio = values.sum(0) / values[:, 0].sum()
    left_out = (values.sum(0) - values) / (values[:, :1].sum(0) - values[:, :1])
    count = len(values)
    return ratio, ((count - 1) / count * (left_out - ratio).square().sum(0)).sqrt()


def report(ahead: int, inputs: AdvantageInputs, moments: list[PromptMoments]) -> None:
    """Print the rows of one number of updates."""
    assert inputs.old_logprobs is not None
    assert inputs.rollout_logprobs is not None
    differences = inputs.old_logprobs - inputs.rollout_logprobs
    ratios = torch.where(inputs.response_mask, differences, 0.0).double().cumsum(1).exp()
    fraction = effective_fraction(ratios[:, None, -1:], inputs.response_mask[:, None, :1])
    ratio, error = jackknife(torch.stack([each.between for each in moments]))

    def summed(name: str) -> Tensor:
        return torch.stack([getattr(each, name) for each in moments]).sum(0)

    within = summed("within") / summed("within")[0]
    proxy = summed("proxy") / summed("proxy")[0]
    cross = 1 - summed("same_position") / summed("squares")
    bias = summed("shift") / summed("shift_variance").clamp(min=1e-30)
    for k, name in enumerate(METHODS):
        cells = [
            f"{ahead}",
            f"{float(fraction):.2f}",
            name,
            f"{ratio[k]:.3f} ± {error[k]:.3f}",
            f"{within[k]:.3f}",
            f"{proxy[k]:.3f}",
            f"{cross[k]:+.2f}",
            "" if k == 0 else f"{bias[k]:.2f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measure after each requested number of updates."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="smollm2-135m",
        help="anything that --model.path takes; a policy that is right now and then",
    )
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--replicates", type=int, default=4)
    parser.add_argument("--size", type=int, default=16, help="responses of a group")
    parser.add_argument(
        "--ahead",
        type=int,
        nargs="+",
        default=[0, 1, 2, 4, 8],
        help="updates after which gradients are measured",
    )
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="FIELD=VALUE",
        help="further fields of the configuration",
    )
    arguments = parser.parse_args()

    # A policy worker uses as many threads as this variable says.
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    config = evolve(
        hierarchical_math(detect_hardware()),
        {
            "model.path": arguments.model,
            "trainer.prompts_per_step": max(arguments.prompts, 2 * max(arguments.ahead)),
            **dict(item.split("=", 1) for item in arguments.set),
        },
    )
    config = choose_dtypes(config, detect_hardware(), resolve_model(config.model.path)).config

    experiment = Experiment(config, arguments.prompts, arguments.replicates, arguments.size)
    rewards = experiment.examined.rewards.rewards
    groups = np.split(rewards, arguments.prompts * arguments.replicates)
    mixed = np.mean([0 < group.mean() < 1 for group in groups])
    print(
        f"{len(rewards)} responses, mean reward {rewards.mean():.3f},"
        f" {mixed:.0%} of the groups with both rewards\n"
    )

    names = (
        "ahead",
        "effective fraction",
        "baseline",
        "variance ratio",
        "within groups",
        "proxy",
        "between positions",
        "bias",
    )
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for ahead in sorted(arguments.ahead):
        while experiment.updates < ahead:
            experiment.update()
        inputs = experiment.inputs()
        report(ahead, inputs, experiment.moments(weights_of(inputs, arguments.replicates)))
    experiment.policy.shutdown()


if __name__ == "__main__":
    main()
