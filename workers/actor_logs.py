"""Collection of what the actors of a run printed, in one folder of the driver.

Ray writes stdout and stderr of each process to a file on the node of the process. At the end of a
run, also of one that failed, these files are read: on the driver's node directly, on the others by
a task that reserves nothing. So no disk has to be shared, and processes that died are included.

Not covered: nodes that are gone or do not answer by then, and a driver that was killed. The files
are then still in Ray's session folder on each node (/tmp/ray/session_*/logs/worker-*).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ray
import ray._private.state
import ray._private.worker
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlsys.config.secrets import redacted

# The end of each file is kept: this many bytes.
KEPT_BYTES = 8 * 1024**2
TIMEOUT_S = 30.0
# Ray's name of a file: worker-<worker>-<job or ffffffff>-<process>.out or .err
FILE = re.compile(r"worker-[0-9a-f]+-[0-9a-f]+-(\d+)\.(out|err)")
# Lines that Ray writes into the files for itself.
MARKER = re.compile(rb"^:(job_id|actor_name|task_name):(.*)\n", re.MULTILINE)

_COLLECTED: set[tuple[str, int, str]] = set()


@dataclass(frozen=True, kw_only=True)
class Output:
    """What one process of the job printed on one stream."""

    process: int
    stream: str  # out or err
    actor_class: str | None
    text: bytes


def collect_actor_logs(directory: Path) -> list[str]:
    """Write the output of all processes of this job to `directory`, and return what was missed.

    A file is named by its actor (`policy-0.out`), else by the class and the process. Streams on
    which nothing was printed have no file.
    """
    job = ray.get_runtime_context().get_job_id()
    outputs: dict[str, list[Output]] = {}
    here = _own_node()
    if here is not None:
        node, folder = here
        outputs[node] = read_outputs(folder, job)

    actors = _actors_of(job)
    missed = _read_other_nodes(job, {actor.node for actor in actors}, outputs)
    names = {(actor.node, actor.process): actor.name for actor in actors}
    write_outputs(directory, new_outputs(outputs), names)
    return missed


def new_outputs(outputs: Mapping[str, Iterable[Output]]) -> dict[str, list[Output]]:
    """Return the outputs of processes that were not returned before, by node.

    A process of this program may have several runs on one connection to Ray; each run is over, and
    its actors silent, when its outputs are collected.
    """
    new = {}
    for node, of_node in outputs.items():
        new[node] = [one for one in of_node if (node, one.process, one.stream) not in _COLLECTED]
        _COLLECTED.update((node, one.process, one.stream) for one in new[node])
    return new


@dataclass(frozen=True, kw_only=True)
class _Actor:
    """The place of an actor's present or last process."""

    name: str
    node: str
    process: int


def _actors_of(job: str) -> list[_Actor]:
    """Return the actors of a job; none where Ray's table cannot be read, as through ray://."""
    try:
        table = ray._private.state.actors().values()
    except RayError:
        return []
    return [
        _Actor(name=actor["Name"], node=actor["Address"]["NodeID"], process=actor["Pid"])
        for actor in table
        if actor["JobID"] == job
    ]


def _read_other_nodes(
    job: str, used: Collection[str], outputs: dict[str, list[Output]]
) -> list[str]:
    """Add the outputs on all nodes but those that were read, and return what was missed.

    Args:
        used: the nodes of the job's actors; of others that are gone nothing is missed.
    """
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["NodeID"] not in outputs}
    addresses = {name: node["NodeManagerAddress"] for name, node in nodes.items()}
    missed = [
        f"{addresses[name]}: the node is gone"
        for name, node in nodes.items()
        if not node["Alive"] and name in used
    ]
    tasks = {_start_reading(name, job): name for name, node in nodes.items() if node["Alive"]}
    if not tasks:
        return missed

    answered, late = ray.wait(list(tasks), num_returns=len(tasks), timeout=TIMEOUT_S)
    for task in answered:
        try:
            outputs[tasks[task]] = ray.get(task)
        except RayError as error:
            reason = str(error).strip().splitlines()[-1]
            missed.append(f"{addresses[tasks[task]]}: {reason}")
    missed += [f"{addresses[tasks[task]]}: no answer within {TIMEOUT_S:.0f} s" for task in late]
    return missed


def _own_node() -> tuple[str, Path] | None:
    """Return this process's node and its folder of logs; None where it joined through ray://."""
    node = ray._private.worker._global_node
    if node is None:
        return None
    return ray.get_runtime_context().get_node_id(), Path(node.get_logs_dir_path())


def _start_reading(node: str, job: str) -> ray.ObjectRef:
    place = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(_read_here).options(num_cpus=0, max_retries=0, scheduling_strategy=place)
    return task.remote(job)


def _read_here(job: str) -> list[Output]:
    """Read the outputs on the node of this task."""
    own = _own_node()
    assert own is not None, "a task runs on a node"
    return read_outputs(own[1], job)


def read_outputs(folder: Path, job: str, limit: int = KEPT_BYTES) -> list[Output]:
    """Return what the processes of a job printed, of each stream the last `limit` bytes."""
    outputs = []
    for file in sorted(folder.glob("worker-*")):
        match = FILE.fullmatch(file.name)
        if match is None:
            continue
        with file.open("rb") as stream:
            markers = dict(MARKER.findall(stream.read(4096)))
            if markers.get(b"job_id", b"").decode() != job:
                continue  # of another run on this cluster, or a process that did nothing
            size = file.stat().st_size
            stream.seek(max(0, size - limit))
            text = MARKER.sub(b"", stream.read(limit))
        if size > limit:
            text = f"[the first {size - limit} bytes are in {file}]\n".encode() + text
        actor_class = markers.get(b"actor_name")
        outputs.append(
            Output(
                process=int(match[1]),
                stream=match[2],
                actor_class=actor_class.decode(errors="replace") if actor_class else None,
                text=text,
            )
        )
    return outputs


def write_outputs(
    directory: Path,
    outputs: Mapping[str, Iterable[Output]],
    names: Mapping[tuple[str, int], str],
) -> None:
    """Write a file for each stream on which something was printed.

    Args:
        outputs: by node.
        names: of the actors, by node and process. A process that is not there was replaced by a
            later one of the same actor.
    """
    for node, of_node in outputs.items():
        for output in of_node:
            if not output.text.strip():
                continue
            name = names.get((node, output.process))
            name = name or f"{output.actor_class or 'worker'}-{output.process}"
            directory.mkdir(parents=True, exist_ok=True)
            file = directory / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.{output.stream}"
            # After a resume the earlier processes of the run stay in the file, above the later.
            with file.open("a", encoding="utf-8") as stream:
                stream.write(redacted(output.text.decode(errors="replace")))


def keep_actor_logs(directory: Path) -> list[str]:
    """Do what `collect_actor_logs` does, without raising, since the run's result is decided.

    Without a connection to Ray there is no output, and Ray's functions would start another Ray.
    """
    if not ray.is_initialized():
        return []
    try:
        return collect_actor_logs(directory)
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
