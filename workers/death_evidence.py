"""How an actor died: a line for the console, and the end of what its process printed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import ray
import ray._private.worker

LAST_LINES = 30  # of the process's stderr
MAX_LINE_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True)
class DeathEvidence:
    """What is known of a death."""

    reason: str  # in one line, without numbers of processes, so that equal deaths have equal ones
    evidence: str  # Ray's message, and the end of the process's stderr


def describe_death(error: BaseException) -> DeathEvidence:
    """Return what Ray says about the death of an actor, and the end of its stderr if it is here."""
    message = str(error).strip()
    pid = re.search(r"^\s*pid: (\d+)", message, flags=re.MULTILINE)
    printed = _end_of_stderr(int(pid.group(1))) if pid else []
    evidence = [message]
    if printed:
        evidence += ["The end of its stderr:", *printed]
    return DeathEvidence(reason=_reason(message), evidence="\n".join(evidence))


# Ray's explanations, and what they are here.
REASONS = (
    (r"killed by `?ray\.kill", "it was killed by ray.kill"),
    (r"OOM|memory (?:pressure|usage threshold)", "Ray killed its process for lack of memory"),
    (r"node (?:has )?died|node .* (?:dead|failed)|NODE_DIED", "its node died"),
    (r"exit code (\d+)", "its process ended with exit code {}"),
    (r"unexpectedly exits|worker process has died|End of file", "its process died"),
    (r"unavailable", "it cannot be reached"),
)


def _reason(message: str) -> str:
    # The causes that Ray lists as possible are not what has happened.
    told = message.split("Some common causes include")[0]
    for pattern, text in REASONS:
        found = re.search(pattern, told)
        if found:
            return text.format(*found.groups())
    last = (told.strip().splitlines() or ["no reason is known"])[-1]
    return last.strip()[:MAX_LINE_CHARACTERS]


def _end_of_stderr(pid: int) -> list[str]:
    """Return the last lines that a process of this node printed; none where they are not found."""
    directory = _logs_directory()
    if directory is None:
        return []
    files = sorted(directory.glob(f"worker-*-{pid}.err"))
    if not files:
        return []
    lines = files[-1].read_text(errors="replace").splitlines()
    return [line[:MAX_LINE_CHARACTERS] for line in lines if line.strip()][-LAST_LINES:]


def _logs_directory() -> Path | None:
    """Return the directory of Ray's logs on this node; None outside of a connection to Ray."""
    if not ray.is_initialized():
        return None
    # Ray has no public name for it, and a driver that joined a cluster has no other way.
    node = ray._private.worker._global_node
    return Path(node.get_logs_dir_path()) if node is not None else None
