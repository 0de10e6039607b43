"""A checkpoint from somewhere else runs no code, whichever of its files holds a pickle."""

from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rlsys.config import RunConfig
from rlsys.models import resolve_model
from rlsys.models.loading import load_causal_lm, load_tokenizer
from rlsys.run.checkpoints import CheckpointStore
from tests.support.former_checkpoints import rewrite_as_former
from workers.training.auxiliary import FILE as AUXILIARY
from workers.training.auxiliary import AuxiliaryLearner
from workers.training.backends import build_backend
from workers.training.backends.backend import ModelBackend
from workers.training.backends.fsdp2 import FSDP2Backend
from workers.training.model_setup import prepare, value_model
from workers.training.saved_state import load_state, save_backend

CPU = torch.device("cpu")
CONFIG = RunConfig.model_validate(
    {
        "model": {"path": "tiny"},
        "policy": {"compute_dtype": "float32"},
        "algorithm": {
            "advantage": {
                "name": "hierarchical",
                "parameters": {"solver": "network"},
                "recompute": True,
            },
            "objective": {"weight": "none"},
        },
    }
)


class Payload:
    """An object whose unpickling creates the directory `marker`."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.mkdir, (self._marker,)


def plain_pickle(payload: Payload) -> bytes:
    return pickle.dumps(payload, protocol=2)


def torch_archive(payload: Payload) -> bytes:
    """Return the payload inside an archive as `torch.save` writes it."""
    stream = io.BytesIO()
    torch.save({"weight": torch.zeros(2), "payload": payload}, stream)
    return stream.getvalue()


def test_the_payload_works(tmp_path: Path):
    pickle.loads(plain_pickle(Payload(tmp_path / "first")))
    torch.load(io.BytesIO(torch_archive(Payload(tmp_path / "second"))), weights_only=False)
    assert (tmp_path / "first").is_dir()
    assert (tmp_path / "second").is_dir()


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelBackend]:
    """Build a trained model in a process group of one rank."""
    meet = tmp_path_factory.mktemp("group") / "meet"
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=0, world_size=1)
    directory = resolve_model("tiny")
    model, _ = prepare(value_model(), CONFIG, CONFIG.policy, directory, CPU)
    built = build_backend(model, CONFIG.policy, CPU, directory)
    _take_a_step(built)
    yield built
    dist.destroy_process_group()


def _take_a_step(backend: ModelBackend) -> None:
    """Give the optimizer a state."""
    for parameter in backend.module.parameters():
        parameter.grad = torch.ones_like(parameter)
    backend.step(1e-3)


class Width:
    hidden_size = 6


def network() -> AuxiliaryLearner:
    learner = AuxiliaryLearner.of(CONFIG, Width(), CPU)
    assert learner is not None
    return learner


@pytest.fixture
def checkpoint(backend: ModelBackend, tmp_path: Path) -> Path:
    """Write a checkpoint with every kind of file."""
    path = tmp_path / "step_000001"
    path.mkdir()
    save_backend(backend, path)
    (path / AUXILIARY).write_bytes(network().content())
    return path


@pytest.mark.parametrize("form", [plain_pickle, torch_archive])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer-00001-of-00001.shard", "optimizer_shards.json"]
)
def test_weights_and_optimizer_are_refused(
    form: Callable[[Payload], bytes], name: str, checkpoint: Path, backend: ModelBackend
):
    backend.load(checkpoint)  # as it was written
    marker = checkpoint.parent / "executed"
    (checkpoint / name).write_bytes(form(Payload(marker)))
    with pytest.raises(ValueError, match=r"its header would have|not readable as the JSON"):
        backend.load(checkpoint)
    assert not marker.exists()


@pytest.mark.parametrize("form", [plain_pickle, torch_archive])
def test_an_optimizer_in_files_of_earlier_versions_is_refused(
    form: Callable[[Payload], bytes], checkpoint: Path, backend: ModelBackend
):
    assert isinstance(backend, FSDP2Backend)
    rewrite_as_former(backend, checkpoint, rank=0)
    backend.load(checkpoint)  # as it was written
    marker = checkpoint.parent / "executed"
    (checkpoint / "optimizer_rank0.pt").write_bytes(form(Payload(marker)))
    with pytest.raises(Exception, match=r"(?i)weights.only|mmap can only"):
        backend.load(checkpoint)
    assert not marker.exists()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("form", [plain_pickle, torch_archive])
def test_the_network_of_an_estimator_is_refused(form: Callable[[Payload], bytes], checkpoint: Path):
    network().load(checkpoint)
    marker = checkpoint.parent / "executed"
    (checkpoint / AUXILIARY).write_bytes(form(Payload(marker)))
    with pytest.raises(pickle.UnpicklingError, match=r"(?i)weights.only"):
        network().load(checkpoint)
    assert not marker.exists()


async def test_states_and_manifest_are_refused(tmp_path: Path, backend: ModelBackend):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)

    async def write(path: Path) -> None:
        (path / "policy_state.json").write_text("{}")

    saved = await store.save(1, write, {})
    assert store.latest() is not None
    marker = tmp_path / "executed"
    for name in ("policy_state.json", "trainer_state.json", "manifest.json"):
        (saved / name).write_bytes(plain_pickle(Payload(marker)))
        assert CheckpointStore(tmp_path / "checkpoints", keep=2).latest() is None
    with pytest.raises(ValueError, match=r"(?i)decode|json|expecting"):
        load_state(backend, saved, role="policy")
    assert not marker.exists()


@pytest.mark.parametrize("form", [plain_pickle, torch_archive])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "config.json"])
def test_a_model_directory_is_refused(form: Callable[[Payload], bytes], name: str, tmp_path: Path):
    directory = tmp_path / "model"
    shutil.copytree(resolve_model("tiny"), directory)
    marker = tmp_path / "executed"
    if name == "pytorch_model.bin":
        (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(form(Payload(marker)))
    with pytest.raises(Exception, match=r"(?i)header|weights.only|json|utf|unpickl"):
        load_causal_lm(directory, dtype=torch.float32, attention="sdpa")
    assert not marker.exists()


def test_a_generation_config_that_cannot_be_read_is_left_out(tmp_path: Path):
    directory = tmp_path / "model"
    shutil.copytree(resolve_model("tiny"), directory)
    marker = tmp_path / "executed"
    (directory / "generation_config.json").write_bytes(plain_pickle(Payload(marker)))
    load_causal_lm(directory, dtype=torch.float32, attention="sdpa")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_is_refused(name: str, tmp_path: Path):
    directory = tmp_path / "model"
    shutil.copytree(resolve_model("tiny"), directory)
    marker = tmp_path / "executed"
    (directory / name).write_bytes(plain_pickle(Payload(marker)))
    with pytest.raises(Exception, match=r"(?i)utf|json|expected|header"):
        load_tokenizer(directory)
    assert not marker.exists()
