"""Estimate of the time of a training step, and a warning when a step takes ten times as long.

    seconds = operations of training and sampling / (measured rate of a core * cores) + overhead

The estimate is for CPUs, and is right to a factor of two or three. It shows before the start
whether a run takes minutes or days.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil

from rlsys.config import RootConfig, RunConfig
from rlsys.config.hardware import Hardware, available_memory_fraction
from rlsys.rewards import reward_model_of
from rlsys.run.compute_dtype import ProductSpeed
from rlsys.run.observers.observer import Observer

logger = logging.getLogger(__name__)

OVERHEAD_S = 1.0  # per step: messages between actors, and the weight sync
# Sampling a token reads every weight for a few rows, so it is slower than large products with the
# same number of operations. These are the factors, measured with SmolLM2-135M and 32 to 64
# responses.
SAMPLING_COST = {"vllm": 3.0, "transformers": 15.0}
UNEXPECTED = 10.0  # times the estimate
LITTLE_MEMORY = 0.05  # as a fraction of the memory that this process may use
MUCH_SWAP = 0.25  # as a fraction of the swap space


@dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """Estimated time of a step in which all responses have `generation.max_tokens` tokens."""

    training_s: float
    sampling_s: float

    @property
    def seconds(self) -> float:
        return self.training_s + self.sampling_s + OVERHEAD_S


def estimate_step(
    config: RunConfig,
    hardware: Hardware,
    *,
    parameters: int,
    prompt_tokens: float,
    text_tokens: float = 0.0,
    speed: ProductSpeed | None,
) -> StepEstimate | None:
    """Estimate the time of a step, or return None where `speed` does not apply to the workers.

    A forward pass takes 2 operations for each parameter and token; with the backward pass it is 6.
    A critic and a reward model are taken to be as large as the policy.

    Args:
        parameters: number of parameters of the model.
        prompt_tokens: mean length of a prompt.
        text_tokens: mean length of a pretraining text that is trained on; 0: there are none.
        speed: speed of matrix products on one core of this machine; None for GPUs.
    """
    policy, generation, trainer = config.policy, config.generation, config.trainer
    if speed is None or config.cluster.joined_address is not None:
        return None

    prompts = trainer.prompts_per_step
    sampled = prompts * generation.samples_per_prompt * generation.max_tokens
    copies = 1 if policy.shared_prefix_packing else generation.samples_per_prompt
    trained = prompts * copies * prompt_tokens + sampled

    updates = policy.epochs * policy.num_mini_batches
    forward_passes = (updates > 1) + (config.algorithm.kl.coefficient > 0)  # old; reference
    passes = 6 * policy.epochs + 2 * forward_passes
    if reward_model_of(config.reward.functions) is not None:
        passes += 2
    if config.critic.enabled:
        passes += 2 + 6 * config.critic_passes()[0]  # the values, then their update
    training = passes * parameters * trained
    training += 6 * parameters * config.ptx.examples_per_step * text_tokens
    sampling = 2 * parameters * (prompts * prompt_tokens + sampled)

    cores = 1e9 * hardware.cpus  # sampling and training take turns, each on all cores
    cost = SAMPLING_COST[generation.engine]
    return StepEstimate(
        training_s=training / (cores * speed.of(policy.compute_dtype)),
        sampling_s=cost * sampling / (cores * speed.of(generation.dtype)),
    )


def describe_estimate(estimate: StepEstimate | None, config: RootConfig) -> str:
    """Return a line for the plan and for the first lines of a run."""
    if estimate is None:
        return "step time: not estimated, which is possible on CPUs of this machine only"
    steps = config.trainer.steps
    return (
        f"step time: roughly {_rounded(estimate.seconds)} per step, "
        f"{_rounded(steps * estimate.seconds)} for {steps} steps, estimated from the speed of "
        f"matrix products{_parts(estimate)}"
    )


def _parts(estimate: StepEstimate) -> str:
    if not estimate.sampling_s:
        return ""
    return f" (training {estimate.training_s:.1f} s, sampling {estimate.sampling_s:.1f} s)"


def _rounded(seconds: float) -> str:
    """Return a time with the few digits that an estimate deserves."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class StepTimeWatch(Observer):
    """Observer that warns once, on the console and in the log, of a step that took far too long."""

    def __init__(
        self,
        estimate: StepEstimate | None,
        causes: Callable[[], Sequence[str]],
        notify: Callable[[str], None],
    ) -> None:
        """`causes` is called after a slow step, and returns possible explanations."""
        self._estimate = estimate
        self._causes = causes
        self._notify = notify

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        if self._estimate is None:
            return
        # The estimate includes neither reward functions nor further rounds of dynamic sampling.
        seconds = values.get("time/step", 0.0) - values.get("time/reward", 0.0)
        expected = self._estimate.seconds * max(1.0, values.get("sampling/rounds", 1.0))
        if seconds <= UNEXPECTED * expected:
            return

        causes = list(self._causes()) or ["none found on this machine"]
        text = (
            f"step {step} took {seconds:.0f} s, {seconds / expected:.0f} times the estimate. "
            f"Likely causes: {'; '.join(causes)}."
        )
        logger.warning("%s", text)
        self._notify(text)
        self._estimate = None  # warn once only


def likely_causes(config: RunConfig, hardware: Hardware, speed: ProductSpeed | None) -> list[str]:
    """Return the present conditions on this machine that make a step slow."""
    causes = []
    fields = {
        "generation.dtype": config.generation.dtype,
        "policy.compute_dtype": config.policy.compute_dtype,
    }
    emulated = [name for name, dtype in fields.items() if dtype == "bfloat16"]
    if emulated and speed is not None and speed.speedup < 1:
        causes.append(
            f"{', '.join(emulated)} is bfloat16, which this CPU emulates ({speed.speedup:.2g} "
            "times as fast as float32): set auto or float32"
        )

    # Sampling and training take turns on the cores, so the run itself has about one runnable thread
    # per core.
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > 2 * cores:
        causes.append(
            f"other processes on the cores: load average {load:.1f} on {cores} CPUs, of which this "
            f"run may use {hardware.cpus}"
        )
    causes += _memory_pressure()
    return causes


def _memory_pressure() -> list[str]:
    free, swap = available_memory_fraction(), psutil.swap_memory()
    swapped = swap.used / swap.total if swap.total else 0.0
    if free >= LITTLE_MEMORY and swapped <= MUCH_SWAP:
        return []
    return [f"memory is short: {free:.0%} free, {swapped:.0%} of the swap space in use"]
