"""What a run knows of its Ray job."""

from __future__ import annotations

import pytest

from rlsys.run.ray_job import DEFAULT_STOP_WAIT_S, JOB_CONFIG, STOP_WAIT, stop_wait_warning


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({STOP_WAIT: "3"}, None),  # no job
        ({JOB_CONFIG: "{}"}, 3),  # Ray's default
        ({JOB_CONFIG: "{}", STOP_WAIT: "10"}, 10),
        ({JOB_CONFIG: "{}", STOP_WAIT: "soon"}, 3),
        ({JOB_CONFIG: "{}", STOP_WAIT: "600"}, None),
    ],
)
def test_a_job_that_ray_would_kill_before_it_saved_is_warned(
    environment: dict[str, str], seconds: int | None
):
    warning = stop_wait_warning(environment)
    if seconds is None:
        assert warning is None
    else:
        assert warning is not None
        assert f"kills this run after {seconds} s" in warning


def test_the_names_are_those_of_the_installed_ray():
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
    from ray.dashboard.modules.job.job_supervisor import JobSupervisor

    assert RAY_JOB_CONFIG_JSON_ENV_VAR == JOB_CONFIG
    assert JobSupervisor.DEFAULT_RAY_JOB_STOP_WAIT_TIME_S == DEFAULT_STOP_WAIT_S
