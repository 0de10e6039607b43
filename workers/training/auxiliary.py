"""The small network that an estimator trains beside the policy, on every rank.

    outputs        in the forward pass before the update, for the advantages
    accumulate     for each pack of the update
    step           after the update, on the statistics of all ranks

The outputs for a mini-batch are computed before the network is trained on that mini-batch.
"""

from __future__ import annotations

import io
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
# Written by an earlier version, with another layout.
FORMER_FILE = "baseline_network.pt"


class HasHiddenSize(Protocol):
    """A model whose hidden states a network reads."""

    @property
    def hidden_size(self) -> int:
        """Width of a hidden state; read only where there is a network."""
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
        """Build the network of the configured estimator; None where it has none."""
        advantage = config.algorithm.advantage
        build = estimator_spec(advantage.name).auxiliary
        if build is None or not trains_auxiliary(advantage.name, advantage.parameters):
            return None
        return AuxiliaryLearner(build(config, model.hidden_size), device)

    def outputs(self, result: PackResult, pack: Pack) -> Tensor:
        """Return [m, p] outputs of the network at the pack's tokens."""
        return self.auxiliary.outputs(result.hidden, self._positions(pack))

    def accumulate(self, result: PackResult, pack: Pack, targets: NDArray) -> None:
        """Add one pack of the mini-batch to the statistics; `targets` [N, q] are of the batch."""
        pack_targets = torch.from_numpy(targets[pack.flat_positions]).to(self._device)
        self.auxiliary.accumulate(result.hidden, self._positions(pack), pack_targets)

    def _positions(self, pack: Pack) -> Tensor:
        return torch.from_numpy(pack.response_positions).to(self._device)

    def step(self) -> dict[str, Metric]:
        """Train the network on what all ranks have accumulated; collective."""
        # The statistics are sums over tokens, so their sum over ranks is that of the mini-batch.
        for array in self.auxiliary.sums():
            dist.all_reduce(array)

        numbers = self.auxiliary.step()
        return {f"advantage/{name}": mean(value) for name, value in numbers.items()}

    def content(self) -> bytes:
        """Return the network as the content of a file called `FILE`; all ranks have the same."""
        content = io.BytesIO()
        torch.save(self.auxiliary.state_dict(), content)
        return content.getvalue()

    def load(self, directory: Path) -> None:
        """Continue from the file with `content`.

        A checkpoint of a run without a network leaves the network as it was built.

        Raises:
            ValueError: the checkpoint has another network, or an earlier version wrote it.
        """
        if (directory / FORMER_FILE).exists():
            raise ValueError(
                f"algorithm.advantage: an earlier version wrote the network in {directory}. Resume "
                f"with that version, or start a new run with --model.path {directory}."
            )
        if not (directory / FILE).exists():
            return

        # The size of the network depends on the estimator's settings and the model.
        state = torch.load(directory / FILE, map_location=self._device, weights_only=True)
        try:
            self.auxiliary.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"algorithm.advantage: the auxiliary network in {directory} has another size. "
                "Resume with the settings it was written with."
            ) from error
