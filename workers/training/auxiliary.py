"""The small network of an estimator beside the policy, on every rank: answers before it learns, and learns what all ranks saw.

outputs (forward pass before the update) -> advantages -> accumulate (each pack of the update) -> step

What `outputs` gives for a mini-batch comes from a network that has not seen it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from rlsys.algorithms.advantages import TokenAuxiliary, estimator_spec, trains_auxiliary
from rlsys.config import RunConfig
from rlsys.data.packing import Pack
from rlsys.metrics import Metric, mean
from workers.training.packed_model import PackResult

FILE = "auxiliary.pt"
FORMER_FILE = "baseline_network.pt"  # of an earlier version, with another layout


class HasHiddenSize(Protocol):
    """A model whose hidden states a network reads."""

    @property
    def hidden_size(self) -> int:
        """Width of a hidden state; asked only where there is a network."""
        ...


class AuxiliaryLearner:
    """One rank's copy of a `TokenAuxiliary`; all ranks have the same."""

    def __init__(self, auxiliary: TokenAuxiliary, device: torch.device) -> None:
        auxiliary.to(device)
        self.auxiliary = auxiliary
        self.width = auxiliary.width
        self._device = device

    @staticmethod
    def of(
        config: RunConfig, model: HasHiddenSize, device: torch.device
    ) -> AuxiliaryLearner | None:
        """Return that of the configured estimator on `model`; None where it has no network."""
        advantage = config.algorithm.advantage
        build = estimator_spec(advantage.name).auxiliary
        if build is None or not trains_auxiliary(advantage.name, advantage.parameters):
            return None
        return AuxiliaryLearner(build(config, model.hidden_size), device)

    def outputs(self, result: PackResult, pack: Pack) -> Tensor:
        """Return [m, p] at the pack's tokens."""
        return self.auxiliary.outputs(result.hidden, self._positions(pack))

    def accumulate(self, result: PackResult, pack: Pack, targets: NDArray) -> None:
        """Add what one pack of the mini-batch teaches; `targets` [N, q] are those of the batch."""
        own = torch.from_numpy(targets[pack.flat_positions]).to(self._device)
        self.auxiliary.accumulate(result.hidden, self._positions(pack), own)

    def _positions(self, pack: Pack) -> Tensor:
        return torch.from_numpy(pack.response_positions).to(self._device)

    def step(self) -> dict[str, Metric]:
        """Learn from what was accumulated on all ranks; collective."""
        for array in self.auxiliary.sums():
            dist.all_reduce(array)
        numbers = self.auxiliary.step()
        return {f"advantage/{name}": mean(value) for name, value in numbers.items()}

    def save(self, directory: Path) -> None:
        """Write it from one rank: all have the same."""
        torch.save(self.auxiliary.state_dict(), directory / FILE)

    def load(self, directory: Path) -> None:
        """Continue from what `save` wrote; a checkpoint of a run without a network leaves it at its start.

        Raises:
            ValueError: it was another network, or an earlier version wrote it.
        """
        if (directory / FORMER_FILE).exists():
            raise ValueError(
                f"algorithm.advantage: an earlier version wrote the network in {directory}. Resume "
                f"with that version, or start a new run with --model.path {directory}."
            )
        if not (directory / FILE).exists():
            return
        state = torch.load(directory / FILE, map_location=self._device, weights_only=True)
        try:
            self.auxiliary.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"algorithm.advantage: the auxiliary network in {directory} has another size. "
                "Resume with the settings it was written with."
            ) from error
