"""The loss of one packed forward pass: the algorithm functions, applied to the tokens of a pack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.algorithms.kl import kl_estimate
from rlsys.algorithms.loss_aggregation import aggregate_loss
from rlsys.algorithms.policy_objectives import PolicyObjectiveInputs, policy_objective
from rlsys.algorithms.token_logprobs import TokenLogprobs
from rlsys.config import AlgorithmConfig
from rlsys.data.batches import TrainBatch
from rlsys.data.packing import Pack


@dataclass(frozen=True, kw_only=True)
class Denominators:
    """Sizes of the whole mini-batch over all ranks: losses of packs add up to the loss of the mini-batch."""

    num_tokens: int
    num_sequences: int
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class PackLoss:
    """The loss to differentiate, and detached sums over the pack's tokens for the metrics."""

    loss: Tensor
    sums: dict[str, float]
    maxima: dict[str, float]


class _Padder:
    """Between the m sampled tokens of a pack and [b, T] arrays of responses."""

    def __init__(self, pack: Pack, device: torch.device) -> None:
        self.rows = torch.from_numpy(pack.response_index).to(device)
        self.columns = torch.from_numpy(pack.response_positions).to(device)
        width = int(pack.response_positions.max()) + 1 if len(pack.response_positions) else 1
        self.shape = (len(pack.rows), width)

    def pad(self, values: Tensor) -> Tensor:
        """[m] -> [b, T], 0 elsewhere; differentiable."""
        return values.new_zeros(self.shape).index_put((self.rows, self.columns), values)


def pack_loss(result: TokenLogprobs, pack: Pack, batch: TrainBatch, algorithm: AlgorithmConfig, sizes: Denominators) -> PackLoss:
    """Objective, KL and entropy terms of one pack. Gradient flows through `result` alone."""
    device = result.logprobs.device
    padder = _Padder(pack, device)

    def of_batch(array) -> Tensor:
        return torch.from_numpy(array[pack.flat_positions]).to(device)

    mask = padder.pad(torch.ones_like(result.logprobs)).bool()
    old = result.logprobs.detach() if batch.old_logprobs is None else of_batch(batch.old_logprobs)
    objective = policy_objective(
        PolicyObjectiveInputs(
            logprobs=padder.pad(result.logprobs),
            old_logprobs=padder.pad(old),
            advantages=padder.pad(of_batch(batch.advantages)),
            response_mask=mask,
        ),
        ratio=algorithm.objective.ratio,
        weight=algorithm.objective.weight,
        **algorithm.objective.parameters,
    )
    token_losses = objective.token_losses
    sums: dict[str, float] = {}
    if batch.ref_logprobs is not None:
        ref = of_batch(batch.ref_logprobs)
        token_losses = token_losses + algorithm.kl.coefficient * padder.pad(kl_estimate(result.logprobs, ref, algorithm.kl.kind))
        sums |= {f"kl_ref_{kind}": float(kl_estimate(result.logprobs.detach(), ref, kind).sum()) for kind in ("k1", "k3")}
    if algorithm.entropy_coefficient:
        token_losses = token_losses - algorithm.entropy_coefficient * padder.pad(result.entropies)
    loss = aggregate_loss(
        token_losses,
        mask,
        algorithm.aggregation,
        num_tokens=sizes.num_tokens,
        num_sequences=sizes.num_sequences,
        max_tokens=sizes.max_tokens,
    )
    ratio = objective.metrics["ratio"]
    gap = (of_batch(batch.rollouts.rollout_logprobs) - old).abs()
    sums |= {
        "entropy": float(result.entropies.detach().sum()),
        "ratio": float(ratio.sum()),
        "ratio_square": float((ratio**2).sum()),
        "clipped": float(objective.metrics["clipped"].sum()),
        "gap": float(gap.sum()),
    }
    return PackLoss(loss=loss, sums=sums, maxima={"ratio": float(ratio.max()), "gap": float(gap.max())})
