"""Ranks that write checkpoints in a thread: the files are those of the moment of the copy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from rlsys.config import RunConfig
from rlsys.config.offline import RewardModelRunConfig, SupervisedRunConfig
from rlsys.models import resolve_model
from rlsys.models.tensor_files import TensorFileWriter
from tests.support.critic_examples import critic_config, example
from tests.support.example_batches import random_examples
from tests.support.model_families import build_family, load_family
from tests.support.saved_weights import contents
from workers.training.background_files import BackgroundFiles, HostMemory
from workers.training.critic import CriticWorker
from workers.training.offline import RewardModelWorker, SupervisedWorker
from workers.training.policy import PolicyWorker
from workers.training.trained_worker import SavedWorker

LIMIT_S = 60.0
ROLE = {"compute_dtype": "float32", "optimizer": {"learning_rate": 3e-3}}
COMMON: dict[str, Any] = {
    "data": {"max_prompt_tokens": 16, "max_response_tokens": 16},
    "trainer": {"steps": 12},
}


@contextmanager
def started(kind: Any, config: Any, directory: Path | None = None) -> Iterator[Any]:
    """Start a rank that is alone, in this process."""
    worker = kind(config, str(directory or resolve_model("tiny")), 0, 1)
    try:
        worker.setup(worker.rendezvous())
        yield worker
    finally:
        worker.shutdown()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Let threads that write checkpoints wait for an event before each tensor."""
    released = threading.Event()
    write = TensorFileWriter.write

    def slow(self: TensorFileWriter, name: str, tensor: torch.Tensor) -> None:
        if threading.current_thread().name == "checkpoint":
            assert released.wait(LIMIT_S)
        write(self, name, tensor)

    monkeypatch.setattr(TensorFileWriter, "write", slow)
    yield released
    released.set()


def end_of_files(worker: SavedWorker) -> None:
    assert worker._in_background is not None
    worker._in_background.wait()
    assert worker.seconds_of_files() is not None


@torch.no_grad()
def set_weights(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Give the only rank of a model other weights."""
    for name, parameter in model.state_dict().items():
        parameter.to_local().copy_(weights[name])


def made(path: Path) -> Path:
    path.mkdir()
    return path


def check_files(
    worker: SavedWorker, train: Callable[[], object], held: threading.Event, folder: Path
) -> None:
    """Save at once and in the background, train on, and compare; then once more."""
    train()
    worker.save(str(made(folder / "once")))
    worker.copy_state(str(made(folder / "later")))
    train()
    train()
    assert worker.seconds_of_files() is None
    assert contents(folder / "once").keys() - contents(folder / "later").keys()
    held.set()
    end_of_files(worker)
    first = contents(folder / "once")
    assert contents(folder / "later") == first

    memory = worker._host_memory
    assert memory is not None
    size = memory.num_bytes
    worker.save(str(made(folder / "once more")))
    held.clear()
    worker.copy_state(str(made(folder / "later again")))
    train()
    held.set()
    end_of_files(worker)
    second = contents(folder / "once more")
    assert contents(folder / "later again") == second
    assert second != first
    assert worker._host_memory is memory
    assert memory.num_bytes == size


def test_a_critic_writes_what_it_was(held: threading.Event, tmp_path: Path):
    batch = example()
    with started(CriticWorker, critic_config()) as worker:
        check_files(worker, lambda: worker.update(batch), held, tmp_path)


def test_a_reward_model_writes_what_it_was(held: threading.Event, tmp_path: Path):
    """Its config.json has the mean reward of the moment of the copy."""
    config = RewardModelRunConfig.model_validate(
        {**COMMON, "model": {"path": "tiny"}, "reward_model": ROLE}
    )
    batch = random_examples((2, 3, 2, 4))
    with started(RewardModelWorker, config) as worker:

        def train() -> None:
            worker.update(batch)
            worker.keep_reward_mean(float(worker.steps.completed))

        check_files(worker, train, held, tmp_path)


@pytest.mark.parametrize("rank", [0, 4])
def test_the_copy_is_one_more_of_what_is_trained(held: threading.Event, tmp_path: Path, rank: int):
    """4 bytes of each parameter and 8 of its moments, or of each parameter of an adapter."""
    model = {"path": "tiny", "lora": {"rank": rank}}
    config = SupervisedRunConfig.model_validate({**COMMON, "model": model, "policy": ROLE})
    batch = random_examples((1,) * 4)
    with started(SupervisedWorker, config) as worker:
        check_files(worker, lambda: worker.update(batch), held, tmp_path)
        trained = [p for p in worker.backend.module.parameters() if p.requires_grad]
        state = sum(12 * parameter.numel() for parameter in trained)
        steps = 4 * len(trained)
        assert worker._host_memory.num_bytes == state + steps


def test_weights_that_are_converted_together_are_those_of_the_copy(
    held: threading.Event, tmp_path: Path
):
    model = tmp_path / "model"
    build_family("qwen3_moe", model)
    config = RunConfig.model_validate(
        {
            "model": {"path": str(model), "attention": "sdpa"},
            "policy": {"compute_dtype": "float32"},
        }
    )
    seeds = iter(range(9))
    with started(PolicyWorker, config, model) as worker:
        inner: Any = worker.backend.module.model
        check_files(
            worker,
            lambda: set_weights(inner, load_family(model, seed=next(seeds)).state_dict()),
            held,
            tmp_path,
        )


def test_what_the_thread_cannot_write_is_raised_when_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with started(CriticWorker, critic_config()) as worker:
        worker.update(example())
        made(tmp_path / "model.safetensors")  # where it writes
        worker.copy_state(str(tmp_path))
        with pytest.raises(IsADirectoryError):
            end_of_files(worker)

        def full(memory: HostMemory, name: str, tensor: torch.Tensor) -> torch.Tensor:
            raise MemoryError(name)

        monkeypatch.setattr(worker, "_in_background", None)
        monkeypatch.setattr(HostMemory, "kept", full)
        with pytest.raises(MemoryError, match="weight/"):
            worker.copy_state(str(made(tmp_path / "again")))
        assert worker._in_background is None
        assert list((tmp_path / "again").iterdir()) == []


def test_there_is_one_checkpoint_at_a_time(held: threading.Event, tmp_path: Path):
    with started(CriticWorker, critic_config()) as worker:
        worker.copy_state(str(tmp_path))
        with pytest.raises(AssertionError, match="one checkpoint at a time"):
            worker.copy_state(str(tmp_path))
        held.set()
        end_of_files(worker)
        assert isinstance(worker._in_background, BackgroundFiles)
