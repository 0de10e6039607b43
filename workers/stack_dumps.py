"""The stacks of all processes of a run that hangs, and their end.

py-spy reads the stacks from outside. Where ptrace is not permitted, each actor writes its own on a
signal, with faulthandler; a process that is stopped or hangs in the kernel cannot.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray
import ray._private.state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

STACKS_FILE = "stacks.txt"
SIGNAL = signal.SIGUSR2
STDERR = 2  # the descriptor, since `sys.stderr` of an actor need not have one
PY_SPY_TIMEOUT_S = 20.0
ANSWER_TIMEOUT_S = 3.0  # of an actor to the signal
NODE_TIMEOUT_S = 60.0


def answer_with_stacks(_: Any = None) -> None:
    """Let this process write the stacks of its threads to its stderr on `SIGNAL`."""
    with suppress(OSError, RuntimeError, ValueError):  # a run does not need it
        faulthandler.register(SIGNAL, file=STDERR, all_threads=True)


async def dump_stacks(actors: Mapping[str, Any], directory: Path) -> str:
    """Write the stacks of all `actors`, by name, and of this process; return a line about them."""
    processes = _processes(actors)
    found = await _on_their_nodes(_stacks_of, processes)
    parts = [f"===== driver, process {os.getpid()}\n{_own_stacks()}"]
    for name, (node, process) in processes.items():
        answer = found.get(node, {}).get(process, "its node did not answer")
        parts.append(f"===== {name}, process {process}\n{answer}")

    directory.mkdir(parents=True, exist_ok=True)
    path = directory / STACKS_FILE
    path.write_text("\n\n".join(parts) + "\n")
    return f"the stacks of {len(parts)} processes are in {path}"


async def kill_processes(actors: Mapping[str, Any]) -> None:
    """Kill the processes of all `actors`; one that is stopped does not answer to Ray."""
    await _on_their_nodes(_kill, _processes(actors))


def _processes(actors: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """Return the node and the process id of each living actor, by name."""
    processes = {}
    for name, actor in actors.items():
        info = ray._private.state.actors(actor._actor_id.hex())
        if info and info.get("State") == "ALIVE":
            processes[name] = (info["Address"]["NodeID"], int(info["Pid"]))
    return processes


async def _on_their_nodes(
    function: Any, processes: Mapping[str, tuple[str, int]]
) -> dict[str, dict[int, str]]:
    """Call `function` with the process ids of each node, on that node."""
    if not processes:
        return {}
    by_node: dict[str, list[int]] = {}
    for node, process in processes.values():
        by_node.setdefault(node, []).append(process)

    here = ray.get_runtime_context().get_node_id()
    calls = [_call(function, node, ids, here=node == here) for node, ids in by_node.items()]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    named = zip(by_node, answers, strict=True)
    return {node: answer for node, answer in named if isinstance(answer, dict)}


async def _call(function: Any, node: str, processes: Sequence[int], *, here: bool) -> Any:
    if here:  # without Ray, which may be a part of the trouble
        return await asyncio.to_thread(function, processes)
    strategy = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    remote: Any = ray.remote(function)
    call = remote.options(num_cpus=0, scheduling_strategy=strategy).remote(processes)
    return await asyncio.wait_for(call, NODE_TIMEOUT_S)


def _kill(processes: Sequence[int]) -> dict[int, str]:
    for process in processes:
        with suppress(psutil.Error):
            parent = psutil.Process(process)
            for child in (*parent.children(recursive=True), parent):
                with suppress(psutil.Error):
                    child.kill()
    return {}


def _stacks_of(processes: Sequence[int]) -> dict[int, str]:
    """Return the stacks of processes of this node."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(processes, pool.map(_stack_of, processes), strict=True))


def _stack_of(process: int) -> str:
    """Return the stacks of a process and its children, or why there are none."""
    try:
        state = psutil.Process(process).status()
    except psutil.Error:
        return "the process is gone"
    stacks = _by_py_spy(process) or _by_faulthandler(process)
    return f"state: {state}\n{stacks}"


def _by_py_spy(process: int) -> str:
    """Return what py-spy reads; empty where it may not or is not installed."""
    words = ["py-spy", "dump", "--nonblocking", "--subprocesses", "--pid", str(process)]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=PY_SPY_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _by_faulthandler(process: int) -> str:
    """Return what a process writes to its stderr on `SIGNAL`."""
    if not _handles_signal(process):
        return "no stacks: py-spy could not read them, and the process does not write its own"
    output = Path(f"/proc/{process}/fd/2")
    if not output.is_file():
        return "no stacks: py-spy could not read them, and the process's stderr is no file"
    try:
        before = output.stat().st_size
        os.kill(process, SIGNAL)
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while output.stat().st_size == before and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)  # for the rest of the text
        with output.open("rb") as stream:
            stream.seek(before)
            text = stream.read().decode(errors="replace")
    except OSError as error:
        return f"no stacks: {error}"
    return text or "no stacks: py-spy could not read them, and the process did not answer a signal"


def _handles_signal(process: int) -> bool:
    """Return whether a process catches `SIGNAL`, which would end it otherwise."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return False
    masks = [int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")]
    return bool(masks) and bool(masks[0] >> (SIGNAL - 1) & 1)


def _own_stacks() -> str:
    """Return what the tasks of this process's event loop wait for."""
    return "\n".join(
        f"Task {task.get_name()}\n" + "\n".join(_awaited(task.get_coro()))
        for task in asyncio.all_tasks()
    )


def _awaited(coroutine: Any) -> Iterator[str]:
    """Yield the place of a coroutine, and of those that it waits for, the innermost last."""
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "ag_frame", None)
        if frame is not None:
            yield f"    {frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_lineno})"
        elif not hasattr(coroutine, "cr_await"):
            yield f"    waits for {coroutine!r}"
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "ag_await", None)
