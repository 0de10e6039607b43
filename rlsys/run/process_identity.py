"""Whether a process that a file names is still the one that wrote the file."""

from __future__ import annotations

import psutil


def is_running(number: int, began: float) -> bool:
    """Return whether process `number` of this machine is alive, and is the one that began then.

    Args:
        began: `psutil.Process.create_time`; a later process may have the same number.
    """
    try:
        process = psutil.Process(number)
        running = process.status() != psutil.STATUS_ZOMBIE
        return running and abs(process.create_time() - began) < 1
    except psutil.Error:
        return False
