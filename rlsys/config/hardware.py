"""CPUs, memory and GPUs that this process may use, found without importing torch.

A container sees the CPUs and the memory of its host. How much of them it may use is set by the
control groups (cgroup v2) of the process: `cpu.max` and `memory.max` of its own group and of every
group above.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
CPU_INFO = Path("/proc/cpuinfo")
# CPU flags of instructions that multiply in bfloat16: x86 with AVX-512 or AMX, Arm.
BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")
# Values of ONEDNN_MAX_CPU_ISA with which torch's library for matrix products uses none of them.
WITHOUT_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
GIB = 1024**3


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """CPUs, memory and GPUs of the driver's machine, as far as this process may use them."""

    cpus: int
    memory_gib: float
    gpus: int
    gpu_memory_gib: float  # of one GPU
    cpu_model: str = "unknown CPU"
    # CPU instructions that ONEDNN_MAX_CPU_ISA does not switch off.
    bfloat16_instructions: tuple[str, ...] = ()
    compute_capability: tuple[int, int] | None = None  # the lowest of the GPUs; None: not known


def detect_hardware(
    *,
    cgroup_root: Path = CGROUP_ROOT,
    own_cgroups: Path = OWN_CGROUPS,
    cpu_info: Path = CPU_INFO,
) -> Hardware:
    """Return the hardware that this process may use.

    CPUs: those of its affinity mask, at most its cgroup quota, rounded down (a thread beyond the
    quota would be paused, and the other threads would wait for it) and at least 1. Memory:
    physical, at most its cgroup limit. GPUs: NVIDIA's, as nvidia-smi lists them, limited by
    CUDA_VISIBLE_DEVICES.
    """
    groups = list(_cgroup_folders(cgroup_root, own_cgroups))
    affinity = len(os.sched_getaffinity(0))
    quotas = [quota for quota in map(_cpu_quota, groups) if quota is not None]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    limits = [limit / GIB for limit in map(_memory_limit, groups)]

    gpus = _gpus()
    model, flags = _cpu_description(cpu_info)
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in WITHOUT_BFLOAT16:
        flags = frozenset()
    return Hardware(
        cpus=min([affinity, *quotas]),
        memory_gib=min([memory, *limits]),
        gpus=len(gpus),
        gpu_memory_gib=min((gpu.memory_gib for gpu in gpus), default=0.0),
        cpu_model=model,
        bfloat16_instructions=tuple(name for name in BFLOAT16_INSTRUCTIONS if name in flags),
        compute_capability=min((gpu.capability for gpu in gpus if gpu.capability), default=None),
    )


def cpu_flags(cpu_info: Path = CPU_INFO) -> frozenset[str]:
    """Return the instruction sets of the CPU, as the kernel names them."""
    return _cpu_description(cpu_info)[1]


def available_memory_fraction(
    *, cgroup_root: Path = CGROUP_ROOT, own_cgroups: Path = OWN_CGROUPS
) -> float:
    """Return the fraction of this process's memory that is free or can be freed at once.

    This is the smallest fraction over the machine and the cgroups that limit the process. Cached
    pages of files count as free.
    """
    import psutil

    machine = psutil.virtual_memory()
    fractions = [machine.available / machine.total]
    for group in _cgroup_folders(cgroup_root, own_cgroups):
        limit = _memory_limit(group)
        if limit < machine.total:
            used = _integer(group / "memory.current") - _statistic(group, "inactive_file")
            fractions.append(1 - used / limit)
    return min(fractions)


def _cgroup_folders(root: Path, own_cgroups: Path) -> Iterator[Path]:
    """Yield the cgroup v2 folder of this process and those above it, the root included.

    Inside a container without a cgroup namespace the path is that of the host, of which only the
    root is mounted: folders that do not exist are left out.
    """
    try:
        lines = own_cgroups.read_text().splitlines()
    except OSError:
        return
    paths = [line.removeprefix("0::") for line in lines if line.startswith("0::")]
    if not paths:
        return  # cgroup v1 only
    folder = root / paths[0].lstrip("/")
    for candidate in (folder, *folder.parents):
        if candidate.is_dir():
            yield candidate
        if candidate == root:
            return


def _cpu_quota(group: Path) -> int | None:
    """Return how many whole CPUs `cpu.max` ("quota period") allows, at least 1; None: no quota."""
    quota, _, period = _text(group / "cpu.max").partition(" ")
    if not quota.isdecimal() or not period.isdecimal():
        return None  # "max", or the root, which has no such file
    return max(1, int(quota) // int(period))


def _memory_limit(group: Path) -> float:
    """Return `memory.max` in bytes; infinity without a limit."""
    limit = _text(group / "memory.max")
    return int(limit) if limit.isdecimal() else float("inf")


def _statistic(group: Path, name: str) -> int:
    """Return one number of `memory.stat`, in bytes; 0 where it is absent."""
    for line in _text(group / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _integer(file: Path) -> int:
    text = _text(file)
    return int(text) if text.isdecimal() else 0


def _text(file: Path) -> str:
    """Return a small file's text without the line end; "" where it cannot be read."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _cpu_description(cpu_info: Path) -> tuple[str, frozenset[str]]:
    """Return the name of the first CPU and its flags, as the kernel lists them."""
    fields: dict[str, str] = {}
    for line in _text(cpu_info).splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    arm = [fields[key] for key in ("CPU implementer", "CPU part") if key in fields]
    model = fields.get("model name") or " ".join([platform.machine(), *arm])
    flags = fields.get("flags") or fields.get("Features") or ""  # x86; Arm
    return model, frozenset(flags.split())


@dataclass(frozen=True, kw_only=True)
class _Gpu:
    memory_gib: float
    capability: tuple[int, int] | None


def _gpus() -> list[_Gpu]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "" or shutil.which("nvidia-smi") is None:
        return []
    # Drivers before 2021 do not know compute_cap, and then answer nothing at all.
    lines = _nvidia_smi("memory.total,compute_cap") or _nvidia_smi("memory.total")
    gpus = [gpu for gpu in map(_read_gpu, lines) if gpu is not None]
    return gpus if visible is None else gpus[: len(visible.split(","))]


def _nvidia_smi(fields: str) -> list[str]:
    """Return one line for each GPU, or nothing where nvidia-smi fails."""
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return []
    return answer.stdout.splitlines()


def _read_gpu(line: str) -> _Gpu | None:
    """Return the GPU of a line "81559, 9.0" (MiB, compute capability), or of "81559"."""
    memory, _, capability = (part.strip() for part in line.partition(","))
    if not memory.replace(".", "", 1).isdigit():
        return None
    major, _, minor = capability.partition(".")
    known = major.isdecimal() and minor.isdecimal()
    return _Gpu(
        memory_gib=float(memory) / 1024,
        capability=(int(major), int(minor)) if known else None,
    )
