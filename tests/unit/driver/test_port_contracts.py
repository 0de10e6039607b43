"""The fakes keep the contracts of the ports, which the real workers keep too."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlsys.config import (
    AdvantageConfig,
    AlgorithmConfig,
    CriticConfig,
    GenerationConfig,
    KLConfig,
    RunConfig,
)
from rlsys.data.batches import SamplingParameters
from tests.support.in_process_fakes import Stage, held_out_prompts, in_process_workers
from tests.support.port_contracts import WITH_FILES, WITHOUT_FILES, System


async def fakes() -> System:
    config = RunConfig(
        generation=GenerationConfig(samples_per_prompt=4, min_tokens=0, max_tokens=3),
        algorithm=AlgorithmConfig(
            advantage=AdvantageConfig(name="gae"), kl=KLConfig(coefficient=0.1)
        ),
        critic=CriticConfig(enabled=True),
    )
    stage = Stage()
    workers = in_process_workers(stage, config)
    system = System(
        workers=workers,
        prompts=held_out_prompts(),
        sampling=SamplingParameters(samples_per_prompt=4, temperature=1.0, max_tokens=3, seed=11),
        open=lambda handle: handle.open(),  # pyright: ignore[reportAttributeAccessIssue]
        put=stage.put,
        tolerance=1e-6,
    )
    await system.sync()
    return system


@pytest.mark.parametrize("contract", WITHOUT_FILES, ids=lambda contract: contract.__name__)
async def test_contract(contract) -> None:
    await contract(await fakes())


@pytest.mark.parametrize("contract", WITH_FILES, ids=lambda contract: contract.__name__)
async def test_contract_with_files(contract, tmp_path: Path) -> None:
    await contract(await fakes(), tmp_path)
