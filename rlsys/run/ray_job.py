"""What a run can know of the Ray job that it is a part of, from its environment alone."""

from __future__ import annotations

from collections.abc import Mapping

# Ray sets it for the command of `ray job submit`; it holds the job's runtime environment.
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
DEFAULT_STOP_WAIT_S = 3  # of Ray 2.60
SHORT_STOP_WAIT_S = 60


def stop_wait_warning(environment: Mapping[str, str]) -> str | None:
    """Return a warning where `ray job stop` would kill the run before it has saved.

    Ray sends SIGTERM and, RAY_JOB_STOP_WAIT_TIME_S seconds later, SIGKILL.
    """
    if JOB_CONFIG not in environment:
        return None
    try:
        seconds = int(environment.get(STOP_WAIT, DEFAULT_STOP_WAIT_S))
    except ValueError:
        seconds = DEFAULT_STOP_WAIT_S
    if seconds >= SHORT_STOP_WAIT_S:
        return None
    return (
        f"{STOP_WAIT}: `ray job stop` kills this run after {seconds} s, whether or not it has "
        "finished its step and saved. Submit with "
        f'--runtime-env-json \'{{"env_vars": {{"{STOP_WAIT}": "600"}}}}\' for ten minutes.'
    )
