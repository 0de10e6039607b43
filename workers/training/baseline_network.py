"""`solver: network`: the baseline network beside the policy, evaluated on each mini-batch before it learns from it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rlsys.algorithms.advantages.hierarchical.baseline_network import (
    BaselineNetwork,
    BaselineRegression,
    HeldOutGain,
    network_layers,
    regression_loss,
)
from rlsys.config import RunConfig
from rlsys.data.packing import Pack
from rlsys.metrics import Metric, mean
from workers.training.packed_model import PackResult

FILE = "baseline_network.pt"


def wants_network(config: RunConfig) -> bool:
    """Whether the advantages of this run come with a baseline network."""
    advantage = config.algorithm.advantage
    return advantage.name == "hierarchical" and advantage.parameters.get("solver") == "network"


class BaselineLearner:
    """Every rank has the whole network; they learn from the sum of their gradients.

        baselines (forward pass before the update) -> advantages -> learn (each pass of the update) -> step

    What `baselines` gave for a mini-batch is also how the strength learns: the network had not seen it.
    """

    def __init__(self, config: RunConfig, hidden_size: int, device: torch.device) -> None:
        advantage, limit = config.algorithm.advantage, config.generation.max_tokens
        parameters = {"layers": "current_and_final", "block_size": 256} | advantage.parameters
        span = parameters.get("max_tokens") or limit
        self.layers = network_layers(parameters["layers"], parameters["block_size"], span)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.trainer.seed)  # the same on every rank
            self.network = BaselineNetwork(
                hidden_size, self.layers, width=advantage.network.width, span=limit
            )
        self.network.to(device)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=advantage.network.learning_rate
        )
        self.gain = HeldOutGain()
        self._device = device
        self._sums = torch.zeros(
            3, dtype=torch.float64, device=device
        )  # of n base f, n f^2 and tokens

    @torch.no_grad()
    def baselines(self, result: PackResult, pack: Pack) -> Tensor:
        """[m, p] at the pack's tokens, with the strength in them."""
        return self.gain.strength * self._outputs(result, pack)

    def _outputs(self, result: PackResult, pack: Pack) -> Tensor:
        return self.network(
            result.hidden, torch.from_numpy(pack.response_positions).to(self._device)
        )

    def learn(self, result: PackResult, pack: Pack, regression: BaselineRegression) -> None:
        """Add the gradient of one pack of the mini-batch that `baselines` was asked about."""
        at = torch.from_numpy(pack.flat_positions)
        features, base, weights = (
            array[at].to(self._device)
            for array in (regression.features, regression.base, regression.weights)
        )
        outputs = self._outputs(result, pack)
        regression_loss(outputs, features, base, weights).backward()
        predicted = (features * outputs.detach()).sum(dim=1).double()
        self._sums += torch.stack(
            [
                (weights * base * predicted).sum(),
                (weights * predicted.square()).sum(),
                weights.new_tensor(len(at)).double(),
            ]
        )

    def step(self) -> dict[str, Metric]:
        """One step of Adam with what `learn` added on all ranks. The strength that was in use is reported."""
        gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad for p in self.network.parameters()
        ]
        for array in (self._sums, *gradients):
            dist.all_reduce(array)
        linear, quadratic, tokens = self._sums.tolist()
        for parameter, gradient in zip(self.network.parameters(), gradients, strict=True):
            parameter.grad = gradient / max(tokens, 1)
        used = self.gain.strength
        if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            self.optimizer.step()
            self.gain = self.gain.after(linear, quadratic)
        self.optimizer.zero_grad()
        self._sums.zero_()
        return {"advantage/strength_network": mean(used)}

    def save(self, directory: Path) -> None:
        """From rank 0: all ranks have the same."""
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"gain": [self.gain.linear, self.gain.quadratic]}, directory / FILE)

    def load(self, directory: Path) -> None:
        """Continue from what `save` wrote; a checkpoint of a run without a network leaves it at its start.

        Raises:
            ValueError: it was another network.
        """
        if not (directory / FILE).exists():
            return
        state = torch.load(directory / FILE, map_location=self._device, weights_only=True)
        try:
            self.network.load_state_dict(state["network"])
        except RuntimeError as error:
            raise ValueError(
                f"algorithm.advantage: the baseline network in {directory} has other layers or another width. Resume with the settings it was "
                "written with."
            ) from error
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.param_groups[0]["lr"] = rate  # that of the configuration, not the saved one
        self.gain = HeldOutGain(*state["gain"])
