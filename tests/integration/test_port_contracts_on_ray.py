"""The real parts keep the contracts of the ports, as the fakes do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import ray

from rlsys.config.command_line import evolve
from rlsys.data.batches import SamplingParameters
from tests.support.port_contracts import WITH_FILES, WITHOUT_FILES, System
from tests.support.real_parts import make_config, started

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(ray_cluster: None) -> AsyncIterator[System]:
    """Start the real parts of a run, with the policy's weights in the engine."""

    async def open_handle(handle: Any) -> Any:
        return await handle

    critic = {"critic.enabled": True, "critic.optimizer.learning_rate": 1e-3}
    config = evolve(make_config(), {"algorithm.advantage.name": "gae", **critic})
    async with started(config) as parts:
        system = System(
            workers=parts.workers,
            prompts=parts.prompts.train.next_batch(),
            sampling=SamplingParameters(
                samples_per_prompt=4, temperature=1.0, max_tokens=12, seed=11
            ),
            open=open_handle,
            put=ray.put,
            tolerance=1e-4,
        )
        await system.sync()
        yield system


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("contract", WITHOUT_FILES, ids=lambda contract: contract.__name__)
async def test_contract_of_the_real_parts(contract: Callable, system: System) -> None:
    await contract(system)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("contract", WITH_FILES, ids=lambda contract: contract.__name__)
async def test_contract_with_files_of_the_real_parts(
    contract: Callable, system: System, tmp_path: Path
) -> None:
    await contract(system, tmp_path)
