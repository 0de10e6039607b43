"""An evaluation of two models of which one is refused by a worker."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from recipes import run_evaluation
from recipes.evaluate_math import evaluate_math
from rlsys.config import ConfigError
from rlsys.config.hardware import Hardware
from rlsys.run.evaluation_directory import EvaluationDirectory
from workers.cluster import Cluster

HARDWARE = Hardware(cpus=2, gpus=0, memory_gib=8, gpu_memory_gib=0)


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


async def evaluate(path: Path, refused: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Return the exit code and the console, where a worker refuses one of two models."""
    directory = EvaluationDirectory(path)
    models = [SimpleNamespace(model=SimpleNamespace(name=name)) for name in ("first", "second")]
    for model in models:
        model.sampling_run = None

    async def sample(prepared: Any, one: Any, *_: Any) -> bool:
        if one.model.name == refused:
            raise ConfigError(f"{refused}: a node could not store a copy")
        file = directory.responses / one.model.name / "part_00000.parquet"
        file.parent.mkdir(parents=True)
        file.touch()
        return True

    async def start_rewards(*_: Any) -> None: ...

    cluster = SimpleNamespace(faults=None, shutdown=lambda: None)
    monkeypatch.setattr(Cluster, "connect", lambda *_, **__: cluster)
    monkeypatch.setattr(run_evaluation, "_sample", sample)
    monkeypatch.setattr(run_evaluation, "_start_rewards", start_rewards)
    monkeypatch.setattr(run_evaluation, "_is_complete", lambda *_: False)
    monkeypatch.setattr(run_evaluation, "_report", lambda *_, **__: None)
    monkeypatch.setattr(run_evaluation, "keep_logs", lambda *_: None)
    prepared = SimpleNamespace(
        config=evaluate_math(HARDWARE), resume=False, directory=directory, models=models
    )
    console = Console(record=True, width=200)
    code = await run_evaluation._evaluate(cast(Any, prepared), console)
    return code, console.export_text()


async def test_a_refusal_of_the_second_model_keeps_the_responses_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    code, shown = await evaluate(tmp_path, "second", monkeypatch)
    assert code == 1
    assert "the evaluation failed: second: a node could not store a copy" in shown
    assert list(tmp_path.rglob("*.parquet"))


async def test_a_refusal_of_the_first_model_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="could not store a copy"):
        await evaluate(tmp_path, "first", monkeypatch)
