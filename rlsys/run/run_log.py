"""run.log: all messages of Python's logging during a run, without secrets."""

from __future__ import annotations

import logging
from logging.handlers import MemoryHandler
from pathlib import Path

from rlsys.run.shown_text import shown


class ShownFormatter(logging.Formatter):
    """A formatter of messages and tracebacks as people see them."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


class HeldLog(MemoryHandler):
    """Handler that writes the run's log file.

    While it is held, records are kept in memory, so that a refused resume does not change the file.
    """

    def __init__(self, path: Path, *, held: bool) -> None:
        file = logging.FileHandler(path, delay=held, encoding="utf-8")
        file.setFormatter(ShownFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        super().__init__(capacity=0, target=file, flushOnClose=False)
        self._held = held

    def shouldFlush(self, record: logging.LogRecord) -> bool:  # noqa: N802  (logging's own name)
        return not self._held

    def flush(self) -> None:
        if not self._held:
            super().flush()

    def end_hold(self) -> None:
        """Write the records in memory, and every later one at once."""
        self._held = False
        self.flush()


def log_to(path: Path, *, held: bool) -> HeldLog:
    """Send the log of the whole process to `path` only."""
    handler = HeldLog(path, held=held)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    return handler
