"""A pool of processes that score completions under a wall-clock limit.

A process that takes too long is killed and replaced, and so is one that dies; either costs one function's score of one answer. The limit
holds inside C code too, and starts when the function's turn begins. Memory is limited as well. What the processes print is collected. Run
as a module, this file is the process's side.
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
from rlsys.rewards.scoring import FunctionFailure, FunctionScore, Outcome, Score, run_function

START_LIMIT_S = 120.0  # importing the plug-ins
FIRST_CALL_S = 10.0  # more for a function's first answer in a process, which may import modules
END_LIMIT_S = 1.0  # for a process to end that has closed its connection
KEPT_LINES = 1000  # of output that nobody has taken
MAX_LINE_CHARACTERS = 2000
SHOWN_CHARACTERS = 200  # of a completion on which a function failed
# A function that fails this often and never succeeds is not asked again: with timeouts, a batch would take hours to say the same.
HOPELESS_AFTER = 32


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A process's first word: it can score, and whether a function reads more than two texts."""

    reads_all: bool


class Output:
    """Lines that reward functions printed, until somebody takes them; where they are too many the oldest go."""

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
        """The lines since the last call, with a note where some were lost."""
        with self._lock:
            lines, lost = list(self._lines), self._lost
            self._lines.clear()
            self._lost = 0
        return ([f"({lost} earlier lines were lost)"] if lost else []) + lines

    def follow(self, stream: IO[bytes]) -> threading.Thread:
        """Add what comes out of `stream`, line by line, until it ends."""

        def read() -> None:
            with contextlib.suppress(OSError, ValueError), stream:
                for line in iter(lambda: stream.readline(MAX_LINE_CHARACTERS), b""):
                    self.add(line.decode(errors="replace").rstrip())

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        return thread


class RewardPool:
    """`config.processes` processes, each driven by one thread of this one."""

    def __init__(self, config: RewardConfig, plugins: Sequence[str]) -> None:
        self._config = config
        self._plugins = tuple(plugins)
        self._threads = ThreadPoolExecutor(config.processes, thread_name_prefix="reward")
        self._local = threading.local()
        self._processes: set[_Process] = set()
        self._closed = False
        self._failed = [0] * len(config.functions)
        self._succeeded = [0] * len(config.functions)
        self._slow_to_start: set[int] = (
            set()
        )  # had more time for a first answer, and needed more still
        self.output = Output()

    def warm_up(self) -> None:
        """Start every process; returns when all are ready.

        Raises:
            RuntimeError: a process could not be started, with what it said.
        """
        barrier = threading.Barrier(self._config.processes)

        def start() -> None:
            try:
                self._process()
            except BaseException:
                barrier.abort()  # or the others would wait for ever
                raise
            barrier.wait()  # keeps one thread from starting twice

        started = [self._threads.submit(start) for _ in range(self._config.processes)]
        errors = [error for future in started if (error := future.exception()) is not None]
        told = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
        if errors:
            raise (told or errors)[0]

    def submit(self, inputs: RewardInput) -> Future[Score]:
        """Score one completion. The future never fails: what goes wrong becomes an outcome of the score."""
        return self._threads.submit(self._score, inputs)

    def _score(self, inputs: RewardInput) -> Score:
        functions = range(len(self._config.functions))
        outcomes: dict[int, Outcome] = {
            i: self._hopeless() for i in functions if self._is_hopeless(i)
        }
        pending = [i for i in functions if i not in outcomes]
        while pending:
            answered = self._ask(pending, inputs)
            outcomes.update(zip(pending, answered, strict=False))
            self._count(pending, answered, inputs.completion)
            pending = pending[len(answered) :]
        return Score(outcomes=tuple(outcomes[i] for i in functions))

    def _ask(self, functions: Sequence[int], inputs: RewardInput) -> list[Outcome]:
        """Outcomes of the first of `functions`, at least one: up to and with the one that costs the process."""
        try:
            process = self._process()
        except (RuntimeError, TimeoutError) as error:
            message = " ".join(f"no process to run it in: {error}".split())
            return [FunctionFailure(kind="crash", message=message)] * len(functions)
        outcomes: list[Outcome] = []
        try:
            # What no function reads does not travel: most rewards read two texts.
            question = inputs if process.reads_all else _texts_of(inputs)
            process.send((list(functions), tuple(question)))
            for function in functions:
                outcomes.append(process.receive(self._limit_s(process, function)))
                process.answered.add(function)
        except TimeoutError:
            self._slow_to_start.add(functions[len(outcomes)])
            message = f"no answer within reward.timeout_s {self._config.timeout_s:g}"
            outcomes.append(FunctionFailure(kind="timeout", message=message))
            self._drop()
        except (EOFError, OSError):
            outcomes.append(FunctionFailure(kind="crash", message=process.ending()))
            self._drop()
        return outcomes

    def _limit_s(self, process: _Process, function: int) -> float:
        is_first = function not in process.answered | self._slow_to_start
        return self._config.timeout_s + (FIRST_CALL_S if is_first else 0.0)

    def _count(
        self, functions: Sequence[int], outcomes: Sequence[Outcome], completion: str
    ) -> None:
        for i, outcome in zip(functions, outcomes, strict=False):
            if isinstance(outcome, FunctionScore):
                self._succeeded[i] += 1
                continue
            self._failed[i] += 1
            name, end = self._config.functions[i].name, completion[-SHOWN_CHARACTERS:]
            self.output.add(f"reward {name!r}: {outcome.kind}, {outcome.message}; on ...{end!r}")

    def _is_hopeless(self, function: int) -> bool:
        return not self._succeeded[function] and self._failed[function] >= HOPELESS_AFTER

    def _hopeless(self) -> FunctionFailure:
        message = f"not asked: it had failed on all of the first {HOPELESS_AFTER} answers"
        return FunctionFailure(kind="error", message=message)

    def _process(self) -> _Process:
        process = getattr(self._local, "process", None)
        if process is None:
            if self._closed:
                raise RuntimeError("the pool is shut down")
            process = self._local.process = _Process(self._config, self._plugins, self.output)
            self._processes.add(process)
        return process

    def _drop(self) -> None:
        process = getattr(self._local, "process", None)
        if process is not None:
            process.kill()
            self._processes.discard(process)
            self._local.process = None

    def process_ids(self) -> list[int]:
        """Of the processes alive now."""
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
    """This side of one scoring process."""

    def __init__(self, config: RewardConfig, plugins: Sequence[str], output: Output) -> None:
        """Raises RuntimeError where the process does not come up, TimeoutError where it takes too long."""
        ours, theirs = socket.socketpair()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",  # what is printed gets out, however the process ends
        }
        command = [
            sys.executable,
            "-m",
            "rlsys.rewards.pool",
            str(theirs.fileno()),
            str(os.getpid()),
        ]
        self._popen = subprocess.Popen(
            command,
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
        self.reads_all = False  # of what is known of a response
        self.answered: set[int] = set()  # functions that have given an answer here
        try:
            self._start(config, plugins)
        except BaseException:
            self.kill()
            raise

    def _start(self, config: RewardConfig, plugins: Sequence[str]) -> None:
        try:
            self.send((config.functions, plugins, config.memory_gb))
            answer = self.receive(START_LIMIT_S)
        except (EOFError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise RuntimeError(f"a reward process could not start: {self.ending()}") from error
        if not isinstance(answer, Ready):
            raise RuntimeError(f"a reward process could not start: {answer}")
        self.reads_all = answer.reads_all

    def send(self, question: object) -> None:
        """Ask.

        Raises:
            OSError: the process died.
        """
        self._connection.send_bytes(pickle.dumps(question))

    def receive(self, limit_s: float) -> Any:
        """The process's next answer.

        Raises:
            TimeoutError: none came within the limit.
            EOFError, OSError: the process died.
        """
        if not self._connection.poll(limit_s):
            raise TimeoutError
        return pickle.loads(self._connection.recv_bytes())

    def ending(self) -> str:
        """How a process ended that has closed its connection."""
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
        """End the process at once."""
        self._popen.kill()
        self._popen.wait()
        self._connection.close()


def _die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)  # it ended before we asked


def _limit_memory(memory_gb: float) -> None:
    """Let this process grow by so much from now on; beyond it an answer fails with a MemoryError."""
    if memory_gb:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + int(memory_gb * 1024**3)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _warm_up(functions: Sequence[RewardFunctionConfig]) -> None:
    """Do what the first answer would otherwise wait for, where a function has declared it."""
    for function in functions:
        warm_up = reward_hooks(function.name).warm_up
        if warm_up is not None:
            warm_up()


def _serve(connection: Connection) -> None:
    functions, plugins, memory_gb = pickle.loads(connection.recv_bytes())
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
            outcome = run_function(functions[i], inputs, terms=len(functions))
            connection.send_bytes(pickle.dumps(outcome))


if __name__ == "__main__":
    _die_with_parent(int(sys.argv[2]))
    # What is pickled must be found under its importable name on both sides.
    from rlsys.rewards import pool

    with contextlib.suppress(EOFError):
        pool._serve(Connection(int(sys.argv[1])))
