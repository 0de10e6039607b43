"""`solver: network`: the horizons' baselines from a small network on what the policy knows just before each token.

outputs (before an update, of a mini-batch not seen yet) -> baselines -> advantages
accumulate (each pack of the update) -> step
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlsys.algorithms.advantages.hierarchical.grouped_batch import (
    GroupedBatch,
    Places,
    others_variance,
)
from rlsys.algorithms.advantages.hierarchical.horizons import FIELD, Horizons
from rlsys.config import RunConfig


class BaselineNetwork(nn.Module):
    """b_t = A tanh(B [h_{t-1} / rms(h_{t-1}), t / span, 1]): one output for each of p horizons, all 0 until it has learned.

    h_{t-1} is the policy's last hidden state at the position that predicts token t: it has seen the
    prompt and the tokens before t, and nothing else, so the baselines leave the gradient unbiased
    (docs/hierarchical_derivation.md, section 4).
    """

    def __init__(self, hidden_size: int, horizons: int, *, width: int, span: int) -> None:
        super().__init__()
        self.span = span
        self.inward = nn.Linear(hidden_size + 1, width)
        self.outward = nn.Linear(width, horizons, bias=False)
        nn.init.zeros_(self.outward.weight)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """[m, d] hidden states, without gradient to the policy, and [m] positions within the response -> [m, p] baselines."""
        hidden = hidden.detach().to(self.inward.weight.dtype)
        scale = hidden.square().mean(dim=1, keepdim=True).clamp(min=1e-12).rsqrt()
        place = (positions / self.span).to(hidden.dtype)[:, None]
        return self.outward(torch.tanh(self.inward(torch.cat([hidden * scale, place], dim=1))))


@dataclass(frozen=True)
class BaselineRegression:
    """What a network learns from a batch: W_t = base_t - features_t . b_t should be small.

        sum_t n_t W_t^2,   features_t^(s) = v_i rho_{<=s} / sqrt(number of horizons of t),   base = rho_{<=L} (R - c)

    v_i is the variance of the rewards of the others of i's group, as in the pooled fit: where they all
    agree there is nothing to expect, and groups of equal rewards keep a weight of exactly 0.
    """

    features: Tensor  # [..., p] 0 for horizons before t
    base: Tensor  # [...]
    weights: Tensor  # [...] n_t, 0 outside the mask

    @staticmethod
    def of(batch: GroupedBatch, places: Places) -> BaselineRegression:
        """Return that of a batch [B, T] in groups."""
        width = batch.ratios.shape[2]
        positions = torch.arange(width, device=batch.ratios.device)
        features = batch.horizons.features(batch.ratios, positions).transpose(1, 2)  # [K, G, T, p]
        features = features * others_variance(batch.rewards, batch.present)[..., None, None]
        base = batch.base[..., None].expand(-1, -1, width)
        arrays = (features, base, batch.weights)
        return BaselineRegression(*(places.gather(array, torch.float32) for array in arrays))

    @staticmethod
    def of_columns(columns: Tensor) -> BaselineRegression:
        """Return what `columns` holds."""
        return BaselineRegression(columns[..., :-2], columns[..., -2], columns[..., -1])

    def columns(self) -> Tensor:
        """Return [..., p + 2] all of it, as `AdvantageOutput.auxiliary_targets`."""
        return torch.cat([self.features, self.base[..., None], self.weights[..., None]], dim=-1)

    def corrections(self, baselines: Tensor) -> Tensor:
        """Return [B, T] features . b of the network's outputs [B, T, p].

        Raises:
            ValueError: they are of other horizons.
        """
        if baselines.shape != self.features.shape:
            raise ValueError(
                f"auxiliary: {tuple(baselines.shape)}, but these horizons have "
                f"{tuple(self.features.shape)}. Build the network for the same {FIELD}.horizons, "
                "block_size and max_tokens."
            )
        return (self.features * baselines).sum(dim=-1)

    def loss(self, baselines: Tensor) -> Tensor:
        """Return the sum over tokens of n (base - features . b)^2: the second moment of the gradient as `weights` approximate it.

        Source: docs/hierarchical_derivation.md, equation (31). Gradient flows to `baselines`.
        """
        return (self.weights * (self.base - self.corrections(baselines)).square()).sum()


@dataclass(frozen=True)
class HeldOutGain:
    """How well predictions f = features . b did on batches the network had not seen, with forgetting; sets the shrinkage.

    gamma = sum n base f / sum n f^2,  held within 0 and 1:  minimises sum n (base - gamma f)^2
    """

    linear: float = 0.0
    quadratic: float = 0.0

    @property
    def shrinkage(self) -> float:
        """0 before the first batch."""
        return min(max(self.linear / self.quadratic, 0.0), 1.0) if self.quadratic > 0 else 0.0

    def after(self, linear: float, quadratic: float, *, keep: float = 0.9) -> HeldOutGain:
        """Return it with one more batch's sums; what was there counts `keep` as much. A network that says nothing yet leaves it."""
        if quadratic <= 0:
            return self
        return HeldOutGain(keep * self.linear + linear, keep * self.quadratic + quadratic)


class LearnedBaselines:
    """A `TokenAuxiliary`: the network with its optimizer, and the shrinkage that it has earned on batches it had not seen."""

    def __init__(self, network: BaselineNetwork, learning_rate: float) -> None:
        self.network = network
        self.width = network.outward.out_features
        self.optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
        self.gain = HeldOutGain()
        self._sums = torch.zeros(3, dtype=torch.float64)  # of n base f, n f^2 and tokens

    @staticmethod
    def build(config: RunConfig, hidden_size: int) -> LearnedBaselines:
        """Return the network of a run; the same on every rank."""
        advantage, limit = config.algorithm.advantage, config.generation.max_tokens
        parameters = {"horizons": "current_and_final", "block_size": 256} | advantage.parameters
        span = parameters.get("max_tokens") or limit
        horizons = Horizons.of(parameters["horizons"], span, parameters["block_size"]).most
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.trainer.seed)
            network = BaselineNetwork(
                hidden_size, horizons, width=advantage.auxiliary.width, span=limit
            )
        return LearnedBaselines(network, advantage.auxiliary.learning_rate)

    def to(self, device: torch.device) -> None:
        """See `TokenAuxiliary`."""
        self.network.to(device)
        self._sums = self._sums.to(device)

    @torch.no_grad()
    def outputs(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Return [m, p] baselines, with the shrinkage in them."""
        return self.gain.shrinkage * self.network(hidden, positions)

    def accumulate(self, hidden: Tensor, positions: Tensor, targets: Tensor) -> None:
        """Add the gradient of the regression at m tokens, and what tells how well the network predicted it."""
        regression = BaselineRegression.of_columns(targets)
        outputs = self.network(hidden, positions)
        regression.loss(outputs).backward()

        predicted = regression.corrections(outputs.detach()).double()
        weights = regression.weights
        self._sums += torch.stack(
            [
                (weights * regression.base * predicted).sum(),
                (weights * predicted.square()).sum(),
                weights.new_tensor(len(targets)).double(),
            ]
        )

    def sums(self) -> Sequence[Tensor]:
        """See `TokenAuxiliary`: the sums over tokens, and the gradients."""
        return [self._sums, *self._gradients()]

    def _gradients(self) -> list[Tensor]:
        """Return the gradients of all parameters, 0 on a rank that had no token."""
        found = []
        for parameter in self.network.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            found.append(parameter.grad)
        return found

    def step(self) -> dict[str, float]:
        """Take one step of Adam on the mean over tokens. The shrinkage that was in use is reported."""
        linear, quadratic, tokens = self._sums.tolist()
        gradients = self._gradients()
        used = self.gain.shrinkage
        if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            for gradient in gradients:
                gradient.div_(max(tokens, 1))
            self.optimizer.step()
            self.gain = self.gain.after(linear, quadratic)
        self.optimizer.zero_grad()
        self._sums.zero_()
        return {"shrinkage_network": used}

    def state_dict(self) -> dict[str, Any]:
        """See `TokenAuxiliary`."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "gain": [self.gain.linear, self.gain.quadratic],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `TokenAuxiliary`."""
        self.network.load_state_dict(state["network"])
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.param_groups[0]["lr"] = rate  # that of the configuration, not the saved one
        self.gain = HeldOutGain(*state["gain"])
