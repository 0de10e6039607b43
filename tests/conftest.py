"""Fixtures that several test files share."""

import os
from collections.abc import Iterator

import hypothesis
import pytest

hypothesis.settings.register_profile("rlsys", derandomize=True, deadline=None)
hypothesis.settings.load_profile("rlsys")  # the same examples every time
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a hub
# Set before torch is imported, and inherited by every process that tests start. Tests keep more
# processes busy than there are cores, and a thread that spins while it waits takes the core from
# the thread it waits for. A run on its own cores is faster with spinning (docs/measurements.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """Start a real local Ray, shared by the tests of one file.

    It ends with the file: other files run recipes in this process, which start a Ray of their own.
    """
    import ray

    from workers.local_ray import needed_processes_only

    with needed_processes_only():
        ray.init(
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=512 * 1024**2,
            log_to_driver=False,
            configure_logging=False,
        )
    yield
    ray.shutdown()
