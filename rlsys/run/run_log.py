"""run.log: everything that Python's logging gets to hear during a run."""

from __future__ import annotations

import logging
from logging.handlers import MemoryHandler
from pathlib import Path


class HeldLog(MemoryHandler):
    """Writes the run's log file.

    While it is held, records wait in memory, so that a refused resume leaves the file as it was.
    """

    def __init__(self, path: Path, *, held: bool) -> None:
        file = logging.FileHandler(path, delay=held)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        super().__init__(capacity=0, target=file, flushOnClose=False)
        self._held = held

    def shouldFlush(self, record: logging.LogRecord) -> bool:  # noqa: N802  (logging's own name)
        return not self._held

    def flush(self) -> None:
        if not self._held:
            super().flush()

    def end_hold(self) -> None:
        """Write what has waited, and everything from now on."""
        self._held = False
        self.flush()


def log_to(path: Path, *, held: bool) -> HeldLog:
    """Send the whole process's log to `path`, and nowhere else."""
    handler = HeldLog(path, held=held)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    return handler
