"""The Ray cluster of one run: connect, reserve resources, spawn actors, shut down in order.

    role          bundle                        CPUs             GPUs
    generation    one per worker                cpus_per_worker  gpus_per_worker
    policy        one per rank                  cpus_per_rank    gpus_per_rank
    reference     that of the policy's rank     0                shares the rank's GPU
    critic        that of the policy's rank     0                shares the rank's GPU
    reward_model  that of the policy's rank     0                shares the rank's GPU
    reward        none                          0                0
    advantage     none                          0                0

All bundles belong to one placement group, so a run starts with everything that it needs or not at
all. The reward worker and the advantage controller reserve nothing: they work while the other
actors wait.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
import ray._private.worker
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlsys.config import ConfigError, RunConfig
from rlsys.config.hardware import detect_hardware
from rlsys.driver.faults import FaultLog
from rlsys.rewards import reward_model_of
from workers.local_ray import LocalRay, interrupt_on_sigterm
from workers.stack_dumps import answer_with_stacks
from workers.supervision import SupervisedActor

logger = logging.getLogger(__name__)

RESERVATION_TIMEOUT_S = 120.0

# An actor that reserves no GPU sees all of them. With a part of its host's it sees that one alone.
GUEST_GPUS = 0.01

# glibc returns large blocks to the system when they are freed, and the system zeroes them before
# they are used again. Keeping them makes a training step on a CPU a quarter faster.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}


class CapacityError(ConfigError):
    """A cluster that is not there or too small, which may change while a run waits."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The resources of one actor, and of those that share its place."""

    role: str
    index: int
    cpus: float
    gpus: float
    guests: int = 0  # actors that share the place
    guest_gpus: float = 0.0  # of `gpus`, for each of them

    @property
    def resources(self) -> dict[str, float]:
        """The resources as Ray names them."""
        # Ray refuses an empty bundle: one that reserves no core reserves a mebibyte.
        resources: dict[str, float] = {"CPU": self.cpus} if self.cpus else {"memory": 1024**2}
        if self.gpus:
            resources["GPU"] = self.gpus
        return resources


def bundles_of(
    config: RunConfig, *, with_gpus: bool, roles: Collection[str] = ("policy", "generation")
) -> tuple[Bundle, ...]:
    """Return the resources that the `roles` of a run reserve, policy ranks first."""
    policy = config.policy
    generation = config.generation
    gpus_per_rank = policy.gpus_per_rank if with_gpus else 0
    gpus_per_worker = generation.gpus_per_worker * generation.tensor_parallel if with_gpus else 0

    has_reference = config.algorithm.kl.coefficient > 0
    has_reward_model = reward_model_of(config.reward.functions) is not None
    guests = has_reference + config.critic.enabled + has_reward_model
    guest_gpus = min(GUEST_GPUS, gpus_per_rank / (1 + guests)) if guests else 0

    ranks = [
        Bundle(
            role="policy",
            index=rank,
            cpus=policy.cpus_per_rank,
            gpus=gpus_per_rank,
            guests=guests,
            guest_gpus=guest_gpus,
        )
        for rank in range(policy.ranks)
    ]
    workers = [
        Bundle(
            role="generation", index=index, cpus=generation.cpus_per_worker, gpus=gpus_per_worker
        )
        for index in range(generation.workers)
    ]
    return tuple(bundle for bundle in (*ranks, *workers) if bundle.role in roles)


@dataclass
class Cluster:
    """A connection to Ray with this run's reservation.

    Create it with `Cluster.connect`, and call `shutdown` in a `finally`.
    """

    bundles: tuple[Bundle, ...]
    reservation: PlacementGroup
    leave_ray: Callable[[], None]
    threads: Mapping[str, int]
    faults: FaultLog = field(default_factory=FaultLog)  # that supervised actors write to
    actors: dict[str, Any] = field(default_factory=dict)
    supervised: dict[str, SupervisedActor] = field(default_factory=dict)
    _starts: dict[str, Callable[[], Any]] = field(default_factory=dict)

    @classmethod
    def connect(
        cls, config: RunConfig, roles: Collection[str] = ("policy", "generation")
    ) -> Cluster:
        """Connect to Ray and reserve the resources of the `roles` that the run has.

        An existing connection of this process is used; else the cluster at `cluster.address` or
        RAY_ADDRESS is joined; else Ray is started on this machine.

        Raises:
            CapacityError: no cluster answers, or it has too few CPUs or GPUs.
        """
        connected = ray.is_initialized()
        local = LocalRay()
        leave_ray = local.stop
        if connected:
            leave_ray = _stay_connected
        elif config.cluster.joined_address:
            leave_ray = ray.shutdown

        try:
            if not connected:
                _connect_to_ray(config, local)
            available = ray.cluster_resources()
            with_gpus = available.get("GPU", 0) > 0
            bundles = bundles_of(config, with_gpus=with_gpus, roles=roles)
            _check_capacity(bundles, available)
            reservation = _reserve(bundles)
        except BaseException:  # an interrupt must not leave Ray running either
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
        """Start `actor_class(*args)` as actor number `index` of `role`.

        Args:
            shares: a role in whose bundle the actor is placed, on the same GPU and without CPUs of
                its own. Otherwise it is placed in the bundle of `role`, or anywhere if that has
                none.
            options: Ray's options of an actor (max_concurrency, num_gpus, ...).
        """
        place = shares or role
        options.setdefault("num_cpus", 0)
        position = self._bundle_position(place, index)
        if position is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self.reservation, placement_group_bundle_index=position
            )
            bundle = self.bundles[position]
            if shares:
                options["num_gpus"] = bundle.guest_gpus
            else:
                options["num_cpus"] = bundle.cpus
                options["num_gpus"] = bundle.gpus - bundle.guests * bundle.guest_gpus

        # By default Ray sets OMP_NUM_THREADS to the number of CPUs that an actor reserves.
        environment = {
            "OMP_NUM_THREADS": str(self.threads.get(place, 1)),
            "TOKENIZERS_PARALLELISM": "false",
        } | ALLOCATOR
        # Ray's type stubs do not accept a class that is known only at run time.
        remote_class: Any = ray.remote(actor_class)
        placed = remote_class.options(runtime_env={"env_vars": environment}, **options)
        name = f"{role}-{index}"
        self._starts[name] = lambda: placed.remote(*args)
        self.actors[name] = self._starts[name]()
        return self.actors[name]

    def supervise(self, role: str, index: int, *, kind: str, called: str) -> SupervisedActor:
        """Return the supervision of a spawned actor, which restarts it when its process dies.

        Args:
            kind: of its faults, see `FAULT_KINDS`.
            called: its name for the user, such as "generation worker 1".
        """
        name = f"{role}-{index}"
        self.supervised[name] = SupervisedActor(
            called,
            self.actors[name],
            kind=kind,
            restart=lambda: self._restart(name),
            faults=self.faults,
        )
        return self.supervised[name]

    async def _restart(self, name: str) -> Any:
        """Start an actor again, with the same arguments in the same place."""
        # One that only cannot be reached may be alive, and its place must be free.
        ray.kill(self.actors[name])
        self.actors[name] = self._starts[name]()
        await self.actors[name].__ray_call__.remote(answer_with_stacks)
        return self.actors[name]

    def _bundle_position(self, role: str, index: int) -> int | None:
        """Return the position of a bundle in the reservation; None if there is no such bundle."""
        for position, bundle in enumerate(self.bundles):
            if (bundle.role, bundle.index) == (role, index):
                return position
        return None

    async def wait_until_ready(self) -> None:
        """Wait until every actor spawned so far has been constructed.

        Raises:
            RuntimeError: the first failure, with the actor's name.
        """

        async def ready(name: str, actor: Any) -> None:
            # An error of a constructor shows only in the first call of a method.
            try:
                await actor.__ray_call__.remote(answer_with_stacks)
            except RayError as error:
                raise RuntimeError(f"actor {name} did not start: {error}") from error

        await asyncio.gather(*(ready(name, actor) for name, actor in self.actors.items()))

    def stop(self, role: str) -> None:
        """Kill the actors of a role; their places in the reservation become free."""
        for name in [name for name in self.actors if name.rpartition("-")[0] == role]:
            if name in self.supervised:
                self.supervised.pop(name).close()
            ray.kill(self.actors.pop(name))

    def shutdown(self) -> None:
        """Kill the actors, release the reservation, and stop Ray if this run started it."""
        for supervision in self.supervised.values():
            supervision.close()
        self.supervised.clear()
        try:
            for actor in self.actors.values():
                ray.kill(actor)
            remove_placement_group(self.reservation)
        except Exception:  # Ray itself may be what failed; that is reported elsewhere
            logger.warning("the actors could not be stopped one by one", exc_info=True)
        finally:
            self.actors.clear()
            self.leave_ray()


def _stay_connected() -> None:
    """Do nothing: this process was connected to Ray before the run."""


def _connect_to_ray(config: RunConfig, local: LocalRay) -> None:
    """Join the configured cluster, or start Ray on this machine.

    Raises:
        CapacityError: no cluster answers at the configured address.
    """
    address = config.cluster.joined_address
    settings: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": False,
    }
    # Ray 2.60 asks for a choice: an actor that reserves no GPU goes on seeing all of them.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

    if address:
        try:
            ray.init(address=address, **settings)
        except ConnectionError as error:
            setting = "cluster.address" if config.cluster.address else "RAY_ADDRESS"
            raise CapacityError(
                f"{setting}: no cluster answers at {address!r}. Start the head node with "
                f"`ray start --head`, or leave {setting} out to start Ray on this machine."
            ) from error
        interrupt_on_sigterm()
    else:
        # By default Ray creates a token for its own user, and logs so at every start.
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(
            logging.ERROR
        )
        # Ray itself would count the CPUs of a container's host.
        hardware = detect_hardware()
        local.start(
            num_cpus=hardware.cpus,
            object_store_memory=int(config.cluster.object_store_gib * 1024**3),
            **settings,
        )
    _log_what_ray_reports()
    logger.info(
        "ray: %s, resources %s", address or "started on this machine", ray.cluster_resources()
    )


def _log_what_ray_reports() -> None:
    """Write Ray's reports, such as a worker that died, to the run's log.

    Ray prints them over the display, a paragraph for each death; it has no setting for them.
    """

    def write(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
        for line in data["lines"]:
            logger.info("ray: %s", line)

    ray._private.worker.print_to_stdstream = write


def _reserve(bundles: tuple[Bundle, ...]) -> PlacementGroup:
    """Reserve the bundles.

    Raises:
        CapacityError: the cluster did not free them in time.
    """
    # PACK places the bundles on as few nodes as possible.
    reservation = placement_group([bundle.resources for bundle in bundles], strategy="PACK")
    if not reservation.wait(RESERVATION_TIMEOUT_S):
        remove_placement_group(reservation)
        raise CapacityError(
            f"{_fields(bundles)}: the cluster did not free {_total(bundles)} within "
            f"{RESERVATION_TIMEOUT_S:.0f} s, since other jobs hold its resources. Wait for them, "
            f"or lower {_fields(bundles, ' or ')}."
        )
    return reservation


def _fields(bundles: tuple[Bundle, ...], separator: str = ", ") -> str:
    """Return the fields that decide how many bundles there are."""
    names = {"policy": "policy.ranks", "generation": "generation.workers"}
    roles = dict.fromkeys(bundle.role for bundle in bundles)
    return separator.join(names[role] for role in roles)


def _total(bundles: tuple[Bundle, ...]) -> str:
    """Return the sum of the bundles in words."""
    cpus = sum(bundle.cpus for bundle in bundles)
    gpus = sum(bundle.gpus for bundle in bundles)
    return f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")


def _check_capacity(bundles: tuple[Bundle, ...], available: Mapping[str, float]) -> None:
    """Refuse a run that the whole cluster is too small for.

    Raises:
        CapacityError: the resource, how much is needed, and how much there is.
    """
    required = {
        "CPU": sum(bundle.cpus for bundle in bundles),
        "GPU": sum(bundle.gpus for bundle in bundles),
    }
    for resource, needed in required.items():
        total = available.get(resource, 0)
        if needed > total:
            raise CapacityError(
                f"{_fields(bundles)}: the run needs {needed:g} {resource}s, the cluster has "
                f"{total:g}. Lower {_fields(bundles)} or the {resource}s of each, or use a larger "
                "cluster."
            )


def _threads(config: RunConfig) -> dict[str, int]:
    """Return the number of torch threads of the actors that compute on a CPU, by role."""
    # Generation and policy take turns, so each gets all cores.
    cores = detect_hardware().cpus
    return {
        "policy": config.policy.threads_per_rank or max(1, cores // config.policy.ranks),
        "generation": max(1, cores // config.generation.workers),
    }
