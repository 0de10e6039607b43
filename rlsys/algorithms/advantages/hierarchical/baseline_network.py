"""Route 3 to the layers' baselines: a small network on what the policy knows just before each token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlsys.algorithms.advantages.hierarchical.group_regression import GroupedBatch, others_variance
from rlsys.algorithms.advantages.hierarchical.horizons import FIELD, Layers


class BaselineNetwork(nn.Module):
    """b_t = A tanh(B [h_{t-1} / rms(h_{t-1}), t / span, 1]): one output for each of p layers, all 0 until it has learnt.

    h_{t-1} is the policy's last hidden state at the position that predicts token t: it has seen the prompt and the tokens before t, and nothing
    else, so the baselines are allowed (Lemma 1).
    """

    def __init__(self, hidden_size: int, layers: int, *, width: int, span: int) -> None:
        super().__init__()
        self.span = span
        self.inward = nn.Linear(hidden_size + 1, width)
        self.outward = nn.Linear(width, layers, bias=False)
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

        sum_t n_t W_t^2,   features_t^(s) = v_i rho_{<=s} / sqrt(number of layers of t),   base = rho_{<=L} (R - c)

    v_i is the variance of the rewards of the others of i's group, as in the pooled fit: where they all agree there is nothing to expect, and
    groups of equal rewards keep a weight of exactly 0.
    """

    features: Tensor  # [B, T, p] 0 for layers before t
    base: Tensor  # [B, T]
    weights: Tensor  # [B, T] n_t, 0 outside the mask

    @staticmethod
    def of(batch: GroupedBatch, places: Tensor) -> BaselineRegression:
        """From a batch in groups; `places` [K, G] says which response stands where."""
        width = batch.ratios.shape[2]
        positions = torch.arange(width, device=batch.ratios.device)
        features = batch.layers.features(batch.ratios, positions).transpose(1, 2)  # [K, G, T, p]
        features = features * others_variance(batch.rewards, batch.present)[..., None, None]
        order = places[batch.present]

        def in_order(values: Tensor) -> Tensor:
            whole = torch.empty(
                values[batch.present].shape, dtype=torch.float32, device=values.device
            )
            whole[order] = values[batch.present].float()
            return whole

        return BaselineRegression(
            in_order(features),
            in_order(batch.base[..., None].expand(-1, -1, width)),
            in_order(batch.weights),
        )

    def corrections(self, baselines: Tensor) -> Tensor:
        """[B, T] features . b of the network's outputs [B, T, p].

        Raises:
            ValueError: they are of other layers.
        """
        if baselines.shape != self.features.shape:
            raise ValueError(
                f"layer_baselines: {tuple(baselines.shape)}, but these layers have {tuple(self.features.shape)}. Build the network for the same "
                f"{FIELD}.layers, block_size and max_tokens."
            )
        return (self.features * baselines).sum(dim=2)


def regression_loss(baselines: Tensor, features: Tensor, base: Tensor, weights: Tensor) -> Tensor:
    """Sum over tokens of n (base - features . b)^2: the second moment of the gradient as `weights` approximate it.

    Source: references/hierarchical_token_baselines.md, section 8.4, route 3, written for W_t instead of Delta_t.

    Shapes: baselines and features [m, p], base and weights [m]. Gradient flows to `baselines`.
    """
    return (weights * (base - (features * baselines).sum(dim=1)).square()).sum()


@dataclass(frozen=True)
class HeldOutGain:
    """How well predictions f = features . b did on batches the network had not seen, with forgetting; sets the strength.

    gamma = sum n base f / sum n f^2,  held within 0 and 1:  minimises sum n (base - gamma f)^2
    """

    linear: float = 0.0
    quadratic: float = 0.0

    @property
    def strength(self) -> float:
        """0 before the first batch."""
        return min(max(self.linear / self.quadratic, 0.0), 1.0) if self.quadratic > 0 else 0.0

    def after(self, linear: float, quadratic: float, *, keep: float = 0.9) -> HeldOutGain:
        """With one more batch's sums; what was there counts `keep` as much. A network that says nothing yet leaves it."""
        if quadratic <= 0:
            return self
        return HeldOutGain(keep * self.linear + linear, keep * self.quadratic + quadratic)


def network_layers(name: str, block_size: int, max_tokens: int) -> int:
    """Outputs that a network needs for a layer set over `max_tokens` positions."""
    return Layers.of(name, max_tokens, block_size).most
