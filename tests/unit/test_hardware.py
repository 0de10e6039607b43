"""Limits of containers, read from a folder that looks like /sys/fs/cgroup."""

import os
from pathlib import Path

import pytest

from rlsys.config.hardware import GIB, Hardware, available_memory_fraction, detect_hardware

HOST_CPUS = len(os.sched_getaffinity(0))
PERIOD = 100_000


class CgroupTree:
    """A fake cgroup v2 hierarchy, with the /proc/self/cgroup that places this process in it."""

    def __init__(self, folder: Path, own: str) -> None:
        self.root = folder / "cgroup"
        self.proc = folder / "self_cgroup"
        self.proc.write_text(f"4:memory:/v1/group\n0::{own}\n")
        (self.root / own.lstrip("/")).mkdir(parents=True)

    def write(self, group: str, **files: str) -> None:
        folder = self.root / group.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("_", ".", 1)).write_text(text + "\n")

    def hardware(self) -> Hardware:
        return detect_hardware(cgroup_root=self.root, own_cgroups=self.proc)


@pytest.fixture
def host() -> Hardware:
    """Return the hardware of this machine, whatever the limits of the tests' own container."""
    nowhere = Path("/nonexistent")
    return detect_hardware(cgroup_root=nowhere, own_cgroups=nowhere)


def test_without_limits_the_machine_counts(tmp_path: Path, host: Hardware):
    tree = CgroupTree(tmp_path, "/user/job")
    tree.write("/user/job", cpu_max=f"max {PERIOD}", memory_max="max")
    assert tree.hardware() == host
    assert host.cpus == HOST_CPUS


def test_the_tightest_limit_of_the_group_and_its_ancestors_counts(tmp_path: Path):
    tree = CgroupTree(tmp_path, "/pod/container")
    tree.write("/pod/container", cpu_max=f"max {PERIOD}", memory_max=str(GIB // 2))
    tree.write("/pod", cpu_max=f"{PERIOD} {PERIOD}", memory_max=str(GIB))
    found = tree.hardware()
    assert found.cpus == 1
    assert found.memory_gib == 0.5


@pytest.mark.parametrize(
    ("quota", "cpus"), [(PERIOD // 4, 1), (PERIOD * 19 // 10, 1), (PERIOD * 1000, HOST_CPUS)]
)
def test_a_quota_is_rounded_down_and_never_below_one_or_above_the_mask(
    quota: int, cpus: int, tmp_path: Path
):
    tree = CgroupTree(tmp_path, "/")
    tree.write("/", cpu_max=f"{quota} {PERIOD}")
    assert tree.hardware().cpus == cpus


def test_a_path_of_the_host_leaves_the_mounted_root(tmp_path: Path):
    """Read the limits in a container that sees the path of the host, and only its own group."""
    tree = CgroupTree(tmp_path, "/")
    tree.proc.write_text("0::/docker/0123abcd\n")
    tree.write("/", memory_max=str(GIB))
    assert tree.hardware().memory_gib == 1.0


def test_the_affinity_mask_counts():
    mask = os.sched_getaffinity(0)
    before = detect_hardware().cpus
    os.sched_setaffinity(0, {min(mask)})
    try:
        assert detect_hardware().cpus == 1
    finally:
        os.sched_setaffinity(0, mask)
    assert detect_hardware().cpus == before


def test_free_memory_is_that_of_the_cgroup_without_pages_of_files(tmp_path: Path):
    tree = CgroupTree(tmp_path, "/job")
    tree.write(
        "/job",
        memory_max=str(1000 * 1024**2),
        memory_current=str(970 * 1024**2),
        memory_stat=f"anon 1\ninactive_file {20 * 1024**2}",
    )
    free = available_memory_fraction(cgroup_root=tree.root, own_cgroups=tree.proc)
    assert free == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("text", "model", "instructions"),
    [
        ("model name\t: AMD EPYC\nflags\t\t: avx2 avx512_bf16 amx\n", "AMD EPYC", ("avx512_bf16",)),
        ("model name\t: Core i5\nflags\t\t: avx2 avx_vnni f16c\n", "Core i5", ()),
        ("Features\t: fp asimd bf16\nCPU part\t: 0xd40\n", "0xd40", ("bf16",)),
    ],
)
def test_the_cpu_and_its_bfloat16_instructions(
    text: str,
    model: str,
    instructions: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    found = detect_hardware(cpu_info=file)
    assert found.cpu_model.endswith(model)
    assert found.bfloat16_instructions == instructions

    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx2")
    assert detect_hardware(cpu_info=file).bfloat16_instructions == ()


@pytest.mark.parametrize(
    ("answer", "capability", "memory_gib"),
    [
        ("81920, 9.0\n40960, 8.0\n", (8, 0), 40.0),
        ("16384, 7.5\n", (7, 5), 16.0),
        ("16384, [N/A]\n", None, 16.0),
    ],
)
def test_gpus_as_nvidia_smi_lists_them(
    answer: str,
    capability: tuple[int, int] | None,
    memory_gib: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{answer}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    found = detect_hardware()
    assert found.compute_capability == capability
    assert found.gpu_memory_gib == memory_gib
    assert found.gpus == answer.count("\n")
