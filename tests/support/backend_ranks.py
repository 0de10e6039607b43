"""Process groups of 1 and 2 ranks that run training backends, and what they run.

A group is started once; it serves one backend after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import ray
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from rlsys.config import TrainableRoleConfig
from rlsys.config.model_role import ModelRoleConfig
from rlsys.data.batches import RolloutBatch
from rlsys.data.packing import Pack, pack_rows
from rlsys.models import resolve_model
from rlsys.models.loading import load_causal_lm
from tests.support.rollout_examples import random_rollouts
from workers.training.backends import build_backend
from workers.training.backends.backend import ModelBackend
from workers.training.losses import Denominators, PackColumns, PackLoss, backward_passes
from workers.training.packed_attention import register_packed_attention
from workers.training.packed_model import PackedCausalLM, PackResult, PackTensors
from workers.training.process_group import join_process_group, open_rendezvous
from workers.training.saved_state import save_backend

T = TypeVar("T")
CPU = torch.device("cpu")
TIMEOUT_S = 240.0
ENTROPY_BONUS = 0.01


class BackendRank:
    """One rank of a process group, in a Ray actor."""

    def rendezvous(self, ranks: int) -> str:
        """Open the store at which the ranks meet, on rank 0."""
        self.store = open_rendezvous("127.0.0.1", ranks)
        return f"127.0.0.1:{self.store.port}"

    def join(self, address: str, rank: int, ranks: int) -> None:
        """Join the other ranks."""
        torch.set_num_threads(1)
        join_process_group(address, rank, ranks, getattr(self, "store", None))

    def run(self, scenario: Callable[..., T], *arguments: Any) -> T:
        """Run a function of this module; collective."""
        return scenario(*arguments)


class BackendRanks:
    """The groups, by their number of ranks."""

    def __init__(self) -> None:
        self._groups: dict[int, list[Any]] = {}

    def run(self, ranks: int, scenario: Callable[..., T], *arguments: Any) -> list[T]:
        """Run `scenario` on all ranks of a group, and return their results."""
        try:
            actors = self._groups.get(ranks) or self._start(ranks)
            runs = [actor.run.remote(scenario, *arguments) for actor in actors]
            return ray.get(runs, timeout=TIMEOUT_S)
        except BaseException:
            self.kill(ranks)  # a rank may wait forever for one that failed
            raise

    def _start(self, ranks: int) -> list[Any]:
        remote_class: Any = ray.remote(BackendRank)
        actors = [remote_class.options(num_cpus=0).remote() for _ in range(ranks)]
        self._groups[ranks] = actors
        address = ray.get(actors[0].rendezvous.remote(ranks))
        ray.get([actor.join.remote(address, rank, ranks) for rank, actor in enumerate(actors)])
        return actors

    def kill(self, ranks: int | None = None) -> None:
        """End the processes of one group, or of all."""
        for count in list(self._groups) if ranks is None else [ranks]:
            for actor in self._groups.pop(count, []):
                ray.kill(actor)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A backend, and how it gets its batches."""

    backend: str = "deepspeed"
    zero_stage: int = 3
    compute_dtype: str = "float32"
    budget: int = 4096
    packing: bool = True
    shared_prefix: bool = True
    gradient_checkpointing: bool = False
    optimizer: Mapping[str, Any] = field(default_factory=dict)

    def settings(self) -> TrainableRoleConfig:
        """Return the settings of a trained model."""
        return TrainableRoleConfig.model_validate(
            {
                "backend": self.backend,
                "deepspeed": {"zero_stage": self.zero_stage},
                "compute_dtype": self.compute_dtype,
                "gradient_checkpointing": self.gradient_checkpointing,
                "optimizer": OPTIMIZER | dict(self.optimizer),
            }
        )

    def frozen(self) -> ModelRoleConfig:
        """Return the settings of a frozen model."""
        common = self.settings().model_dump(include=set(ModelRoleConfig.model_fields))
        return ModelRoleConfig.model_validate(common)


# Adam divides by |g| + eps: a large eps keeps the rounding of the gradient small in the update.
OPTIMIZER = {"learning_rate": 1e-3, "eps": 1e-4, "weight_decay": 0.1, "max_grad_norm": 0.2}
# One step with these changes a weight by g / (1 + |g|), so the gradient can be read from it.
GRADIENT = {"betas": (0.0, 0.0), "eps": 1.0, "weight_decay": 0.0, "max_grad_norm": 0.0}


def example() -> tuple[RolloutBatch, NDArray[np.float32]]:
    """Return 24 responses, and advantages [N]."""
    batch = random_rollouts(0, groups=6, samples=4)
    noise = np.random.default_rng(1).normal(size=len(batch.token_ids))
    return batch, np.where(batch.response_mask, noise, 0.0).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class PolicyGradient:
    """The sum of advantage x log-prob over the tokens, with an entropy bonus."""

    advantages: NDArray[np.float32]
    factor: float = 1.0

    def __call__(self, result: PackResult, columns: PackColumns, sizes: Denominators) -> PackLoss:
        gains = result.logprobs * columns.take(self.advantages) + ENTROPY_BONUS * result.entropies
        loss = -self.factor * gains.sum() / sizes.num_tokens
        return PackLoss(loss=loss, sums={"loss": float(loss.detach())}, maxima={})


class Running(NamedTuple):
    """A backend with the packs of its rank."""

    backend: ModelBackend[PackResult]
    packs: list[Pack]
    loss: PolicyGradient
    sizes: Denominators

    def update(self, rate: float = 1e-3, *, broken: bool = False) -> tuple[float, float]:
        """Take one step; return the loss over all ranks and the gradient's norm.

        Args:
            broken: the loss of this rank is NaN.
        """
        loss = PolicyGradient(
            advantages=self.loss.advantages, factor=math.nan if broken else self.loss.factor
        )
        passes = backward_passes(self.backend, self.packs, loss, self.sizes)
        total = torch.tensor(sum(part.sums["loss"] for _, _, part in passes))
        dist.all_reduce(total)
        return float(total), self.backend.step(rate)

    def weights(self) -> dict[str, Tensor]:
        """Return copies of the weights on rank 0, and nothing elsewhere."""
        return {name: tensor.clone() for name, tensor in self.backend.weights()}

    @torch.no_grad()
    def logprobs(self) -> NDArray[np.float32]:
        """Return [N] the log-probabilities of all ranks."""
        flat = torch.zeros(len(self.loss.advantages))
        for pack in self.packs:
            result = self.backend.forward(PackTensors.of(pack, CPU))
            if not pack.is_padding:
                flat[torch.from_numpy(pack.flat_positions)] = result.logprobs
        dist.all_reduce(flat)
        return flat.numpy()


def tiny(case: Case, dtype: torch.dtype = torch.float32) -> PackedCausalLM:
    """Return the tiny model with the forward pass of the case."""
    model = load_causal_lm(resolve_model("tiny"), dtype=dtype, attention="sdpa")
    if case.packing:
        model.set_attn_implementation(register_packed_attention("sdpa"))
    return PackedCausalLM(model, chunk_tokens=7, packing=case.packing)


def running(case: Case, *, frozen: bool = False) -> Running:
    """Build the backend of a case on this rank; collective."""
    batch, advantages = example()
    packs = pack_rows(
        batch.sequences,
        np.arange(len(batch)),
        budget=case.budget,
        rank=dist.get_rank(),
        ranks=dist.get_world_size(),
        shared_prefix_packing=case.shared_prefix and case.packing,
        padded=not case.packing,
    )
    settings = case.frozen() if frozen else case.settings()
    stored = torch.float32
    if frozen and case.compute_dtype == "bfloat16":
        stored = torch.bfloat16
    module = tiny(case, stored).requires_grad_(not frozen)
    return Running(
        backend=build_backend(module, settings, CPU, resolve_model("tiny")),
        packs=packs,
        loss=PolicyGradient(advantages=advantages),
        sizes=Denominators(
            num_tokens=int(batch.response_mask.sum()), num_sequences=len(batch), max_tokens=9
        ),
    )


class Trained(NamedTuple):
    """What five updates did."""

    logprobs: NDArray[np.float32]  # [N] before them
    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def trained(case: Case, steps: int = 5) -> Trained:
    """Return the results of a few updates."""
    run = running(case)
    logprobs = run.logprobs()
    losses, norms = zip(*(run.update() for _ in range(steps)), strict=True)
    return Trained(logprobs, list(losses), list(norms), run.weights())


def one_gradient(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights before and after a step with the settings `GRADIENT` at rate 1."""
    run = running(case)
    return run.weights(), (run.update(1.0), run.weights())[1]


def with_broken_step(case: Case) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Break the gradient of the last rank in the second of three steps.

    Returns:
        The norms; the weights after each step.
    """
    run = running(case)
    last = dist.get_rank() == dist.get_world_size() - 1
    norms, weights = [], []
    for broken in (False, True, False):
        norms.append(run.update(broken=broken and last)[1])
        weights.append(run.weights())
    return norms, weights


def saved_and_continued(case: Case, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights after five steps, and the same with a checkpoint after the third."""
    run = running(case)
    for _ in range(3):
        run.update()
    save_backend(run.backend, path)
    for _ in range(2):
        run.update()
    straight = run.weights()

    resumed = running(case)
    resumed.update()  # what it did before is forgotten
    resumed.backend.load(path)
    for _ in range(2):
        resumed.update()
    return straight, resumed.weights()


def refusal(case: Case, path: Path) -> str:
    """Return why a backend does not load a checkpoint."""
    try:
        running(case).backend.load(path)
    except ValueError as error:
        return str(error)
    return ""


def first_weights(case: Case, frozen: bool) -> tuple[NDArray[np.float32], dict[str, Tensor]]:
    """Return log-probabilities and weights as they were loaded."""
    run = running(case, frozen=frozen)
    return run.logprobs(), run.weights()
