"""GRPO in one process, of the parts that a run has in its actors.

    engine.generate -> rewards -> advantages -> FSDP2 update -> weights -> engine.install_weights
          ^                                                                       |
          +-----------------------------------------------------------------------+

Left out: Ray, the driver, checkpoints, data files. The check `grpo_recipe` has them all.

The model has random weights and 0.1 M parameters. The reward of a response is the share of digits
in it, which a policy that learns raises from a tenth to more than half in 20 steps.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.gpu_check.attention import synchronize
from benchmarks.gpu_check.catalogue import Place
from benchmarks.gpu_check.digits import digit_share
from benchmarks.gpu_check.examples import packs_of
from benchmarks.gpu_check.policy import Optimizer, Role, backend_of, join, packed
from benchmarks.gpu_check.results import Figure, Finding, at_least, within
from benchmarks.gpu_check.update import sizes_of
from benchmarks.gpu_check.weight_sync import transformers_engine
from rlsys.algorithms.advantages import AdvantageInputs, get_advantage_estimator
from rlsys.algorithms.loss_aggregation import aggregate_loss
from rlsys.algorithms.policy_objectives import PolicyObjectiveInputs, policy_objective
from rlsys.data.batches import Prompt, PromptBatch, RolloutBatch, SamplingParameters
from rlsys.models.loading import load_causal_lm, load_tokenizer
from rlsys.models.tiny import build_tiny_model
from rlsys.models.weights import pack_weights, unpack_weights
from workers.generation.engines.engine import RolloutEngine
from workers.generation.worker import build_rollouts
from workers.training.backends.fsdp2 import FSDP2Backend
from workers.training.losses import Denominators, PackColumns, PackLoss, backward_passes
from workers.training.packed_model import PackResult

QUESTIONS = ("How many are left?", "What is the answer?", "How old is Tom?", "Count to nine.")
SAMPLES = 16
MAX_TOKENS = 12
STEPS = 20
COMPARED = 3  # first and last steps whose rewards are compared
LEAST_RISE = 0.3  # of the mean reward
SETTINGS = Optimizer(learning_rate=5e-3)


@dataclass(frozen=True, kw_only=True)
class GrpoLoss:
    """The clipped objective with the mean over tokens, on policy; a `TokenLoss`."""

    rollouts: RolloutBatch
    advantages: NDArray[np.float32]  # [N] 0 outside the mask

    def __call__(self, result: PackResult, columns: PackColumns, sizes: Denominators) -> PackLoss:
        """Return the loss of a pack."""
        mask = columns.mask()
        logprobs = columns.pad(result.logprobs)
        objective = policy_objective(
            PolicyObjectiveInputs(
                logprobs=logprobs,
                old_logprobs=logprobs.detach(),
                advantages=columns.pad(columns.take(self.advantages)),
                response_mask=mask,
            ),
            ratio="token",
            weight="ppo_clip",
        )
        loss = aggregate_loss(
            objective.token_losses, mask, "token_mean", num_tokens=sizes.num_tokens
        )
        rollout = columns.take(self.rollouts.rollout_logprobs)
        difference = (rollout - result.logprobs.detach()).abs().sum()
        return PackLoss(loss=loss, sums={"difference": float(difference)}, maxima={})


def advantages_of(rollouts: RolloutBatch, rewards: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return [N] the advantages of GRPO at the sampled tokens, 0 elsewhere."""
    lengths = torch.from_numpy(rollouts.response_lengths)
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    found = get_advantage_estimator("grpo")(
        AdvantageInputs(
            rewards=torch.from_numpy(rewards),
            response_mask=mask,
            group_ids=torch.from_numpy(rollouts.group_ids),
        )
    )
    flat = np.zeros(len(rollouts.token_ids), dtype=np.float32)
    flat[rollouts.response_mask] = found.advantages[mask].numpy()
    return flat


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is measured in one step."""

    reward: float  # mean
    difference: float  # mean |rollout - trainer| of a log-probability, in nats
    seconds: float


def step(number: int, prompts: PromptBatch, engine: RolloutEngine, backend: FSDP2Backend) -> Step:
    """Sample, update once, and give the engine the new weights."""
    began = time.perf_counter()
    sampling = SamplingParameters(
        samples_per_prompt=SAMPLES, temperature=1.0, max_tokens=MAX_TOKENS, seed=number
    )
    positions = range(len(prompts))
    groups = [
        group for some in engine.generate(prompts.prompts, positions, sampling) for group in some
    ]
    rollouts = build_rollouts(prompts, groups, sampling, number)
    rewards = np.array([digit_share(text) for text in rollouts.response_texts], dtype=np.float32)

    packs = packs_of(rollouts.sequences, budget=4096, shares=True)
    loss = GrpoLoss(rollouts=rollouts, advantages=advantages_of(rollouts, rewards))
    passes = backward_passes(backend, packs, loss, sizes_of(packs))
    difference = sum(pack_loss.sums["difference"] for _, _, pack_loss in passes)
    backend.step(SETTINGS.learning_rate)

    stored = pack_weights(backend.weights(), version=number + 1, dtype=torch.float32)
    engine.install_weights(unpack_weights(*stored))
    synchronize(backend.device)
    return Step(
        reward=float(rewards.mean()),
        difference=difference / rollouts.sequences.num_loss_tokens,
        seconds=time.perf_counter() - began,
    )


def learns(place: Place) -> Finding:
    """Train for some steps and compare the rewards of the last with those of the first."""
    device = join()
    directory = place.folder / "model"
    directory.mkdir()
    build_tiny_model(directory)

    engine = transformers_engine(directory, "float32")
    model = load_causal_lm(directory, dtype=torch.float32, attention="sdpa")
    nn.Module.to(model, device)
    dtype = "float32" if place.small else "bfloat16"
    role = Role(compute_dtype=dtype, optimizer=SETTINGS)
    backend = backend_of(packed(model, "sdpa"), role, device, directory)

    tokenizer = load_tokenizer(directory)
    prompts = PromptBatch(
        batch_id=0,
        prompts=tuple(
            Prompt(
                problem_id=str(number),
                token_ids=tuple(tokenizer.encode(question)),
                text=question,
                problem=question,
                ground_truth="",
            )
            for number, question in enumerate(QUESTIONS)
        ),
        group_ids=np.arange(len(QUESTIONS)),
    )
    steps = [step(number, prompts, engine, backend) for number in range(STEPS)]

    first = statistics.mean(one.reward for one in steps[:COMPARED])
    last = statistics.mean(one.reward for one in steps[-COMPARED:])
    difference = max(one.difference for one in steps)
    figures = (
        Figure(name=f"mean reward of the first {COMPARED} steps", value=first),
        Figure(name=f"mean reward of the last {COMPARED} of {STEPS} steps", value=last),
        Figure(name="largest mean difference of a step's log-probs", value=difference, unit="nats"),
        Figure(
            name="time of a step",
            value=statistics.median(one.seconds for one in steps),
            unit="s",
        ),
    )
    # The engine samples in float32, so the trainer's dtype sets the rounding.
    limit = 1e-3 if place.small else 0.15
    faults = at_least("rise of the mean reward", last - first, LEAST_RISE)
    faults += within("difference of rollout and trainer log-probs", difference, limit)
    return Finding(figures=figures, faults=faults)
