"""How long a training step should take, and a word on the console when one takes ten times that.

    seconds = operations of training and sampling / (measured rate of a core x cores) + a fixed
    overhead

An estimate for CPUs, from the model's size and the run's configuration, that is right to a factor
of two or three. It shows before the start whether a run takes minutes or days.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil

from rlsys.config import RunConfig
from rlsys.config.hardware import Hardware, available_memory_fraction
from rlsys.run.compute_dtype import ProductSpeed
from rlsys.run.observers.observer import Observer

logger = logging.getLogger(__name__)

OVERHEAD_S = 1.0  # of a step: messages between actors, weights into the engine
# Sampling a token reads every weight for a few rows, far below the rate of large products: how many
# times the seconds of the arithmetic alone it takes, measured with SmolLM2-135M and 32 to 64
# responses.
SAMPLING_COST = {"vllm": 3.0, "transformers": 15.0}
UNEXPECTED = 10.0  # times the estimate
LITTLE_MEMORY = 0.05  # of what this process may use
MUCH_SWAP = 0.25  # of the swap space in use


@dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """What one step should cost, where all responses have `generation.max_tokens` tokens."""

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
    speed: ProductSpeed | None,
) -> StepEstimate | None:
    """Return the estimate, or None where the products of the workers' machine were not measured.

    A forward pass takes 2 operations for each parameter and token; with the backward pass it takes
    6.

    Args:
        parameters: of the model.
        prompt_tokens: mean length of a prompt.
        speed: of matrix products on one core, None for GPUs.
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
    training = (6 * policy.epochs + 2 * forward_passes) * parameters * trained
    sampling = 2 * parameters * (prompts * prompt_tokens + sampled)
    cores = 1e9 * hardware.cpus  # sampling and training take turns, each on all of them
    return StepEstimate(
        training_s=training / (cores * speed.of(policy.compute_dtype)),
        sampling_s=SAMPLING_COST[generation.engine]
        * sampling
        / (cores * speed.of(generation.dtype)),
    )


def describe_estimate(estimate: StepEstimate | None, config: RunConfig) -> str:
    """Return a line for the plan and for the first lines of a run."""
    if estimate is None:
        return "step time: not estimated; that is done for CPUs of this machine only"
    steps = config.trainer.steps
    return (
        f"step time: roughly {_rounded(estimate.seconds)} per step, "
        f"{_rounded(steps * estimate.seconds)} for {steps} steps, estimated from the speed of matrix "
        f"products (training {estimate.training_s:.1f} s, sampling {estimate.sampling_s:.1f} s)"
    )


def _rounded(seconds: float) -> str:
    """Seconds to no more digits than an estimate has."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class StepTimeWatch(Observer):
    """Observer that says once, on the console and in the log, that a step took far too long."""

    def __init__(
        self,
        estimate: StepEstimate | None,
        causes: Callable[[], Sequence[str]],
        notify: Callable[[str], None],
    ) -> None:
        """`causes` is asked when a step was slow, for what might explain it."""
        self._estimate, self._causes, self._notify = estimate, causes, notify

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        if self._estimate is None:
            return
        # Reward functions may take as long as they like, and dynamic sampling samples several
        # times.
        seconds = values.get("time/step", 0.0) - values.get("time/reward", 0.0)
        expected = self._estimate.seconds * max(1.0, values.get("sampling/rounds", 1.0))
        if seconds <= UNEXPECTED * expected:
            return
        causes = list(self._causes()) or ["none that can be seen from here"]
        text = (
            f"step {step} took {seconds:.0f} s, {seconds / expected:.0f} times the estimate. "
            f"Likely causes: {'; '.join(causes)}."
        )
        logger.warning("%s", text)
        self._notify(text)
        self._estimate = None  # once is enough


def likely_causes(config: RunConfig, hardware: Hardware, speed: ProductSpeed | None) -> list[str]:
    """Return what on this machine would make a step slow, as it is right now."""
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
    # Sampling and training take turns on the cores, so a run alone makes about one runnable thread
    # for each.
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
