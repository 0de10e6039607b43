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
all. The reward workers and the advantage controller reserve nothing: they work while the other
actors wait. Reward workers take the nodes in turn, the driver's first; the advantage controller
runs on the driver's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray._private.worker
from ray.exceptions import ActorUnschedulableError, RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from rlsys.config import ConfigError, RunConfig
from rlsys.config.hardware import detect_hardware
from rlsys.config.node_label import split_label
from rlsys.driver.faults import FaultLog
from rlsys.models.saving import model_files
from rlsys.rewards import reward_model_of
from workers.local_ray import LocalRay, interrupt_on_sigterm, refuses_token
from workers.node_folders import NodeFolders
from workers.placement import (
    COUNT,
    ClusterNode,
    Place,
    bundle_nodes,
    cluster_nodes,
    driver_node,
    free_resources,
    in_words,
    label_mistake,
    node_answers,
    placement_mistakes,
    places_table,
)
from workers.stack_dumps import answer_with_stacks
from workers.supervision import SupervisedActor
from workers.user_code import code_mistakes, user_code_environment

logger = logging.getLogger(__name__)

RESERVATION_TIMEOUT_S = 120.0
PLACES_EVERY_S = 1.0  # between two looks whether lost places are there again

# An actor that reserves no GPU sees all of them. With a part of its host's it sees that one alone.
GUEST_GPUS = 0.01

# glibc returns large blocks to the system when they are freed, and the system zeroes them before
# they are used again. Keeping them makes a training step on a CPU a quarter faster.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}


# How many actors of a name this process has started, by the address of the cluster, the job and the
# name.
_STARTED: Counter[tuple[str, str, str]] = Counter()


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
    label: str | None = None  # of the nodes on which it may be, as name=value

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

    guests = len(guests_of(config))
    guest_gpus = min(GUEST_GPUS, gpus_per_rank / (1 + guests)) if guests else 0

    ranks = [
        Bundle(
            role="policy",
            index=rank,
            cpus=policy.cpus_per_rank,
            gpus=gpus_per_rank,
            guests=guests,
            guest_gpus=guest_gpus,
            label=policy.node_label,
        )
        for rank in range(policy.ranks)
    ]
    workers = [
        Bundle(
            role="generation",
            index=index,
            cpus=generation.cpus_per_worker,
            gpus=gpus_per_worker,
            label=generation.node_label,
        )
        for index in range(generation.workers)
    ]
    return tuple(bundle for bundle in (*ranks, *workers) if bundle.role in roles)


def guests_of(config: RunConfig) -> tuple[str, ...]:
    """Return the roles whose ranks run beside those of the policy."""
    has_reward_model = reward_model_of(config.reward.functions) is not None
    present = {
        "reference": config.algorithm.kl.coefficient > 0,
        "critic": config.critic.enabled,
        "reward_model": has_reward_model,
    }
    return tuple(role for role, is_there in present.items() if is_there)


@dataclass
class Cluster:
    """A connection to Ray with this run's reservation.

    Create it with `Cluster.connect`, and call `shutdown` in a `finally`.
    """

    bundles: tuple[Bundle, ...]
    reservation: PlacementGroup
    leave_ray: Callable[[], None]
    config: RunConfig
    faults: FaultLog = field(default_factory=FaultLog)  # that supervised actors write to
    actors: dict[str, Any] = field(default_factory=dict)
    supervised: dict[str, SupervisedActor] = field(default_factory=dict)
    folders: NodeFolders = field(default_factory=NodeFolders)
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
                connect_to_ray(config, local)
            nodes = cluster_nodes()
            with_gpus = any(node.has("GPU") for node in nodes)
            bundles = bundles_of(config, with_gpus=with_gpus, roles=roles)
            _check_capacity(bundles, nodes, config)
            reservation = _reserve(bundles, config.cluster.placement)
        except BaseException:  # an interrupt must not leave Ray running either
            leave_ray()
            raise

        cluster = cls(bundles=bundles, reservation=reservation, leave_ray=leave_ray, config=config)
        try:
            cluster.check_user_code()
        except BaseException:
            cluster.shutdown()
            raise
        return cluster

    def check_user_code(self) -> None:
        """Refuse plug-ins that are not the same on all nodes of the run.

        Raises:
            ConfigError: the module, and where each of the two is found.
        """
        unreserved = [self.node_of("reward", index) for index in range(self.config.reward.workers)]
        used = {*bundle_nodes(self.reservation), *unreserved} - {driver_node()}
        addresses = {node.node_id: node.address for node in cluster_nodes()}
        lines = list(code_mistakes(self.config.plugins, {node: addresses[node] for node in used}))
        if lines:
            raise ConfigError("\n".join(lines))

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
            args: a `Path` is a model directory of this machine: the actor gets the path of the same
                files on its node, to which they are sent where the node does not have them.
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

        # Ray's type stubs do not accept a class that is known only at run time.
        remote_class: Any = ray.remote(actor_class)

        def start() -> Any:
            # At every start, since a place may be on another node after the loss of its own.
            node = self.node_of(place, index)
            where: dict[str, Any] = {
                "runtime_env": {"env_vars": self._environment(place, node)},
            }
            if position is None:
                where["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
            local = [self.on_node(arg, node) if isinstance(arg, Path) else arg for arg in args]
            return remote_class.options(**options, **where, **_identity(role, index)).remote(*local)

        name = f"{role}-{index}"
        self._starts[name] = start
        self.actors[name] = start()
        return self.actors[name]

    def _environment(self, place: str, node: str) -> dict[str, str]:
        """Return the environment variables of an actor."""
        # By default Ray sets OMP_NUM_THREADS to the number of CPUs that an actor reserves.
        return {
            "OMP_NUM_THREADS": str(self._threads(place, node)),
            "TOKENIZERS_PARALLELISM": "false",
        } | ALLOCATOR

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
        role, _, index = name.rpartition("-")
        await self._wait_for_places(name)
        # An actor's death is seen at once, that of its node only after a time.
        while not await node_answers(self.node_of(role, int(index))):
            await asyncio.sleep(PLACES_EVERY_S)
            await self._wait_for_places(name)
        self.actors[name] = self._starts[name]()
        await self.actors[name].__ray_call__.remote(answer_with_stacks)
        return self.actors[name]

    async def _wait_for_places(self, name: str) -> None:
        """Wait until the reservation is whole again, where it has lost a node.

        Raises:
            ActorUnschedulableError: it was not within `cluster.recovery_timeout_s`, and no other
                actor of the role works meanwhile. A restart of all may do with fewer.
        """
        role, _, index = name.rpartition("-")
        if self._bundle_position(role, int(index)) is None:
            return

        limit = self.config.cluster.recovery_timeout_s
        began = time.monotonic()
        while placement_group_table(self.reservation)["state"] == "RESCHEDULING":
            alike = (self.supervised[one] for one in self._names_of(role))
            if time.monotonic() - began >= limit and not any(one.is_ready for one in alike):
                raise ActorUnschedulableError(
                    f"{name}: its node is gone, and the cluster had no place for it within "
                    f"{limit:g} s (cluster.recovery_timeout_s)"
                )
            await asyncio.sleep(PLACES_EVERY_S)

    def _bundle_position(self, role: str, index: int) -> int | None:
        """Return the position of a bundle in the reservation; None if there is no such bundle."""
        for position, bundle in enumerate(self.bundles):
            if (bundle.role, bundle.index) == (role, index):
                return position
        return None

    def node_of(self, role: str, index: int) -> str:
        """Return the id of the node of actor number `index` of a role that reserves its place.

        The nodes of the others are chosen here: for the reward workers in turn, the driver's first.

        Raises:
            ConfigError: no node has the label of the role.
        """
        position = self._bundle_position(role, index)
        if position is not None:
            return bundle_nodes(self.reservation)[position]
        label = self.config.reward.node_label if role == "reward" else None
        allowed = _unreserved_nodes(role, label)
        return allowed[index % len(allowed) if role == "reward" else 0].node_id

    def on_node(self, directory: Path, node: str) -> str:
        """Return the path of a model directory of this machine on a node.

        The first call for a directory sends it to all nodes of the reservation that lack it.
        """
        # The processes of a cluster that was joined have other working folders.
        directory = directory.absolute()
        # The place of a node that died has no node until it is made again.
        nodes = {node, *filter(None, bundle_nodes(self.reservation))}
        self.folders.deliver(directory, model_files(directory), nodes)
        return self.folders.on(directory, node)

    def _threads(self, role: str, node: str) -> int:
        """Return the number of torch threads of an actor that computes on a CPU."""
        if role not in COUNT:
            return 1
        if role == "policy" and self.config.policy.threads_per_rank:
            return self.config.policy.threads_per_rank

        # Generation and policy take turns, so each gets all cores of a node.
        nodes = bundle_nodes(self.reservation)
        sharing = sum(
            bundle.role == role and where == node
            for bundle, where in zip(self.bundles, nodes, strict=True)
        )
        return max(1, _cores_of(node) // max(1, sharing))

    def places(self, unreserved: Mapping[str, int]) -> str:
        """Return the place of every actor as a table.

        Args:
            unreserved: how many actors there are of the roles that reserve nothing.
        """
        addresses = {node.node_id: node.address for node in cluster_nodes()}
        nodes, beside = bundle_nodes(self.reservation), guests_of(self.config)
        rows = [
            Place(
                actor=", ".join(
                    f"{role}-{bundle.index}"
                    for role in (bundle.role, *(beside if bundle.guests else ()))
                ),
                address=addresses[node],
                reserves=in_words(bundle.resources),
            )
            for bundle, node in zip(self.bundles, nodes, strict=True)
        ]
        rows += [
            Place(
                actor=f"{role}-{index}",
                address=addresses[self.node_of(role, index)],
                reserves="nothing",
            )
            for role, count in unreserved.items()
            for index in range(count)
        ]
        return places_table(rows)

    async def wait_until_ready(self, actors: Collection[Any] | None = None) -> None:
        """Wait until `actors`, or every actor spawned so far, have been constructed.

        Raises:
            RuntimeError: the first failure, with the actor's name.
        """

        async def ready(name: str, actor: Any) -> None:
            # An error of a constructor shows only in the first call of a method.
            try:
                await actor.__ray_call__.remote(answer_with_stacks)
            except RayError as error:
                raise RuntimeError(f"actor {name} did not start: {error}") from error

        awaited = {
            name: actor
            for name, actor in self.actors.items()
            if actors is None or any(actor is one for one in actors)
        }
        await asyncio.gather(*(ready(name, actor) for name, actor in awaited.items()))

    def supervised_of(self, role: str) -> list[SupervisedActor]:
        """Return the supervised actors of a role."""
        return [self.supervised[name] for name in self._names_of(role)]

    def _names_of(self, role: str) -> list[str]:
        return [name for name in self.actors if name.rpartition("-")[0] == role]

    def stop(self, role: str) -> None:
        """Kill the actors of a role; their places in the reservation become free."""
        for name in self._names_of(role):
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


def _identity(role: str, index: int) -> dict[str, str]:
    """Return the name of an actor in Ray's dashboard, in `ray list actors` and of its log files.

    It is role and index, as in `policy-0`; a later actor in the same place is `policy-0.2`, since
    Ray frees a name only some time after the actor's end. Jobs have namespaces of their own.
    """
    context = ray.get_runtime_context()
    name, job = f"{role}-{index}", context.get_job_id()
    place = (context.gcs_address, job, name)
    _STARTED[place] += 1
    if _STARTED[place] > 1:
        name = f"{name}.{_STARTED[place]}"
    return {"name": name, "namespace": f"rlsys-{job}"}


def _stay_connected() -> None:
    """Do nothing: this process was connected to Ray before the run."""


def connect_to_ray(config: RunConfig, local: LocalRay) -> None:
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
            ray.init(address=address, runtime_env=user_code_environment(config.plugins), **settings)
        except ConnectionError as error:
            setting = "cluster.address" if config.cluster.address else "RAY_ADDRESS"
            if refuses_token(error):
                raise ConfigError(
                    f"{setting}: the cluster at {address!r} refuses the token. Set "
                    "RAY_AUTH_MODE=token, and copy the head's ~/.ray/auth_token or set "
                    "RAY_AUTH_TOKEN."
                ) from error
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


def _reserve(bundles: tuple[Bundle, ...], strategy: str) -> PlacementGroup:
    """Reserve the bundles.

    Raises:
        CapacityError: the cluster did not free them in time.
    """
    labels = [dict([split_label(bundle.label)]) if bundle.label else {} for bundle in bundles]
    reservation = placement_group(
        [bundle.resources for bundle in bundles],
        strategy=strategy,
        bundle_label_selector=labels if any(labels) else None,  # pyright: ignore[reportArgumentType]
    )
    if not reservation.wait(RESERVATION_TIMEOUT_S):
        free = free_resources(cluster_nodes())
        remove_placement_group(reservation)
        raise CapacityError(
            f"{_fields(bundles)}: the cluster did not free {_total(bundles)} within "
            f"{RESERVATION_TIMEOUT_S:.0f} s, since other jobs hold its resources, or they do not "
            f"fit together on its nodes ({free}). Wait for them, or lower "
            f"{_fields(bundles, ' or ')}."
        )
    return reservation


def _fields(bundles: tuple[Bundle, ...], separator: str = ", ") -> str:
    """Return the fields that decide how many bundles there are."""
    roles = dict.fromkeys(bundle.role for bundle in bundles)
    return separator.join(COUNT[role] for role in roles)


def _total(bundles: tuple[Bundle, ...]) -> str:
    """Return the sum of the bundles in words."""
    cpus = sum(bundle.cpus for bundle in bundles)
    gpus = sum(bundle.gpus for bundle in bundles)
    return f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")


def _check_capacity(
    bundles: tuple[Bundle, ...], nodes: tuple[ClusterNode, ...], config: RunConfig
) -> None:
    """Refuse a run that the whole cluster is too small for, or that no node has the labels for.

    Raises:
        CapacityError: the field, what is needed, and what each node has.
    """
    lines = list(placement_mistakes(bundles, nodes, config.cluster.placement))
    label = config.reward.node_label
    if not any(node.has_label(label) for node in nodes):
        lines.append(label_mistake("reward", label, nodes))
    if lines:
        raise CapacityError("\n".join(lines))


def _unreserved_nodes(role: str, label: str | None) -> list[ClusterNode]:
    """Return the nodes of actors that reserve nothing, the driver's first.

    Raises:
        ConfigError: no node has the label.
    """
    nodes, own = cluster_nodes(), driver_node()
    allowed = [node for node in nodes if node.has_label(label)]
    if not allowed:
        raise CapacityError(label_mistake(role, label, nodes))
    return sorted(allowed, key=lambda node: node.node_id != own)


def _cores_of(node: str) -> int:
    """Return how many cores the actors on a node may use."""
    if node == driver_node():
        return detect_hardware().cpus
    return next((int(one.has("CPU")) for one in cluster_nodes() if one.node_id == node), 1)
