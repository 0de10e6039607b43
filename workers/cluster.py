"""The Ray cluster of one run: connect, reserve resources, spawn actors into them, shut down in order.

    role          bundle                   CPUs             GPUs
    generation    one per worker           cpus_per_worker  gpus_per_worker
    policy        one per rank             cpus_per_rank    gpus_per_rank
    reference     the policy rank's own    0                shares the rank's GPU
    reward, advantage                      0                0

All bundles belong to one placement group, so a run starts with everything that it needs or not at all. The last row's actors
reserve nothing: they work while the others wait.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlsys.config import ConfigError, RunConfig
from rlsys.config.hardware import detect_hardware
from workers.local_ray import LocalRay, interrupt_on_sigterm

logger = logging.getLogger(__name__)

RESERVATION_TIMEOUT_S = 120.0

# glibc gives large blocks back to the system when they are freed and zeroes them again when they come back; keeping them makes a training
# step on a CPU a quarter faster.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """Resources of one actor (and of those that share its place)."""

    role: str
    index: int
    cpus: float
    gpus: float

    @property
    def resources(self) -> dict[str, float]:
        # A bundle may not be empty: one that reserves no core reserves a mebibyte.
        return ({"CPU": self.cpus} if self.cpus else {"memory": 1024**2}) | (
            {"GPU": self.gpus} if self.gpus else {}
        )


def bundles_of(config: RunConfig, *, with_gpus: bool) -> tuple[Bundle, ...]:
    """The resources that a run reserves, policy ranks first."""
    policy, generation = config.policy, config.generation
    return (
        *(
            Bundle(
                role="policy",
                index=rank,
                cpus=policy.cpus_per_rank,
                gpus=policy.gpus_per_rank if with_gpus else 0,
            )
            for rank in range(policy.ranks)
        ),
        *(
            Bundle(
                role="generation",
                index=index,
                cpus=generation.cpus_per_worker,
                gpus=generation.gpus_per_worker * generation.tensor_parallel if with_gpus else 0,
            )
            for index in range(generation.workers)
        ),
    )


@dataclass
class Cluster:
    """A connection to Ray with this run's reservation. Use `Cluster.connect`, and `shutdown` in a `finally`."""

    bundles: tuple[Bundle, ...]
    reservation: PlacementGroup
    leave_ray: Callable[[], None]
    threads: Mapping[str, int]
    actors: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def connect(cls, config: RunConfig) -> Cluster:
        """Join `cluster.address` or RAY_ADDRESS, else start Ray on this machine, and reserve the run's resources.

        Raises:
            ConfigError: the cluster has too few CPUs or GPUs.
        """
        started, local = ray.is_initialized(), LocalRay()
        leave_ray = (
            _stay if started else ray.shutdown if config.cluster.joined_address else local.stop
        )
        try:
            if not started:
                _connect_to_ray(config, local)
            available = ray.cluster_resources()
            bundles = bundles_of(config, with_gpus=available.get("GPU", 0) > 0)
            _check_capacity(bundles, available)
            reservation = placement_group([bundle.resources for bundle in bundles], strategy="PACK")
            if not reservation.wait(RESERVATION_TIMEOUT_S):
                remove_placement_group(reservation)
                raise ConfigError(
                    f"policy.ranks, generation.workers: the cluster did not free {_total(bundles)} within "
                    f"{RESERVATION_TIMEOUT_S:.0f} s. Other jobs hold its resources: wait for them, or ask for less."
                )
        except BaseException:
            leave_ray()
            raise
        return cls(
            bundles=bundles, reservation=reservation, leave_ray=leave_ray, threads=_threads(config)
        )

    def spawn(
        self,
        role: str,
        index: int,
        actor_class: type,
        *args: Any,
        shares: str | None = None,
        **options: Any,
    ) -> Any:
        """Start `actor_class(*args)` as actor `role` number `index`.

        It is placed in the bundle of its role, or in that of role `shares` (reserving no CPU of its own there); a role
        without a bundle goes anywhere. `options` are Ray's (max_concurrency, num_gpus, ...).
        """
        place = shares or role
        position = next(
            (
                i
                for i, bundle in enumerate(self.bundles)
                if (bundle.role, bundle.index) == (place, index)
            ),
            None,
        )
        options.setdefault("num_cpus", 0)
        if position is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self.reservation, placement_group_bundle_index=position
            )
            if not shares:
                options |= {
                    "num_cpus": self.bundles[position].cpus,
                    "num_gpus": self.bundles[position].gpus,
                }
        environment = {
            "OMP_NUM_THREADS": str(self.threads.get(place, 1)),
            "TOKENIZERS_PARALLELISM": "false",
        } | ALLOCATOR
        remote_class: Any = ray.remote(actor_class)  # Ray's stubs know no class given at run time
        actor = remote_class.options(runtime_env={"env_vars": environment}, **options).remote(*args)
        self.actors[f"{role}-{index}"] = actor
        return actor

    async def wait_until_ready(self) -> None:
        """Return when every actor spawned so far has been constructed; the first failure is raised, with the actor's name."""

        async def ready(name: str, actor: Any) -> None:
            try:
                await actor.__ray_ready__.remote()
            except RayError as error:
                raise RuntimeError(f"actor {name} did not start: {error}") from error

        await asyncio.gather(*(ready(name, actor) for name, actor in self.actors.items()))

    def shutdown(self) -> None:
        """Kill the actors, give the reservation back, and stop Ray if this run started it."""
        for actor in self.actors.values():
            ray.kill(actor)
        self.actors.clear()
        remove_placement_group(self.reservation)
        self.leave_ray()


def _stay() -> None:
    """Ray was there before this run."""


def _connect_to_ray(config: RunConfig, local: LocalRay) -> None:
    address = config.cluster.joined_address
    settings: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": False,
    }
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # an actor without GPUs sees none
    if address:
        try:
            ray.init(address=address, **settings)
        except ConnectionError as error:
            field = "cluster.address" if config.cluster.address else "RAY_ADDRESS"
            raise ConfigError(
                f"{field}: no cluster answers at {address!r}. Start the head node with `ray start --head`, or leave it out to start Ray here."
            ) from error
        interrupt_on_sigterm()
    else:
        # One user's own Ray asks for a token by default, and would say so at every start.
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(
            logging.ERROR
        )
        hardware = detect_hardware()  # Ray by itself would count the CPUs of a container's host
        local.start(
            num_cpus=hardware.cpus,
            object_store_memory=int(config.cluster.object_store_gib * 1024**3),
            **settings,
        )
    logger.info(
        "ray: %s, resources %s", address or "started on this machine", ray.cluster_resources()
    )


def _total(bundles: tuple[Bundle, ...]) -> str:
    cpus, gpus = sum(bundle.cpus for bundle in bundles), sum(bundle.gpus for bundle in bundles)
    return f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")


def _check_capacity(bundles: tuple[Bundle, ...], available: Mapping[str, float]) -> None:
    for resource, wanted in (
        ("CPU", sum(b.cpus for b in bundles)),
        ("GPU", sum(b.gpus for b in bundles)),
    ):
        if wanted > available.get(resource, 0):
            raise ConfigError(
                f"policy.ranks, generation.workers: the run needs {wanted:g} {resource}s, the cluster has "
                f"{available.get(resource, 0):g}. Lower policy.ranks, generation.workers or their {resource.lower()}s each, "
                "or use a larger cluster."
            )


def _threads(config: RunConfig) -> dict[str, int]:
    """Torch threads of the actors that compute on a CPU: generation and policy take turns, so each gets all cores."""
    cores = detect_hardware().cpus
    return {
        "policy": config.policy.threads_per_rank or max(1, cores // config.policy.ranks),
        "generation": max(1, cores // config.generation.workers),
    }
