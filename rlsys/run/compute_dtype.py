"""Resolution of the precision `auto` to float32 or bfloat16, before anything starts.

On a GPU its compute capability decides. On a CPU a measurement decides: bfloat16 products are
several times as fast as float32 ones where the CPU has instructions for them, and several times as
slow where they are emulated. The flags of the CPU are not enough, since environment variables may
limit the instructions that the libraries use.

The choice is made once and written to the run's `config.yaml` as an explicit value: all workers
compute in the same precision, and a run that is resumed elsewhere keeps it. A run that joins a
cluster asks every node on which a part of it may compute; where they would choose differently, it
is float32, which is right on all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from rlsys.config import RunConfig
from rlsys.config.command_line import evolve
from rlsys.config.hardware import BFLOAT16_INSTRUCTIONS, Hardware
from rlsys.models.catalogue import cache_directory
from rlsys.models.loading import mlp_shape

FIRST_CAPABILITY_WITH_BFLOAT16 = (8, 0)  # Ampere; earlier GPUs emulate it
# Least speed-up of products at which `auto` chooses bfloat16: casts, norms and softmax do not gain,
# and rounding costs accuracy.
LEAST_SPEEDUP = 1.2
TOKENS = 256  # rows of a measured product
LARGEST_HIDDEN, LARGEST_INTERMEDIATE = 1024, 4096  # larger products run at the same rate
SECONDS_EACH = 0.03  # length of the measurement of one precision, with at least MIN_REPEATS
MIN_REPEATS = 2
# Variables that limit or select the instructions of torch, oneDNN and MKL.
ENVIRONMENT = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR")


@dataclass(frozen=True, kw_only=True)
class ProductSpeed:
    """GFLOP/s of one core in matrix products of a model's shapes."""

    float32: float
    bfloat16: float

    @property
    def speedup(self) -> float:
        """Speed of bfloat16 divided by that of float32."""
        return self.bfloat16 / self.float32

    def of(self, dtype: str) -> float:
        return self.bfloat16 if dtype == "bfloat16" else self.float32


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A node of a cluster on which parts of a run may compute."""

    name: str
    hardware: Hardware
    speed: ProductSpeed | None  # None: it was not measured, since all of its parts have GPUs
    gpu_parts: frozenset[str]  # sections of the configuration that compute on its GPUs ...
    cpu_parts: frozenset[str]  # ... and on its CPUs

    def choice(self, part: str) -> tuple[str, str]:
        """Return the precision that `auto` means for a part here, and the reason."""
        if part in self.gpu_parts:
            return _for_gpu(self.hardware)
        assert self.speed is not None, "a CPU that computes is measured"
        return _for_cpu(self.hardware, self.speed)


Measure = Callable[[Hardware, tuple[int, int]], ProductSpeed]


@dataclass(frozen=True, kw_only=True)
class DtypeChoice:
    """A configuration without `auto`."""

    config: RunConfig
    reasons: tuple[str, ...]  # one line for each choice
    warnings: tuple[str, ...]
    speed: ProductSpeed | None  # None: nothing computes on a CPU


def choose_dtypes(
    config: RunConfig,
    hardware: Hardware,
    model_directory: Path,
    *,
    measure: Measure | None = None,
    machines: Sequence[Machine] = (),
) -> DtypeChoice:
    """Return the configuration with each precision that is `auto` resolved for this machine.

    Args:
        measure: a replacement of `cached_product_speed`, for tests.
        machines: the nodes of the cluster that the run joins, which decide instead of this machine.
    """
    configured = configured_dtypes(config)
    if machines:
        return _agreed_choice(config, configured, machines)

    trains_on_gpu = hardware.gpus > 0 and config.policy.gpus_per_rank > 0
    on_gpu = {
        "generation.dtype": hardware.gpus > 0 and config.generation.gpus_per_worker > 0,
        "policy.compute_dtype": trains_on_gpu,
    }
    for field in configured:
        on_gpu.setdefault(field, trains_on_gpu)  # reference and critic run beside the policy

    speed = None
    if not all(on_gpu.values()):
        speed = (measure or cached_product_speed)(hardware, mlp_shape(model_directory))

    chosen: dict[str, str] = {}
    fields_by_reason: dict[str, list[str]] = {}
    for field, dtype in configured.items():
        if dtype != "auto":
            continue
        if on_gpu[field]:
            chosen[field], why = _for_gpu(hardware)
        else:
            assert speed is not None
            chosen[field], why = _for_cpu(hardware, speed)
        fields_by_reason.setdefault(f"auto -> {chosen[field]} ({why})", []).append(field)

    bfloat16_on_cpu = [
        field for field, dtype in configured.items() if dtype == "bfloat16" and not on_gpu[field]
    ]
    return DtypeChoice(
        config=evolve(config, chosen) if chosen else config,
        reasons=tuple(
            f"{', '.join(fields)}: {reason}" for reason, fields in fields_by_reason.items()
        ),
        warnings=_slow_bfloat16(bfloat16_on_cpu, hardware, speed),
        speed=speed,
    )


def configured_dtypes(config: RunConfig) -> dict[str, str]:
    """Return the precisions of the configuration by the names of their fields."""
    configured: dict[str, str] = {
        "generation.dtype": config.generation.dtype,
        "policy.compute_dtype": config.policy.compute_dtype,
    }
    if config.reference.compute_dtype is not None:
        configured["reference.compute_dtype"] = config.reference.compute_dtype
    if config.critic.compute_dtype is not None:
        configured["critic.compute_dtype"] = config.critic.compute_dtype
    return configured


def _agreed_choice(
    config: RunConfig, configured: Mapping[str, str], machines: Sequence[Machine]
) -> DtypeChoice:
    """Resolve each `auto` to what all machines would choose, or else to float32."""
    chosen: dict[str, str] = {}
    fields_by_reason: dict[str, list[str]] = {}
    for field, dtype in configured.items():
        if dtype != "auto":
            continue
        part = "generation" if field == "generation.dtype" else "policy"
        choices = {
            machine.name: machine.choice(part)
            for machine in machines
            if part in machine.gpu_parts | machine.cpu_parts
        }
        chosen[field], why = _agreed(choices)
        fields_by_reason.setdefault(f"auto -> {chosen[field]} ({why})", []).append(field)
    return DtypeChoice(
        config=evolve(config, chosen) if chosen else config,
        reasons=tuple(
            f"{', '.join(fields)}: {reason}" for reason, fields in fields_by_reason.items()
        ),
        warnings=(),
        speed=None,
    )


def _agreed(choices: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
    """Return the precision of all machines, or float32 where they differ, and the reason."""
    dtypes = {dtype for dtype, _ in choices.values()}
    if len(dtypes) == 1:
        reasons = dict.fromkeys(why for _, why in choices.values())
        return dtypes.pop(), f"{', '.join(choices)}: {'; '.join(reasons)}"
    each = "; ".join(f"{name}: {dtype}, {why}" for name, (dtype, why) in choices.items())
    return (
        "float32",
        f"the nodes differ, and all workers of a role compute in one precision. {each}",
    )


def _for_gpu(hardware: Hardware) -> tuple[str, str]:
    """Return the precision for a GPU, and the reason."""
    capability = hardware.compute_capability
    if capability is None and torch.cuda.is_available():  # an old nvidia-smi does not report it
        capability = torch.cuda.get_device_capability()
    if capability is None:
        return "float32", "the GPU's compute capability is not known"
    enough = capability >= FIRST_CAPABILITY_WITH_BFLOAT16
    return (
        "bfloat16" if enough else "float32",
        f"GPU of compute capability {capability[0]}.{capability[1]}; "
        f"bfloat16 from {FIRST_CAPABILITY_WITH_BFLOAT16[0]}.0 on",
    )


def _for_cpu(hardware: Hardware, speed: ProductSpeed) -> tuple[str, str]:
    """Return the precision for a CPU, and the reason."""
    fast = bool(hardware.bfloat16_instructions) and speed.speedup >= LEAST_SPEEDUP
    return "bfloat16" if fast else "float32", _measured(hardware, speed)


def _measured(hardware: Hardware, speed: ProductSpeed) -> str:
    """Describe the CPU's instructions and the measured speeds."""
    names = " or ".join((", ".join(BFLOAT16_INSTRUCTIONS[:-1]), "Arm's bf16"))
    flags = ", ".join(hardware.bfloat16_instructions) or f"no {names}"
    limits = "".join(f", {name}={os.environ[name]}" for name in ENVIRONMENT if name in os.environ)
    return (
        f"{hardware.cpu_model}, {flags}{limits}: measured {speed.bfloat16:.0f} GFLOP/s per core in "
        f"bfloat16 and {speed.float32:.0f} in float32, {speed.speedup:.2g} times as fast"
    )


def _slow_bfloat16(
    fields: list[str], hardware: Hardware, speed: ProductSpeed | None
) -> tuple[str, ...]:
    """Warn of fields that are configured as bfloat16 where float32 is faster."""
    if not fields or speed is None or speed.speedup >= 1:
        return ()
    return (
        f"{', '.join(fields)}: bfloat16 is slower than float32 here "
        f"({_measured(hardware, speed)}). "
        "Set auto or float32.",
    )


def cached_product_speed(hardware: Hardware, shape: tuple[int, int]) -> ProductSpeed:
    """Return `measure_products` on this CPU, from the cache where it was measured before."""
    key = {
        "cpu": hardware.cpu_model,
        "instructions": hardware.bfloat16_instructions,
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
        "torch": torch.__version__,
        "shape": shape,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    file = cache_directory() / "product_speed" / f"{digest}.json"
    known = _read_speed(file)
    if known is not None:
        return known
    speed = measure_products(shape)
    _write_speed(file, key, speed)
    return speed


def _read_speed(file: Path) -> ProductSpeed | None:
    try:
        speed = ProductSpeed(**json.loads(file.read_text())["gflops"])
        return speed if min(speed.float32, speed.bfloat16) > 0 else None
    except (OSError, ValueError, TypeError, KeyError):
        return None  # not measured yet, or a damaged file


def _write_speed(file: Path, key: Mapping[str, object], speed: ProductSpeed) -> None:
    """Save a measurement; where the cache cannot be written to, the next run measures again."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as partial:
            json.dump({"gflops": asdict(speed), "measured_on": key}, partial, indent=1)
        os.replace(partial.name, file)


def measure_products(shape: tuple[int, int]) -> ProductSpeed:
    """Time the products of an MLP layer of hidden x intermediate size `shape` and of its gradients.

    Measured is the thread time of one thread, and the fastest of several repetitions counts, so
    that other processes on the same cores hardly matter. This takes some ten milliseconds, or a
    second where bfloat16 is emulated.
    """
    hidden = min(shape[0], LARGEST_HIDDEN)
    intermediate = min(shape[1], LARGEST_INTERMEDIATE)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        products = {
            dtype: _mlp_products(hidden, intermediate, dtype)
            for dtype in (torch.float32, torch.bfloat16)
        }
        seconds = _fastest_in_turn(products)
    finally:
        torch.set_num_threads(before)
    flops = 3 * 2 * TOKENS * hidden * intermediate
    return ProductSpeed(
        float32=flops / seconds[torch.float32] / 1e9,
        bfloat16=flops / seconds[torch.bfloat16] / 1e9,
    )


def _mlp_products(hidden: int, intermediate: int, dtype: torch.dtype) -> Callable[[], None]:
    """Return the products of a linear layer: output, and gradients of input and weight."""
    inputs = torch.ones(TOKENS, hidden, dtype=dtype)
    weight = torch.ones(intermediate, hidden, dtype=dtype)

    @torch.no_grad()
    def run() -> None:
        outputs = torch.nn.functional.linear(inputs, weight)
        torch.mm(outputs, weight)
        torch.mm(outputs.t(), inputs)

    return run


def _fastest_in_turn(
    products: Mapping[torch.dtype, Callable[[], None]],
) -> dict[torch.dtype, float]:
    """Return the shortest time of each in seconds, repeated for at least SECONDS_EACH."""
    for run in products.values():
        run()  # the first call chooses and compiles kernels

    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in products}
    unfinished = set(products)
    while unfinished:
        for dtype in sorted(unfinished, key=str):
            began = time.thread_time()
            products[dtype]()
            seconds[dtype].append(time.thread_time() - began)
            if len(seconds[dtype]) >= MIN_REPEATS and sum(seconds[dtype]) >= SECONDS_EACH:
                unfinished.discard(dtype)
    return {dtype: min(times) for dtype, times in seconds.items()}
