"""The features of hierarchical baselines: prefix ratios, and the horizons of each position."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HORIZON_SETS = ("final", "current", "current_and_final", "blocks", "all")
# `all` has a horizon per token, so its cost grows with the cube of the length.
LONGEST_FOR_ALL = 512
# Its exponential still fits float32, and the product of four of them float64.
LARGEST_LOG_RATIO = 80.0
FIELD = "algorithm.advantage.parameters"


def check_horizons(name: str, length: int, block_size: int) -> None:
    """Refuse an unknown horizon set, or one that responses of `length` tokens cannot have.

    Raises:
        ValueError: unknown name, a block size out of range, or `all` for long responses.
    """
    if name not in HORIZON_SETS:
        raise ValueError(f"{FIELD}.horizons: {name!r} is not one of {', '.join(HORIZON_SETS)}")
    if name == "blocks" and block_size < 1:
        raise ValueError(f"{FIELD}.block_size: {block_size} must be at least 1 token")
    if name == "all" and length > LONGEST_FOR_ALL:
        raise ValueError(
            f"{FIELD}.horizons: 'all' takes at most {LONGEST_FOR_ALL} tokens, these are {length}. "
            "Set it to 'blocks'."
        )


def check_log_ratio_clip(bound: float | None) -> None:
    """Refuse a bound that is not positive.

    Raises:
        ValueError: it is not positive and finite.
    """
    if bound is not None and not (bound > 0 and math.isfinite(bound)):
        raise ValueError(
            f"{FIELD}.log_ratio_clip: {bound} must be positive and finite, or null for none"
        )


@dataclass(frozen=True)
class Horizons:
    """The horizons of every position t of a batch that is T tokens wide.

    They are the fixed positions s >= t of `base`, and t itself if `current`.
    """

    # [S] int64, ascending; may lie behind the last column of the ratios, which are constant from
    # there on
    base: Tensor
    current: bool
    span: int  # positions that the horizons are laid over

    @staticmethod
    def of(name: str, length: int, block_size: int, device: torch.device | None = None) -> Horizons:
        """Return the horizon set called `name` for responses of at most `length` tokens.

        `device` is that of the ratios.

        Conventions: positions count from 0. `final` is the last position: the cumulative log-ratio
        is constant after a response's end, so the ratio there is that of the whole response,
        whatever its length. `blocks` ends a horizon after every `block_size` tokens.

        Raises:
            ValueError: see `check_horizons`.
        """
        check_horizons(name, length, block_size)
        last = length - 1
        if name == "current":
            base = []
        elif name == "all":
            base = list(range(length))
        elif name == "blocks":
            base = sorted({*range(block_size - 1, last, block_size), last})
        else:
            base = [last]

        return Horizons(
            base=torch.tensor(base, dtype=torch.int64, device=device),
            current=name in ("current", "current_and_final", "blocks"),
            span=length,
        )

    @property
    def most(self) -> int:
        """Return the number of horizons of the first position, which has the most."""
        return len(self.base) + self.current

    def count(self, positions: Tensor) -> Tensor:
        """Return [t] the number of horizons at each position, at least 1."""
        fixed = len(self.base) - torch.searchsorted(self.base, positions)
        return (fixed + self.current).clamp(min=1)

    def fixed(self, ratios: Tensor) -> Tensor:
        """Select the ratios up to the fixed horizons: [K, G, T] -> [K, G, S]."""
        return ratios[:, :, self.base.clamp(max=ratios.shape[2] - 1)]

    def held(self, positions: Tensor) -> Tensor:
        """Return [t, S] float64, 1 where a fixed horizon is not before the position."""
        return (self.base >= positions[:, None]).double()

    def features(self, ratios: Tensor, positions: Tensor) -> Tensor:
        """Compute the features of each position from prefix ratios: [K, G, T] -> [K, t, G, p].

        They are the ratios up to the position's horizons over sqrt(number of horizons), and 0 for
        horizons before it. With this division a response with all ratios 1 has a feature vector of
        length 1 for every horizon set, so that one ridge shrinks all horizon sets alike.
        """
        parts = [self.fixed(ratios)[:, None] * self.held(positions)[None, :, None, :]]
        if self.current:
            parts.append(ratios[:, :, positions].transpose(1, 2)[..., None])
        return torch.cat(parts, dim=3) / self.count(positions).sqrt()[None, :, None, None]

    def kernel(self, ratios: Tensor, positions: Tensor, roots: Tensor) -> Tensor:
        """Return [K, t, G, G] the products of the features of every two responses.

        Each response's features are multiplied by its `roots` [K, t, G]. The features are never
        formed: the fixed horizons of t are a trailing part of those of position 0, so the products
        of all t are the cumulative sums, from the last horizon backwards, of one sequence of
        rank-one terms.
        """
        fixed = self.fixed(ratios).movedim(2, 0)  # [S, K, G]
        terms = fixed[:, :, :, None] * fixed[:, :, None, :]
        nothing = terms.new_zeros(1, *fixed.shape[1:], fixed.shape[2])
        trailing = torch.cat([terms.flip(0).cumsum(0).flip(0), nothing])

        # Indexing copies, so the sums may be scaled in place.
        total = trailing[torch.searchsorted(self.base, positions)].transpose(0, 1)
        scaled = roots / self.count(positions).sqrt()[:, None]
        total.mul_(scaled[..., :, None]).mul_(scaled[..., None, :])

        if self.current:
            now = ratios[:, :, positions].transpose(1, 2) * scaled
            total.addcmul_(now[..., :, None], now[..., None, :])
        return total


def prefix_ratios(
    rollout_logprobs: Tensor,
    old_logprobs: Tensor,
    response_mask: Tensor,
    *,
    log_ratio_clip: float | None = None,
) -> tuple[Tensor, float]:
    """Return [B, T] float64 prefix ratios and the clip fraction: of tokens whose ratio was clipped.

        rho_{<=t} = exp(D_t),   D_t = sum_{u <= t, u in mask} old_u - rollout_u

    The ratio compares the probability of the response up to and including t under the trainer's
    policy with that under the sampler's.

    Source: docs/hierarchical_derivation.md, equation (3).

    Shapes: all [B, T].

    Conventions: tokens outside the mask (padding, tool output) do not count, so D is constant over
    them and after the end. `log_ratio_clip` c bounds D to [-c, c], which biases the gradient
    towards that of the rollout policy's own distribution; off by default.

    Raises:
        ValueError: log-probabilities inside the mask that are not finite, or a ratio that
            overflows.
    """
    cumulative = _log_prefix_ratios(rollout_logprobs, old_logprobs, response_mask)
    clip_fraction = 0.0
    if log_ratio_clip is not None:
        bounded = cumulative.clamp(-log_ratio_clip, log_ratio_clip)
        changed = cumulative.exp() != bounded.exp()
        if response_mask.any():
            clip_fraction = float(changed[response_mask].double().mean())
        cumulative = bounded

    too_far = cumulative.abs() > LARGEST_LOG_RATIO
    if too_far.any():
        row, column = _first(too_far)
        raise ValueError(
            f"the log-ratio of response {row} reaches {float(cumulative[row, column]):.1f} at "
            f"token {column}, and its exponential is out of range. The policies are too far apart "
            f"(or their tokens do not match); set {FIELD}.log_ratio_clip to bound it."
        )
    return cumulative.exp(), clip_fraction


def _log_prefix_ratios(
    rollout_logprobs: Tensor, old_logprobs: Tensor, response_mask: Tensor
) -> Tensor:
    """Return [B, T] float64 D_t of `prefix_ratios`, before any bound."""
    for name, array in (("rollout_logprobs", rollout_logprobs), ("old_logprobs", old_logprobs)):
        broken = ~torch.isfinite(array) & response_mask
        if broken.any():
            raise ValueError(
                f"{name}: {int(broken.sum())} values inside the response mask are not finite, "
                f"first at {_first(broken)}"
            )
    differences = old_logprobs.double() - rollout_logprobs.double()
    return torch.where(response_mask, differences, 0.0).cumsum(dim=1)


def _first(where: Tensor) -> tuple[int, int]:
    """Return row and column of the first entry that is true."""
    row, column = where.nonzero()[0].tolist()
    return row, column
