"""Adapters on two ranks, in processes without Ray: updates, and a resume, are those of one rank."""

from __future__ import annotations

import multiprocessing
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlsys.config import RunConfig
from rlsys.metrics import Metric, combine, values
from rlsys.models.sharded_state import ShardedState
from tests.support.model_families import build_family
from tests.support.rollout_examples import random_rollouts, train_batch
from workers.training.policy import PolicyWorker

COMPARED = ("policy/loss", "policy/grad_norm", "policy/entropy")


def config(directory: Path, ranks: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": str(directory), "lora": {"rank": 4}},
            "data": {"max_prompt_tokens": 64},
            "generation": {"dtype": "float32", "max_tokens": 64},
            "policy": {
                "ranks": ranks,
                "compute_dtype": "float32",
                "microbatch_tokens": 4096 if ranks == 1 else 50,
                "gradient_checkpointing": ranks > 1,
                "optimizer": {"learning_rate": 1e-3, "max_grad_norm": 0.5},
            },
        }
    )


def train(worker: PolicyWorker, saved: Path) -> tuple[dict[str, Metric], dict[str, torch.Tensor]]:
    """Update twice, save, and update again; return the last metrics and the weights."""
    batches = [train_batch(random_rollouts(seed)) for seed in range(3)]
    for batch in batches[:2]:
        worker.update(batch)
    worker.save(str(saved))
    report = worker.update(batches[2])
    weights = {name: tensor.clone() for name, tensor in worker.backend.weights()}

    worker.load(str(saved))
    again = worker.update(batches[2])
    for name in COMPARED:
        assert again[name].value == pytest.approx(report[name].value, rel=1e-6), name
    return report, weights


def resume(worker: PolicyWorker, saved: Path) -> dict[str, Metric]:
    """Continue what `train` saved; return the metrics of its last update."""
    worker.load(str(saved))
    return worker.update(train_batch(random_rollouts(2)))


def one_of_two(directory: Path, rank: int, addresses: Queue[Any], results: Queue[Any]) -> None:
    """Run a rank in a process of its own."""
    worker = PolicyWorker(config(directory / "model", 2), str(directory / "model"), rank, 2)
    if rank == 0:
        address = worker.rendezvous()
        addresses.put(address)
    else:
        address = addresses.get(timeout=300)
    worker.setup(address)
    report, weights = train(worker, directory / "two")
    if rank == 0:
        torch.save(weights, directory / "two.pt")
    resumed = resume(worker, directory / "one")
    results.put((rank, (report, resumed)))
    worker.shutdown()


def test_updates_do_not_depend_on_ranks_or_packing(tmp_path: Path):
    build_family("llama", tmp_path / "model")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    context = multiprocessing.get_context("spawn")
    addresses: Any = context.Queue()
    results: Any = context.Queue()
    arguments = [(tmp_path, rank, addresses, results) for rank in (0, 1)]
    processes = [context.Process(target=one_of_two, args=args) for args in arguments]

    directory = tmp_path / "model"
    worker = PolicyWorker(config(directory, 1), str(directory), 0, 1)
    try:
        worker.setup(worker.rendezvous())
        one, expected = train(worker, tmp_path / "one")
        for process in processes:
            process.start()
        reports = dict(results.get(timeout=400) for _ in processes)
        two_on_one = resume(worker, tmp_path / "two")
    finally:
        worker.shutdown()
        for process in processes:
            if process.pid is not None:
                process.join(timeout=60)
                process.kill()

    two, one_on_two = (values(combine(pair)) for pair in zip(*reports.values(), strict=True))
    for name in COMPARED:
        assert two[name] == pytest.approx(values(one)[name], rel=1e-4, abs=1e-6), name
        assert one_on_two[name] == pytest.approx(values(one)[name], rel=1e-4, abs=1e-6), name
        assert values(two_on_one)[name] == pytest.approx(two[name], rel=1e-4, abs=1e-6), name
    base = load_file(directory / "model.safetensors")
    found = torch.load(tmp_path / "two.pt", weights_only=True)
    assert max(float((found[name] - base[name]).abs().max()) for name in base) > 5e-4
    for name, tensor in found.items():
        # In Adam's first steps the sign of a gradient of about 0 is rounding.
        agree = (tensor - expected[name]).abs() < 1e-5
        assert agree.float().mean() > 0.999, name

    adapters = load_file(tmp_path / "two" / "adapter_model.safetensors")
    moments = ShardedState.of(tmp_path / "two").tensors
    of_weights = [name for name in moments if name.startswith("exp_avg/")]
    assert len(of_weights) == len(adapters) == 28  # of the adapters alone
    assert all(".lora_" in name for name in moments)
