"""What this machine has, found without importing torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """CPUs, memory and GPUs of the machine on which the driver starts."""

    cpus: int
    memory_gib: float
    gpus: int
    gpu_memory_gib: float  # of one GPU


def detect_hardware() -> Hardware:
    """CPUs that this process may use, physical memory, and NVIDIA GPUs as nvidia-smi lists them (CUDA_VISIBLE_DEVICES counts)."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3
    sizes = _gpu_memory_gib()
    return Hardware(
        cpus=len(os.sched_getaffinity(0)),
        memory_gib=memory,
        gpus=len(sizes),
        gpu_memory_gib=min(sizes, default=0.0),
    )


def _gpu_memory_gib() -> list[float]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "" or shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            query, capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (subprocess.SubprocessError, OSError):
        return []
    sizes = [float(line) / 1024 for line in answer.split() if line.replace(".", "").isdigit()]
    return sizes if visible is None else sizes[: len(visible.split(","))]
