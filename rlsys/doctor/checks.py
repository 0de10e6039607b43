"""The checks of one machine: each reads the facts and returns one finding."""

from __future__ import annotations

from collections.abc import Callable

from rlsys.config import RunConfig
from rlsys.doctor.facts import Disk, MachineFacts
from rlsys.doctor.findings import Finding, failure, ok, skipped, warning
from rlsys.run.machine_checks import engine_mistakes, memory_mistakes

PYTHON = (3, 11)
LEAST_FREE_GIB = 1.0
LITTLE_FREE_GIB = 10.0
# Ray stops to create objects on a disk above this: RAY_local_fs_capacity_threshold.
RAY_DISK_LIMIT = 0.95
# The number of files that Ray's own documentation asks for.
OPEN_FILES = 65536
LEAST_OPEN_FILES = 1024
# The first Linux driver for each major version of CUDA, from NVIDIA's table of compatibility.
FIRST_DRIVER = {11: 450, 12: 525, 13: 580}

Check = Callable[[MachineFacts], Finding]


def check_cpu(facts: MachineFacts) -> Finding:
    """Check that the CPU has the instructions that vLLM's CPU build is compiled for."""
    hardware = facts.hardware
    bfloat16 = ", ".join(hardware.bfloat16_instructions) or "no bfloat16 instructions"
    text = f"{hardware.cpu_model}, {hardware.cpus} CPUs, {bfloat16}."
    if facts.architecture == "x86_64" and "avx2" not in facts.cpu_flags:
        return failure(
            "cpu", f"{text} It has no AVX2.", "Take another machine, or an instance type with AVX2."
        )
    return ok("cpu", text)


def check_memory(facts: MachineFacts) -> Finding:
    """Check the memory against what a run reserves by default."""
    config = RunConfig()
    reserved = config.cluster.object_store_gib
    if not facts.hardware.gpus:
        reserved += config.generation.kv_cache_gib * config.generation.workers

    available, total = facts.available_memory_gib, facts.hardware.memory_gib
    text = f"{available:.1f} of {total:.1f} GiB are free."
    remedy = (
        "End other processes, raise the container's limit, or lower cluster.object_store_gib and "
        "generation.kv_cache_gib."
    )
    if available < reserved:
        return failure(
            "memory", f"{text} Object store and KV cache take {reserved:g} by default.", remedy
        )
    if available < 2 * reserved:
        return warning("memory", f"{text} The caches take {reserved:g}.", remedy)
    return ok("memory", text)


def check_shared_memory(facts: MachineFacts) -> Finding:
    """Check that Ray's object store fits into /dev/shm; else Ray puts it on a disk."""
    needed = RunConfig().cluster.object_store_gib
    if facts.shared_memory is None:
        return failure("/dev/shm", "It does not exist.", "Mount a tmpfs of 2 GiB or more there.")
    free = facts.shared_memory.free_gib
    text = f"{free:.1f} of {facts.shared_memory.total_gib:.1f} GiB are free."
    if free < needed:
        return failure(
            "/dev/shm",
            f"{text} The object store takes {needed:g} by default.",
            "Start the container with --shm-size (Kubernetes: an emptyDir with medium Memory), or "
            "lower cluster.object_store_gib.",
        )
    return ok("/dev/shm", text)


def check_disk(facts: MachineFacts) -> Finding:
    """Check the space where a run writes; the worst of the places counts."""
    for use, disk in facts.disks.items():
        if use == "Ray's session" and disk.used_fraction > RAY_DISK_LIMIT:
            return failure(
                "disk",
                f"{_room(use, disk)} Ray creates no objects on a disk that is more than "
                f"{RAY_DISK_LIMIT:.0%} full.",
                "Free space, or set RAY_TMPDIR to a folder on another disk.",
            )
        if disk.free_gib < LEAST_FREE_GIB:
            return failure("disk", _room(use, disk), "Free space there.")
    for use, disk in facts.disks.items():
        if disk.free_gib < LITTLE_FREE_GIB:
            return warning(
                "disk",
                _room(use, disk),
                "Free space, lower trainer.checkpoints.keep, or name another run.directory.",
            )
    return ok("disk", " ".join(_room(use, disk) for use, disk in facts.disks.items()))


def _room(use: str, disk: Disk) -> str:
    return f"{use} ({disk.path}): {disk.free_gib:.0f} of {disk.total_gib:.0f} GiB are free."


def check_open_files(facts: MachineFacts) -> Finding:
    """Check the number of files that a process may open."""
    limit = facts.open_files
    text = f"A process may open {limit} files."
    remedy = f"`ulimit -n {OPEN_FILES}`; for containers --ulimit nofile={OPEN_FILES}."
    if 0 <= limit < LEAST_OPEN_FILES:
        return failure("open files", text, remedy)
    if 0 <= limit < OPEN_FILES:
        return warning("open files", f"{text} Many actors on one node need more.", remedy)
    return ok("open files", text if limit >= 0 else "There is no limit.")


def check_versions(facts: MachineFacts) -> Finding:
    """Check Python and the installed packages against what rlsys and vLLM ask for."""
    found = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    if facts.python != PYTHON:
        return failure(
            "versions",
            f"This is Python {facts.python[0]}.{facts.python[1]}, rlsys needs "
            f"{PYTHON[0]}.{PYTHON[1]}.",
            "make setup PYTHON=python3.11",
        )
    if facts.unmet_requirements is None:
        return failure(
            "versions", f"rlsys is not installed here ({found}).", "make setup; then use its .venv."
        )
    if facts.unmet_requirements:
        return failure(
            "versions",
            f"These do not fit together: {'; '.join(facts.unmet_requirements)}.",
            "make setup, which installs what uv.lock says.",
        )
    return ok("versions", f"{found}.")


def check_default_run(facts: MachineFacts) -> Finding:
    """Check that the engine and the reservations of the default configuration work here."""
    config = RunConfig()
    mistakes = [
        *engine_mistakes(config, facts.hardware),
        *memory_mistakes(config, facts.hardware),
    ]
    if mistakes:
        return failure("default settings", mistakes[0], "")
    return ok("default settings", f"{config.generation.engine} generates with them.")


def check_gpus(facts: MachineFacts) -> Finding:
    """Check that GPUs are visible, and that driver and torch fit together."""
    hardware, driver = facts.hardware, facts.driver
    if not hardware.gpus:
        return _no_gpus(facts)

    text = f"{hardware.gpus} GPUs of {hardware.gpu_memory_gib:.0f} GiB, driver {driver.version}."
    if driver.torch_cuda is None:
        return failure(
            "gpus",
            f"{text} The installed torch is a build for CPUs.",
            "make setup EXTRA=gpu",
        )
    major = int(driver.torch_cuda.split(".")[0])
    needed = FIRST_DRIVER.get(major, 0)
    present = int((driver.version or "0").split(".")[0])
    if present < needed:
        return failure(
            "gpus",
            f"{text} torch was built for CUDA {driver.torch_cuda}, which needs driver {needed}.",
            "Update the driver, or install a torch for an older CUDA.",
        )
    return ok("gpus", f"{text} torch was built for CUDA {driver.torch_cuda}.")


def _no_gpus(facts: MachineFacts) -> Finding:
    """Return the finding where no GPU can be used: there is none, or something hides it."""
    driver = facts.driver
    if not driver.device_files:
        return ok("gpus", "None; everything runs on CPUs.")
    if facts.environment.get("CUDA_VISIBLE_DEVICES") == "":
        return warning(
            "gpus",
            f"{driver.device_files} GPUs are hidden by an empty CUDA_VISIBLE_DEVICES.",
            "Unset it to use them.",
        )
    what = "does not answer" if driver.has_nvidia_smi else "is not on the PATH"
    return failure(
        "gpus",
        f"The kernel has {driver.device_files} GPUs, and nvidia-smi {what}.",
        "Install NVIDIA's driver; in a container its toolkit (docker run --gpus all).",
    )


def check_network(facts: MachineFacts) -> Finding:
    """Check the interface that ranks on several nodes talk over, and NCCL where there are GPUs."""
    names = ", ".join(f"{name} {address}" for name, address in facts.interfaces.items())
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        setting = facts.environment.get(variable)
        if setting and not _selects(setting, facts):
            return failure(
                "network",
                f"{variable} is {setting!r}, and there are: {names or 'none but loopback'}.",
                f"Set {variable} to one of these, or unset it.",
            )
    if facts.hardware.gpus and facts.driver.torch_cuda and facts.driver.nccl is None:
        return failure(
            "network", "NCCL is not installed beside torch.", "make setup EXTRA=gpu installs it."
        )
    if not facts.interfaces:
        return warning(
            "network", "Only loopback is up: one node works, several do not.", "Check `ip address`."
        )
    if facts.host_address is None or facts.host_address.startswith("127."):
        return warning(
            "network",
            f"The name of this host resolves to {facts.host_address or 'nothing'} ({names}). Ranks "
            "use the interface of the node's address in Ray instead.",
            "Where that is the wrong interface, start Ray with --node-ip-address, or set "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME.",
        )
    nccl = f"; NCCL {facts.driver.nccl}" if facts.driver.nccl else ""
    return ok("network", f"{names}{nccl}.")


def _selects(setting: str, facts: MachineFacts) -> bool:
    """Return whether a value of NCCL_SOCKET_IFNAME selects an interface that is up.

    It is a list of prefixes; with a leading = of whole names, with a leading ^ of those to avoid.
    """
    names = setting.lstrip("=^").split(",")
    if setting.startswith("^"):
        return any(not have.startswith(tuple(names)) for have in facts.interfaces)
    if setting.startswith("="):
        return any(have in names for have in facts.interfaces)
    return any(have.startswith(tuple(names)) for have in (*facts.interfaces, "lo"))


def check_token(facts: MachineFacts) -> Finding:
    """Check the token with which this environment would start or join a Ray cluster."""
    token = facts.token
    if token.mode not in (None, "token", "disabled"):
        return failure(
            "Ray token", f"RAY_AUTH_MODE is {token.mode!r}.", "Set it to token, or to disabled."
        )
    if token.mode == "disabled":
        return warning(
            "Ray token",
            "RAY_AUTH_MODE is disabled: whoever reaches the ports of a cluster runs code on it.",
            "Set it to token on every node and client.",
        )
    if token.missing_path is not None:
        return failure(
            "Ray token",
            f"RAY_AUTH_TOKEN_PATH names {token.missing_path!r}, which cannot be read or is empty.",
            "Copy the head's token there.",
        )
    if token.source is None:
        if token.mode == "token":
            return failure(
                "Ray token",
                "RAY_AUTH_MODE is token, and there is no token.",
                "Copy the head's ~/.ray/auth_token; on the head: `ray get-auth-token --generate`.",
            )
        return ok("Ray token", "None; a run that starts Ray makes its own.")
    if token.readable_by_others:
        return warning(
            "Ray token",
            f"{token.source} can be read by other users, who can then run code as you.",
            f"chmod 600 {token.source}",
        )
    if token.mode is None:
        return ok(
            "Ray token", f"{token.source}; it is sent to clusters with RAY_AUTH_MODE=token only."
        )
    return ok("Ray token", f"{token.source}.")


def check_hub(facts: MachineFacts) -> Finding:
    """Check that models can be fetched."""
    if facts.environment.get("HF_HUB_OFFLINE") == "1":
        return skipped("hub", "HF_HUB_OFFLINE is 1.")
    if facts.hub_error is not None:
        return warning(
            "hub",
            f"It does not answer ({facts.hub_error}).",
            "Give model.path a local directory, set HF_ENDPOINT to a mirror, or HF_HUB_OFFLINE=1 "
            "where all models are cached.",
        )
    return ok("hub", f"{facts.environment.get('HF_ENDPOINT', 'huggingface.co')} answers.")


def check_cache(facts: MachineFacts) -> Finding:
    """Check the files of the converted models against their hashes."""
    if facts.damaged_models:
        path, damage = next(iter(facts.damaged_models.items()))
        return failure(
            "cache",
            f"{len(facts.damaged_models)} of {facts.cached_models} models are damaged; {path}: "
            f"{damage}.",
            "Remove that folder; the next run builds it again.",
        )
    return ok("cache", f"{facts.cached_models} models, all as they were written.")


MACHINE_CHECKS: tuple[Check, ...] = (
    check_cpu,
    check_memory,
    check_shared_memory,
    check_disk,
    check_open_files,
    check_versions,
    check_default_run,
    check_gpus,
    check_network,
    check_token,
    check_hub,
    check_cache,
)


def machine_findings(facts: MachineFacts) -> list[Finding]:
    """Return the findings of all checks, in the order of the table."""
    return [check(facts) for check in MACHINE_CHECKS]
