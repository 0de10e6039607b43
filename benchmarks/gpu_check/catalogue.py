"""The checks, in the order in which they run: the most telling ones first."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu_check.results import Finding

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a check runs."""

    device: torch.device
    folder: Path  # empty, for this check alone

    @property
    def small(self) -> bool:
        """Whether the sizes are those of a test: on a CPU."""
        return self.device.type == "cpu"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check: a function, and the conditions under which it runs."""

    name: str
    proves: str
    function: str = ""  # module:name, a function of a `Place` that returns a `Finding`
    needs: tuple[str, ...] = ()  # packages besides torch, transformers and what these need
    seconds: int = 60  # after so many it is ended
    needs_gpu: str = ""  # why a CPU does not run it; "": it does
    not_implemented: str = ""  # why there is nothing to check; "": there is

    def load(self) -> Callable[[Place], Finding]:
        """Import the function."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(f"benchmarks.gpu_check.{module}"), name)


MACHINE = Check(
    name="machine",
    proves="What this machine is, and how fast its matrix products are",
    function="machine:describe",
    seconds=90,
)
TOO_LARGE = "a model of this size takes minutes on a CPU"

CHECKS = (
    MACHINE,
    Check(
        name="fsdp2_update",
        proves="FSDP2 updates in float32 and bfloat16 equal those of plain torch in float32",
        function="update:fsdp2_update",
        seconds=90,
    ),
    Check(
        name="attention_sdpa",
        proves="Packed sdpa gives the log-probs and gradients of the model's own forward pass",
        function="attention:sdpa",
        seconds=60,
    ),
    Check(
        name="attention_flash_varlen",
        proves="flash-attn's varlen kernel gives the log-probs and gradients of sdpa",
        function="attention:flash_varlen",
        needs=("flash_attn",),
        needs_gpu="flash-attn has no kernels for CPUs",
        seconds=60,
    ),
    Check(
        name="attention_flex",
        proves="flex_attention, compiled on a GPU, gives the log-probs and gradients of sdpa",
        function="attention:flex",
        seconds=120,
    ),
    Check(
        name="weight_sync_transformers",
        proves="The transformers engine has the trainer's log-probs after a weight sync",
        function="weight_sync:transformers",
        seconds=60,
    ),
    Check(
        name="grpo",
        proves="GRPO learns: sampling, rewards, advantages, FSDP2 updates, weight sync",
        function="grpo:learns",
        seconds=120,
    ),
    Check(
        name="throughput_0.1b",
        proves="Tokens/s, MFU and peak memory of each phase, 0.1 B parameters",
        function="throughput:small_model",
        needs_gpu=TOO_LARGE,
        seconds=90,
    ),
    Check(
        name="throughput_0.5b",
        proves="Tokens/s, MFU and peak memory of each phase, 0.5 B parameters",
        function="throughput:medium_model",
        needs_gpu=TOO_LARGE,
        seconds=120,
    ),
    Check(
        name="throughput_1.5b",
        proves="Tokens/s, MFU and peak memory of each phase, 1.5 B parameters",
        function="throughput:large_model",
        needs_gpu=TOO_LARGE,
        seconds=150,
    ),
    Check(
        name="throughput_tiny",
        proves="The measurement of throughput itself, on a model of 0.1 M parameters",
        function="throughput:tiny_model",
        seconds=60,
    ),
    Check(
        name="weight_sync_vllm",
        proves="vLLM has the trainer's log-probs after a weight sync",
        function="weight_sync:vllm",
        needs=("pydantic", "vllm"),
        needs_gpu="`make test-rest` compares vLLM and the trainer on CPUs",
        seconds=150,
    ),
    Check(
        name="throughput_vllm",
        proves="Tokens/s and MFU of vLLM's sampling, 0.5 B parameters",
        function="throughput:vllm",
        needs=("pydantic", "vllm"),
        needs_gpu=TOO_LARGE,
        seconds=150,
    ),
    Check(
        name="grpo_recipe",
        proves="The whole system over Ray: the recipe grpo_math learns",
        function="recipe:learns",
        needs=("ray", "pydantic", "pyarrow", "psutil", "tensorboardX"),
        needs_gpu="`make test` runs the recipe on CPUs",
        seconds=180,
    ),
    Check(
        name="weight_sync_cuda_ipc",
        proves="Weights reach an engine on the same GPU through CUDA IPC",
        not_implemented="weights travel through the object store or files",
    ),
    Check(
        name="weight_sync_nccl",
        proves="Weights reach an engine on another GPU through NCCL",
        not_implemented="weights travel through the object store or files",
    ),
    Check(
        name="sleep_and_wake",
        proves="vLLM gives its memory back while the trainer works",
        not_implemented="engines keep their memory during training",
    ),
)


def named(name: str) -> Check:
    """Return the check called `name`.

    Raises:
        ValueError: there is none.
    """
    found = next((check for check in CHECKS if check.name == name), None)
    if found is None:
        names = ", ".join(check.name for check in CHECKS)
        raise ValueError(f"there is no check {name!r}. Choose from {names}.")
    return found
