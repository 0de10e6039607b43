"""`solver: network`: the horizons' baselines from a small network on the policy's hidden states.

outputs (before an update, of a mini-batch not seen yet) -> baselines -> advantages
accumulate (each pack of the update) -> step
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlsys.algorithms.advantages.hierarchical.grouped_batch import (
    GroupedBatch,
    Places,
    others_variance,
)
from rlsys.algorithms.advantages.hierarchical.horizons import FIELD, Horizons

if TYPE_CHECKING:
    from rlsys.config import RunConfig


class BaselineNetwork(nn.Module):
    """A network with one output for each of p horizons, all 0 until it has learned.

        b_t = A tanh(B [h_{t-1} / rms(h_{t-1}), t / span, 1])

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
        """Compute baselines [m, p] from hidden states [m, d] and positions [m] in the response.

        No gradient flows to the policy.
        """
        hidden = hidden.detach().to(self.inward.weight.dtype)
        scale = hidden.square().mean(dim=1, keepdim=True).clamp(min=1e-12).rsqrt()
        place = (positions / self.span).to(hidden.dtype)[:, None]
        inputs = torch.cat([hidden * scale, place], dim=1)
        return self.outward(torch.tanh(self.inward(inputs)))


@dataclass(frozen=True)
class BaselineRegression:
    """The regression that a network learns from a batch.

        minimise sum_t n_t W_t^2,   W_t = base_t - features_t . b_t

        features_t^(s) = v_i rho_{<=s} / sqrt(number of horizons of t),   base = rho_{<=L} (R - c)

    v_i is the variance of the rewards of the other responses, as in the pooled fit: where they are
    all equal the features are 0, and groups of equal rewards keep a weight of exactly 0.
    """

    features: Tensor  # [..., p] 0 for horizons before t
    base: Tensor  # [...]
    weights: Tensor  # [...] n_t, 0 outside the mask

    @staticmethod
    def of(batch: GroupedBatch, places: Places) -> BaselineRegression:
        """Return the regression of a batch [B, T] in groups."""
        width = batch.ratios.shape[2]
        positions = torch.arange(width, device=batch.ratios.device)
        features = batch.horizons.features(batch.ratios, positions).transpose(1, 2)  # [K, G, T, p]
        features = features * others_variance(batch.rewards, batch.present)[..., None, None]
        base = batch.base[..., None].expand(-1, -1, width)
        return BaselineRegression(
            features=places.gather(features, torch.float32),
            base=places.gather(base, torch.float32),
            weights=places.gather(batch.weights, torch.float32),
        )

    @staticmethod
    def of_columns(columns: Tensor) -> BaselineRegression:
        """Return the regression that `columns` returned as one array."""
        return BaselineRegression(columns[..., :-2], columns[..., -2], columns[..., -1])

    def columns(self) -> Tensor:
        """Return [..., p + 2] all three arrays in one, as `AdvantageOutput.auxiliary_targets`."""
        return torch.cat([self.features, self.base[..., None], self.weights[..., None]], dim=-1)

    def corrections(self, baselines: Tensor) -> Tensor:
        """Return [B, T] features . b of the network's outputs [B, T, p].

        Raises:
            ValueError: the outputs belong to other horizons.
        """
        if baselines.shape != self.features.shape:
            raise ValueError(
                f"auxiliary: {tuple(baselines.shape)}, but these horizons have "
                f"{tuple(self.features.shape)}. Build the network for the same {FIELD}.horizons, "
                "block_size and max_tokens."
            )
        return (self.features * baselines).sum(dim=-1)

    def loss(self, baselines: Tensor) -> Tensor:
        """Return the sum over tokens of n (base - features . b)^2.

        It is the second moment of the gradient, with `weights` as a proxy of squared score norms.

        Source: docs/hierarchical_derivation.md, equation (31). Gradient flows to `baselines`.
        """
        residual = self.base - self.corrections(baselines)
        return (self.weights * residual.square()).sum()


@dataclass(frozen=True)
class HeldOutGain:
    """The fit of predictions f = features . b on batches that the network had not seen.

        gamma = sum n base f / sum n f^2, clipped to [0, 1]:  minimises sum n (base - gamma f)^2

    gamma is the shrinkage coefficient. The sums are discounted from batch to batch.
    """

    linear: float = 0.0
    quadratic: float = 0.0

    @property
    def shrinkage(self) -> float:
        """Return gamma; 0 before the first batch."""
        if not self.quadratic > 0:
            return 0.0
        return min(max(self.linear / self.quadratic, 0.0), 1.0)

    def after(self, linear: float, quadratic: float, *, keep: float = 0.9) -> HeldOutGain:
        """Return the gain with one more batch; earlier batches count `keep` as much as before.

        A network whose outputs are all 0 leaves it unchanged.
        """
        if quadratic <= 0:
            return self
        return HeldOutGain(keep * self.linear + linear, keep * self.quadratic + quadratic)


class LearnedBaselines:
    """A `TokenAuxiliary`: the network, its optimizer, and its shrinkage coefficient."""

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
        """Return [m, p] baselines, multiplied by the shrinkage coefficient."""
        return self.gain.shrinkage * self.network(hidden, positions)

    def accumulate(self, hidden: Tensor, positions: Tensor, targets: Tensor) -> None:
        """Add the gradient of the regression at m tokens, and the sums of the held-out gain."""
        regression = BaselineRegression.of_columns(targets)
        outputs = self.network(hidden, positions)
        regression.loss(outputs).backward()

        predicted = regression.corrections(outputs.detach()).double()
        weights = regression.weights
        linear = (weights * regression.base * predicted).sum()
        quadratic = (weights * predicted.square()).sum()
        tokens = weights.new_tensor(len(targets)).double()
        self._sums += torch.stack([linear, quadratic, tokens])

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
        """Take one step of Adam on the mean over tokens, and return the shrinkage that was in use.

        Gradients that are not finite are dropped, and with them the batch.
        """
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
        # The learning rate stays that of the configuration; the saved one is overwritten.
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.param_groups[0]["lr"] = rate
        self.gain = HeldOutGain(*state["gain"])
