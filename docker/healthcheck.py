"""The health check of the images: exit code 0 while the Ray node of this container answers.

A container that runs `ray start` is healthy while its raylet answers, and on the head the GCS too,
through the dashboard; neither asks for a token. Any other, such as one that trains with a Ray of
its own, is healthy while its main process lives, which Docker watches itself.
"""

from __future__ import annotations

import itertools
import sys
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

RAYLET = "http://127.0.0.1:52365/api/local_raylet_healthz"
GCS = "http://127.0.0.1:8265/api/gcs_healthz"
TIMEOUT_S = 5.0


def commands(processes: Path = Path("/proc")) -> Iterator[list[str]]:
    """Yield the command lines of all processes of the container."""
    for file in processes.glob("[0-9]*/cmdline"):
        try:
            yield file.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it has ended


def is_ray_start(words: list[str]) -> bool:
    """Return whether a command line is `ray start`, which may be an argument of its interpreter."""
    return any(
        Path(one).name == "ray" and following == "start"
        for one, following in itertools.pairwise(words)
    )


def services(command_lines: Iterable[list[str]]) -> list[str]:
    """Return the addresses that must answer in a container with these processes."""
    starts = [words for words in command_lines if is_ray_start(words)]
    if not starts:
        return []
    return [RAYLET, GCS] if any("--head" in words for words in starts) else [RAYLET]


def answers(address: str) -> bool:
    """Return whether a part of Ray says that it is well."""
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_S) as answer:
            return "success" in answer.read().decode()
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(0 if all(map(answers, services(commands()))) else 1)
