"""A pool of processes that score completions under a wall-clock limit.

A process that takes too long is killed and replaced, and so is one that dies; either costs one answer. The limit holds inside C code too,
and starts when the answer is handed to the process. Memory is limited as well. Run as a module, this file is the process's side.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

from rlsys.config import RewardConfig
from rlsys.plugins import load_plugins
from rlsys.rewards.scoring import Score, score_completion

logger = logging.getLogger(__name__)

START_LIMIT_S = 120.0  # importing SymPy and the plug-ins
READY = b"ready"


class RewardPool:
    """`config.processes` processes, each driven by one thread of this one."""

    def __init__(self, config: RewardConfig, plugins: Sequence[str]) -> None:
        self._config = config
        self._plugins = tuple(plugins)
        self._threads = ThreadPoolExecutor(config.processes, thread_name_prefix="reward")
        self._local = threading.local()
        self._processes: set[_Process] = set()
        self._closed = False

    def warm_up(self) -> None:
        """Start every process; returns when all are ready."""
        barrier = threading.Barrier(self._config.processes)

        def start() -> None:
            try:
                self._process()
            except BaseException:
                barrier.abort()  # or the others would wait for ever
                raise
            barrier.wait()  # keeps one thread from starting twice

        for future in [self._threads.submit(start) for _ in range(self._config.processes)]:
            future.result()

    def submit(
        self, completion: str, ground_truth: str, completion_tokens: int = 0
    ) -> Future[Score]:
        """Score one completion of so many sampled tokens. The future never fails: what goes wrong becomes a score of 0 with its reason."""
        return self._threads.submit(self._score, completion, ground_truth, completion_tokens)

    def _score(self, completion: str, ground_truth: str, completion_tokens: int) -> Score:
        try:
            answer = self._process().ask(
                (completion, ground_truth, completion_tokens), self._config.timeout_s
            )
        except TimeoutError:
            answer = "timeout"
        except (EOFError, OSError):
            answer = "crash"
        if isinstance(answer, Score):
            return answer
        if isinstance(answer, str):
            self._drop()
            logger.warning("reward %s on %r", answer, completion[-200:])
            return self._failure(answer)
        logger.warning("a reward function failed: %s", answer)
        return self._failure("error")

    def _failure(self, reason: str) -> Score:
        return Score(components=(0.0,) * len(self._config.functions), reason=reason, answer="")

    def _process(self) -> _Process:
        process = getattr(self._local, "process", None)
        if process is None:
            if self._closed:
                raise EOFError("the pool is shut down")
            process = self._local.process = _Process(self._config, self._plugins)
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


class _Process:
    """This side of one scoring process."""

    def __init__(self, config: RewardConfig, plugins: Sequence[str]) -> None:
        ours, theirs = socket.socketpair()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": "1",
        }
        command = [
            sys.executable,
            "-m",
            "rlsys.rewards.pool",
            str(theirs.fileno()),
            str(os.getpid()),
        ]
        self._popen = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self.pid = self._popen.pid
        try:
            self.ask((config.functions, plugins, config.memory_gb), START_LIMIT_S)
        except BaseException:
            self.kill()
            raise

    def ask(self, question: object, limit_s: float) -> object:
        """The process's answer.

        Raises:
            TimeoutError: none came within the limit.
            EOFError, OSError: the process died.
        """
        self._connection.send_bytes(pickle.dumps(question))
        if not self._connection.poll(limit_s):
            raise TimeoutError
        return pickle.loads(self._connection.recv_bytes())

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


def _serve(connection: Connection) -> None:
    functions, plugins, memory_gb = pickle.loads(connection.recv_bytes())
    load_plugins(plugins)
    with contextlib.suppress(Exception):  # a user's function may refuse this text
        score_completion(
            functions, "\\boxed{x^2 + 1}", "1 + x^2"
        )  # imports what the first answer would otherwise wait for
    _limit_memory(memory_gb)
    connection.send_bytes(pickle.dumps(READY))
    while True:
        completion, ground_truth, completion_tokens = pickle.loads(connection.recv_bytes())
        try:
            answer: object = score_completion(
                functions, completion, ground_truth, completion_tokens
            )
        except Exception as error:  # a user's function may raise anything
            answer = (f"{type(error).__name__}: {error}",)
        connection.send_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    _die_with_parent(int(sys.argv[2]))
    # What is pickled must be found under its importable name on both sides.
    from rlsys.rewards import pool

    with contextlib.suppress(EOFError):
        pool._serve(Connection(int(sys.argv[1])))
