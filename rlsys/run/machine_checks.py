"""Checks of the configuration against this machine and the installed packages."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rlsys.config import RunConfig
from rlsys.config.engines import ENGINES
from rlsys.config.hardware import Hardware
from rlsys.config.sync import OWNER_FILE
from rlsys.run.engine_arguments import argument_mistakes

GPU_KERNELS = ("flash_attention_2", "flex_attention")
COMPILERS = ("c++", "g++", "clang++")


def machine_mistakes(config: RunConfig, hardware: Hardware) -> Iterator[str]:
    """Yield settings that this machine cannot run, a line each: field, value and remedy.

    Nothing is checked where the run joins a cluster, whose machines may be different.
    """
    if config.cluster.joined_address is not None:
        return
    yield from _threads(config, hardware)
    yield from _backend(config, hardware)
    yield from _attention(config, hardware)
    yield from engine_mistakes(config, hardware)
    yield from memory_mistakes(config, hardware)
    yield from _sync_mistakes(config)
    yield from _actors(config, hardware)
    yield from label_mistakes(config)


def _threads(config: RunConfig, hardware: Hardware) -> Iterator[str]:
    threads = config.policy.threads_per_rank
    if threads > hardware.cpus:
        yield (
            f"policy.threads_per_rank: {threads} threads for the {hardware.cpus} CPUs of this "
            "machine. Lower it, or leave it at 0, which divides the CPUs among the ranks."
        )


def _backend(config: RunConfig, hardware: Hardware) -> Iterator[str]:
    policy = config.policy
    if policy.backend != "deepspeed":
        return

    if not _is_installed("deepspeed"):
        yield (
            "policy.backend: 'deepspeed' is not installed. Install it (pip install deepspeed), or "
            "choose fsdp2."
        )
    if policy.deepspeed.offload_weights and not (hardware.gpus and policy.gpus_per_rank):
        where = "policy.gpus_per_rank is 0" if hardware.gpus else "this machine has no GPU"
        yield (
            "policy.deepspeed.offload_weights: true moves weights from a GPU to its host, and "
            f"{where}. Set it to false."
        )


def _attention(config: RunConfig, hardware: Hardware) -> Iterator[str]:
    kernel = config.model.attention
    on_gpu = hardware.gpus > 0 and config.policy.gpus_per_rank > 0
    if kernel in GPU_KERNELS and not on_gpu:
        where = "policy.gpus_per_rank is 0" if hardware.gpus else "this machine has no GPU"
        yield f"model.attention: {kernel!r} needs a GPU, and {where}. Choose sdpa or auto."
    elif kernel == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        yield (
            "model.attention: 'flash_attention_2' needs the package flash-attn, which is not "
            "installed. Install it, or choose sdpa or auto."
        )


def engine_mistakes(config: RunConfig, hardware: Hardware) -> Iterator[str]:
    """Yield settings of `generation` that the engine cannot run with here."""
    generation = config.generation
    traits = ENGINES[generation.engine]
    if traits.packages and not _is_installed(*traits.packages):
        yield (
            f"generation.engine: {generation.engine!r} is not installed. Install it, or choose "
            "transformers."
        )
    yield from argument_mistakes(generation)

    tensor_parallel = generation.tensor_parallel if "tensor_parallel" in traits.options else 1
    if tensor_parallel > 1 and not hardware.gpus:
        yield (
            f"generation.tensor_parallel: {tensor_parallel} splits a model over GPUs, and this "
            "machine has none. Set it to 1; generation.workers adds engines."
        )
    elif tensor_parallel > 1 and generation.gpus_per_worker != 1:
        yield (
            f"generation.gpus_per_worker: {generation.gpus_per_worker:g} with "
            f"generation.tensor_parallel {tensor_parallel}: each part of the model needs a GPU of "
            "its own. Set it to 1."
        )

    compiles = generation.compile and "compile" in traits.options
    if compiles and not (os.environ.get("CXX") or any(map(shutil.which, COMPILERS))):
        yield (
            f"generation.compile: true needs a C++ compiler ({', '.join(COMPILERS)}), and none is "
            "on the PATH. Install one, or set it to false."
        )

    cache = generation.kv_cache_gib
    needs_whole_gib = traits.whole_gib_cache_on_cpu and not hardware.gpus
    if needs_whole_gib and cache != round(cache):
        yield (
            f"generation.kv_cache_gib: {generation.engine} takes whole GiB on a CPU, not "
            f"{cache:g}. Give {max(1, round(cache))}."
        )


def memory_mistakes(config: RunConfig, hardware: Hardware) -> Iterator[str]:
    """Yield reservations that are larger than the memory of the whole machine."""
    generation, memory = config.generation, hardware.memory_gib
    cache = generation.kv_cache_gib * generation.workers
    has_cache = "kv_cache_gib" in ENGINES[generation.engine].options
    if has_cache and not hardware.gpus and cache > memory:
        yield (
            f"generation.kv_cache_gib: {generation.kv_cache_gib:g} for each of "
            f"{generation.workers} workers, and this machine has {memory:.0f} GiB of memory. "
            "Lower it."
        )
    if config.cluster.object_store_gib > memory:
        yield (
            f"cluster.object_store_gib: {config.cluster.object_store_gib:g} is more than the "
            f"{memory:.0f} GiB of memory of this machine. Lower it."
        )


def label_mistakes(config: RunConfig) -> Iterator[str]:
    """Yield labels of nodes in a run that starts Ray on this machine, whose node has none."""
    labels = {
        "policy.node_label": config.policy.node_label,
        "generation.node_label": config.generation.node_label,
        "reward.node_label": config.reward.node_label,
    }
    for field, label in labels.items():
        if label is not None:
            yield (
                f"{field}: {label!r} is a label of nodes of a cluster, and this run starts Ray on "
                "this machine. Join a cluster with cluster.address, or leave it out."
            )


def _actors(config: RunConfig, hardware: Hardware) -> Iterator[str]:
    """Yield a mistake where Ray could not place all actors on this machine."""
    policy, generation = config.policy, config.generation
    cpus = policy.ranks * policy.cpus_per_rank + generation.workers * generation.cpus_per_worker
    if cpus > hardware.cpus:
        yield (
            f"policy.ranks, generation.workers: {policy.ranks} ranks and {generation.workers} "
            f"workers need {cpus} CPUs, this machine has {hardware.cpus}. Lower them, or join a "
            "larger cluster with cluster.address."
        )

    training_gpus = policy.ranks * policy.gpus_per_rank
    engine_gpus = generation.gpus_per_worker * generation.tensor_parallel
    gpus = training_gpus + generation.workers * engine_gpus
    if hardware.gpus and gpus > hardware.gpus:
        yield (
            f"policy.ranks, generation.workers: they need {gpus:g} GPUs, this machine has "
            f"{hardware.gpus}. Lower them, share a GPU with policy.gpus_per_rank and "
            "generation.gpus_per_worker below 1, or join a larger cluster with cluster.address."
        )


def _is_installed(*packages: str) -> bool:
    """Return whether any of the packages is installed, without importing it."""
    for package in packages:
        try:
            version(package)
        except PackageNotFoundError:
            continue
        return True
    return False


def _sync_mistakes(config: RunConfig) -> Iterator[str]:
    """Yield why the transport disk would refuse its directory, where this machine sees it."""
    sync = config.sync
    if sync.chosen_transport != "disk" or sync.directory is None:
        return
    directory = Path(sync.directory)
    if directory.exists() and not directory.is_dir():
        yield f"sync.directory: {str(directory)!r} is not a directory. Choose another path."
        return
    is_ours = (directory / OWNER_FILE).is_file()
    if directory.is_dir() and not is_ours and any(directory.iterdir()):
        yield (
            f"sync.directory: {str(directory)!r} holds other files. Give it a directory of its own."
        )
