"""A pool of processes that compute rewards of completions under a wall-clock limit.

A process that takes too long is killed and replaced, which costs the reward of one function for one
completion. A process that dies is replaced, and the function is called again: its reward is lost
only where the second process dies too, since then the function itself ends it. The limit also holds
inside C code, and its time starts with the function's turn. Memory is limited as well. Lines that
the processes print are collected. Run as a module, this file is the process's side.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from rlsys.config import RewardConfig, RewardFunctionConfig
from rlsys.plugins import load_plugins
from rlsys.rewards.records import RewardInput
from rlsys.rewards.registry import reads_metadata, reward_hooks
from rlsys.rewards.scoring import (
    CompletionOutcomes,
    FunctionFailure,
    FunctionReward,
    Outcome,
    run_function,
)

START_LIMIT_S = 600.0  # importing the plug-ins, also on a machine that is busy with other work
FIRST_CALL_S = 10.0  # more for a function's first answer in a process, which may import modules
END_LIMIT_S = 1.0  # for a process to end that has closed its connection
KEPT_LINES = 1000  # of output, until they are taken
MAX_LINE_CHARACTERS = 2000
SHOWN_CHARACTERS = 200  # of a completion on which a function failed
# A function that fails this often and never succeeds is not called again: with timeouts, a batch
# would take hours and fail in the same way.
HOPELESS_AFTER = 32


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The first message of a process, sent when it can compute rewards."""

    reads_all: bool  # a function takes a whole `RewardInput`, not only two texts


class Output:
    """Lines that reward functions printed, until they are taken; the oldest are dropped first."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._lost = 0
        self._lock = threading.Lock()

    def add(self, line: str) -> None:
        """Keep one line."""
        with self._lock:
            self._lost += len(self._lines) == KEPT_LINES
            self._lines.append(line[:MAX_LINE_CHARACTERS])

    def take(self) -> list[str]:
        """Return the lines since the last call, with a note where some were lost."""
        with self._lock:
            lines = list(self._lines)
            lost = self._lost
            self._lines.clear()
            self._lost = 0

        if lost:
            lines.insert(0, f"({lost} earlier lines were lost)")
        return lines

    def follow(self, stream: IO[bytes]) -> threading.Thread:
        """Add the lines of `stream` until it ends."""

        def read() -> None:
            with contextlib.suppress(OSError, ValueError), stream:
                for line in iter(lambda: stream.readline(MAX_LINE_CHARACTERS), b""):
                    self.add(line.decode(errors="replace").rstrip())

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        return thread


class RewardPool:
    """A pool of `config.processes` processes, each driven by one thread of this process."""

    def __init__(
        self, config: RewardConfig, plugins: Sequence[str], *, terms: int | None = None
    ) -> None:
        """Create a pool; its processes start when they are needed.

        Args:
            terms: the rewards that are summed, if there are others than those of `config`.
        """
        self._config = config
        self._terms = len(config.functions) if terms is None else terms
        self._plugins = tuple(plugins)
        self._threads = ThreadPoolExecutor(config.processes, thread_name_prefix="reward")
        self._local = threading.local()
        self._processes: set[_Process] = set()
        self._closed = False
        self._failed = [0] * len(config.functions)
        self._succeeded = [0] * len(config.functions)
        # Functions that exceeded even the longer limit of a first answer.
        self._slow_to_start: set[int] = set()
        self._deaths: deque[str] = deque(maxlen=KEPT_LINES)
        self.output = Output()

    def warm_up(self) -> None:
        """Start every process, and return when all are ready.

        Raises:
            RuntimeError: a process could not be started; the message has its output.
        """
        barrier = threading.Barrier(self._config.processes)

        def start() -> None:
            try:
                self._process()
            except BaseException:
                barrier.abort()  # or the other threads would wait forever
                raise
            barrier.wait()  # keeps one thread from starting twice

        started = [self._threads.submit(start) for _ in range(self._config.processes)]
        errors = [error for error in map(Future.exception, started) if error is not None]
        # A broken barrier is only the consequence of another thread's error.
        causes = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
        if errors:
            raise (causes or errors)[0]

    def submit(self, inputs: RewardInput) -> Future[CompletionOutcomes]:
        """Compute the rewards of one completion. The future never fails: failures are outcomes."""
        return self._threads.submit(self._outcomes, inputs)

    def _outcomes(self, inputs: RewardInput) -> CompletionOutcomes:
        functions = range(len(self._config.functions))
        outcomes: dict[int, Outcome] = {
            i: self._hopeless() for i in functions if self._is_hopeless(i)
        }

        # A function that costs the process ends a call; the rest run in the next process.
        pending = [i for i in functions if i not in outcomes]
        died_at: dict[int, str] = {}  # functions that are called for the second time
        while pending:
            answered, ending = self._call(pending, inputs)
            if ending is not None:
                function = pending[len(answered)]
                if function in died_at:
                    answered.append(FunctionFailure(kind="crash", message=ending))
                else:
                    died_at[function] = ending
            outcomes.update(zip(pending, answered, strict=False))
            self._count(pending, answered, inputs.completion)
            self._count_deaths(pending, answered, died_at)
            pending = pending[len(answered) :]

        return CompletionOutcomes(outcomes=tuple(outcomes[i] for i in functions))

    def _count_deaths(
        self, functions: Sequence[int], outcomes: Sequence[Outcome], died_at: dict[int, str]
    ) -> None:
        """Count the deaths that were not the fault of the function: the second call answered."""
        for i, outcome in zip(functions, outcomes, strict=False):
            if i in died_at and not isinstance(outcome, FunctionFailure):
                self._deaths.append(died_at[i])

    def take_deaths(self) -> list[str]:
        """Return how processes died since the last call that were not ended by a function."""
        return [self._deaths.popleft() for _ in range(len(self._deaths))]

    def _call(
        self, functions: Sequence[int], inputs: RewardInput
    ) -> tuple[list[Outcome], str | None]:
        """Return outcomes of the first of `functions`, and how the process died if it did.

        After a timeout the last outcome is that of the function which took too long. A process that
        died did so at the function after those with an outcome.
        """
        try:
            process = self._process()
        except (RuntimeError, TimeoutError) as error:
            message = " ".join(f"no process to run it in: {error}".split())
            return [FunctionFailure(kind="crash", message=message)] * len(functions), None

        outcomes: list[Outcome] = []
        ending: str | None = None
        try:
            # Most functions read two texts only: other fields are not pickled for them.
            request = inputs if process.reads_all else _texts_of(inputs)
            process.send((list(functions), tuple(request)))
            for function in functions:
                outcomes.append(process.receive(self._limit_s(process, function)))
                process.answered.add(function)
        except TimeoutError:
            self._slow_to_start.add(functions[len(outcomes)])
            message = f"no answer within reward.timeout_s {self._config.timeout_s:g}"
            outcomes.append(FunctionFailure(kind="timeout", message=message))
            self._drop()
        except (EOFError, OSError):
            ending = process.ending()
            self._drop()
        return outcomes, ending

    def _limit_s(self, process: _Process, function: int) -> float:
        is_first = function not in process.answered | self._slow_to_start
        return self._config.timeout_s + (FIRST_CALL_S if is_first else 0.0)

    def _count(
        self, functions: Sequence[int], outcomes: Sequence[Outcome], completion: str
    ) -> None:
        for i, outcome in zip(functions, outcomes, strict=False):
            if isinstance(outcome, FunctionReward):
                self._succeeded[i] += 1
                continue
            self._failed[i] += 1
            name = self._config.functions[i].name
            end = completion[-SHOWN_CHARACTERS:]
            self.output.add(f"reward {name!r}: {outcome.kind}, {outcome.message}; on ...{end!r}")

    def _is_hopeless(self, function: int) -> bool:
        return not self._succeeded[function] and self._failed[function] >= HOPELESS_AFTER

    def _hopeless(self) -> FunctionFailure:
        message = f"not called: it had failed on all of the first {HOPELESS_AFTER} responses"
        return FunctionFailure(kind="error", message=message)

    def _process(self) -> _Process:
        process = getattr(self._local, "process", None)
        if process is None:
            if self._closed:
                raise RuntimeError("the pool is shut down")
            process = self._local.process = _Process(
                self._config, self._plugins, self.output, self._terms
            )
            self._processes.add(process)
        return process

    def _drop(self) -> None:
        process = getattr(self._local, "process", None)
        if process is not None:
            process.kill()
            self._processes.discard(process)
            self._local.process = None

    def process_ids(self) -> list[int]:
        """Return the ids of the processes that are alive."""
        return [process.pid for process in self._processes]

    def shutdown(self) -> None:
        """Kill the processes."""
        self._closed = True
        for process in list(self._processes):
            process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)


def _texts_of(inputs: RewardInput) -> RewardInput:
    return RewardInput(inputs.completion, inputs.ground_truth, num_tokens=inputs.num_tokens)


class _Process:
    """The pool's side of one process."""

    def __init__(
        self, config: RewardConfig, plugins: Sequence[str], output: Output, terms: int
    ) -> None:
        """Start the process.

        Raises:
            RuntimeError: it could not start.
            TimeoutError: it took too long.
        """
        ours, theirs = socket.socketpair()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",  # no printed line is lost, however the process ends
        }
        arguments = [str(theirs.fileno()), str(os.getpid())]
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "rlsys.rewards.pool", *arguments],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        theirs.close()
        assert self._popen.stdout is not None
        output.follow(self._popen.stdout)
        self._connection = Connection(ours.detach())
        self.pid = self._popen.pid
        self.reads_all = False  # see `Ready`
        self.answered: set[int] = set()  # functions that have returned a result here
        try:
            self._start(config, plugins, terms)
        except BaseException:
            self.kill()
            raise

    def _start(self, config: RewardConfig, plugins: Sequence[str], terms: int) -> None:
        try:
            self.send((config.functions, plugins, config.memory_gb, terms))
            answer = self.receive(START_LIMIT_S)
        except (EOFError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise TimeoutError(
                    f"a reward process did not start within {START_LIMIT_S:g} s: a plug-in that is "
                    "imported takes too long, or the machine is overloaded"
                ) from error
            raise RuntimeError(f"a reward process could not start: {self.ending()}") from error
        if not isinstance(answer, Ready):
            raise RuntimeError(f"a reward process could not start: {answer}")
        self.reads_all = answer.reads_all

    def send(self, request: object) -> None:
        """Send a request to the process.

        Raises:
            OSError: the process died.
        """
        self._connection.send_bytes(pickle.dumps(request))

    def receive(self, limit_s: float) -> Any:
        """Return the next answer of the process.

        Raises:
            TimeoutError: none came within the limit.
            EOFError, OSError: the process died.
        """
        if not self._connection.poll(limit_s):
            raise TimeoutError
        return pickle.loads(self._connection.recv_bytes())

    def ending(self) -> str:
        """Describe how a process ended that has closed its connection."""
        try:
            code = self._popen.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            return "it closed the connection of its process"
        if code >= 0:
            return f"its process ended with exit code {code}"
        with contextlib.suppress(ValueError):
            return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process was ended by signal {-code}"

    def kill(self) -> None:
        """Kill the process and close its connection."""
        self._popen.kill()
        self._popen.wait()
        self._connection.close()


def _die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)  # the parent ended before the kernel knew of the request


def _limit_memory(memory_gb: float) -> None:
    """Limit the further growth of this process; beyond it a function fails with a MemoryError."""
    if memory_gb:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + int(memory_gb * 1024**3)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _warm_up(functions: Sequence[RewardFunctionConfig]) -> None:
    """Run the warm-up of each function that declares one."""
    for function in functions:
        warm_up = reward_hooks(function.name).warm_up
        if warm_up is not None:
            warm_up()


def _serve(connection: Connection) -> None:
    """Answer requests until the connection is closed."""
    functions, plugins, memory_gb, terms = pickle.loads(connection.recv_bytes())
    try:
        load_plugins(plugins)
        _warm_up(functions)
    except ValueError as error:
        traceback.print_exc()
        connection.send_bytes(pickle.dumps(str(error)))
        return

    _limit_memory(memory_gb)
    connection.send_bytes(pickle.dumps(Ready(reads_all=reads_metadata(functions))))
    while True:
        chosen, values = pickle.loads(connection.recv_bytes())
        inputs = RewardInput(*values)
        for i in chosen:
            outcome = run_function(functions[i], inputs, terms=terms)
            connection.send_bytes(pickle.dumps(outcome))


if __name__ == "__main__":
    _die_with_parent(int(sys.argv[2]))
    # What is pickled must be found under its importable name on both sides.
    from rlsys.rewards import pool

    with contextlib.suppress(EOFError):
        pool._serve(Connection(int(sys.argv[1])))
