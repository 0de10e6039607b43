"""Each transport brings the weights of the policy to real generation workers, restarted or not."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from rlsys.config import RunConfig
from rlsys.config.command_line import evolve
from rlsys.driver.ports import WeightSyncError
from rlsys.metrics import values
from tests.support.real_parts import make_config, started

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def config(transport: str, ranks: int, directory: Path) -> RunConfig:
    """Return a run whose weights travel in several buckets."""
    changes: dict[str, object] = {
        "sync.transport": transport,
        "sync.bucket_mb": 1,
        "policy.ranks": ranks,
        "algorithm.kl.coefficient": 0.0,
    }
    if transport == "disk":
        changes["sync.directory"] = str(directory)
    return evolve(make_config(), changes)


@pytest.mark.parametrize(("transport", "ranks"), [("object_store", 2), ("disk", 1)])
async def test_workers_get_the_weights_and_so_does_a_restarted_one(
    transport: str, ranks: int, tmp_path: Path
):
    async with started(config(transport, ranks, tmp_path / "weights")) as parts:
        weights: Any = parts.workers.weights
        for version in (0, 1):
            report = values(await weights.sync(version))
            assert report["sync/logprob_difference_max"] < 1e-3
            assert {"time/sync_export", "time/sync_load", "time/sync_probe"} <= report.keys()
        pool = weights._pool
        assert [found for _, found in await pool.ask("version")] == [1, 1]
        if transport == "disk":
            assert [path.name for path in sorted((tmp_path / "weights").glob("weights_*"))] == [
                "weights_000001_0002"
            ]

        # The restarted worker is compared before it is ready.
        first = pool.members[0]
        os.kill(await first.present.__ray_call__.remote(lambda _: os.getpid()), signal.SIGKILL)
        assert len(await pool.ask("version")) == 1
        actor = await first.ready()
        assert await actor.version.remote() == 1

        # Weights that are not those with which the trainer computes are found.
        policy: Any = parts.workers.policy
        await policy.workers[0].__ray_call__.remote(_spoil_the_next_export)
        with pytest.raises(WeightSyncError, match=r"differ by .* Parameter groups that differ"):
            await weights.sync(2)


def _spoil_the_next_export(worker: Any) -> None:
    """Send other weights than those with which the trainer computes."""
    true_weights = worker.backend.weights

    def other() -> Any:
        for name, tensor in true_weights():
            yield name, tensor * 1.5

    worker.backend.weights = other
