"""`diagnostics.gradient`: the variance of the policy gradient under several baselines.

It is measured on one matrix, the down projection of the last layer. The gradient of a token's
log-probability with respect to that matrix is an outer product of two vectors, so scores are kept
and combined without a matrix per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from rlsys.algorithms.gradient_variance import (
    BASELINES,
    GroupMoments,
    gradient_diagnostics,
    plain_weights,
    response_moments,
)
from rlsys.data.batches import TrainBatch
from rlsys.data.packing import Pack
from rlsys.metrics import Metric, mean
from rlsys.models.loading import UnsupportedModelError
from workers.training.packed_model import PackedCausalLM, PackResult, PackTensors

# From rows to this rank's packs, in which each response has its own copy of the prompt.
Plan = Callable[[NDArray[np.int64]], Sequence[Pack]]


def last_down_projection(model: PackedCausalLM) -> nn.Linear:
    """Return the linear map whose gradients are measured.

    Raises:
        UnsupportedModelError: the model has no map of that name.
    """
    layers = getattr(model.model.get_decoder(), "layers", None) or [None]
    module = getattr(getattr(layers[-1], "mlp", None), "down_proj", None)
    if not isinstance(module, nn.Linear):
        raise UnsupportedModelError(
            f"diagnostics.gradient: the last layer of {type(model.model).__name__} has no "
            "mlp.down_proj, whose gradients would be measured. Set it to false for this model."
        )
    return module


def check_diagnosable(model: PackedCausalLM) -> None:
    """Refuse a model whose gradients cannot be measured, before the first rollouts.

    Raises:
        UnsupportedModelError: it has no down projection, does not train it, or does not run packed.
    """
    if not last_down_projection(model).weight.requires_grad:
        raise UnsupportedModelError(
            "diagnostics.gradient: true measures the gradient of mlp.down_proj in the last layer, "
            "which policy.frozen leaves untrained. Set it to false, or train that layer."
        )
    if not model.packing:
        raise UnsupportedModelError(
            "diagnostics.gradient: true needs the packed forward pass, and "
            f"{type(model.model).__name__} runs padded. Set it to false for this model."
        )


def pack_scores(
    model: PackedCausalLM, pack: Pack, temperature: float, device: torch.device
) -> tuple[PackResult, Tensor, Tensor]:
    """Return the two factors of the score of each of the pack's m tokens.

        score = outward x inward,    a matrix [d, f] for each token

    Each hidden state must predict one token only, so prompts must not be shared in the pack. The
    accumulated gradients of the parameters are left alone.

    Returns:
        The model's output; `outward` [m, d], the gradient of the log-probability with respect to
        the projection's output; `inward` [m, f], the projection's input. Both are float32.
    """
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.extend((inputs[0], output))

    hook = last_down_projection(model).register_forward_hook(keep)
    with torch.enable_grad():
        result = model(PackTensors.of(pack, device, temperature))
    hook.remove()

    # No layer after the last one mixes positions, so the gradient of the sum at a position is that
    # of the one token that the position predicts.
    inward, output = seen
    (outward,) = torch.autograd.grad(result.logprobs.sum(), output)

    at = torch.from_numpy(pack.predict_positions).to(device)
    return result, outward[0, at].float(), inward.detach()[0, at].float()


@dataclass(frozen=True)
class ResponseScores:
    """The scores of one response of m tokens, as factors (see `pack_scores`)."""

    row: int  # of the batch
    tokens: NDArray[np.int64]  # [m] into the batch's flat arrays
    positions: NDArray[np.int64]  # [m] in the response
    logprobs: Tensor  # [m] under the live policy
    squared_score_norms: Tensor  # [m]
    outward: Tensor  # [m, d]
    inward: Tensor  # [m, f]

    def moments(self, weights: Tensor) -> GroupMoments:
        """Return the response's moments under M baselines, whose weights are [M, m]."""
        return response_moments(weights, self.outward, self.inward, self.squared_score_norms)


def scores_of_responses(
    model: PackedCausalLM, packs: Sequence[Pack], temperature: float, device: torch.device
) -> Iterator[ResponseScores]:
    """Yield the scores of one response after the other; collective.

    The scores of a single pack are in memory at a time.
    """
    for pack in packs:
        result, outward, inward = pack_scores(model, pack, temperature, device)
        # A padding pack is computed only because the forward pass is collective.
        if pack.is_padding:
            continue

        logprobs = result.logprobs.detach()
        norms = result.squared_score_norms.detach()
        for index, row in enumerate(pack.rows):
            own = pack.response_index == index
            at = torch.from_numpy(own).to(device)
            yield ResponseScores(
                row=int(row),
                tokens=pack.flat_positions[own],
                positions=pack.response_positions[own],
                logprobs=logprobs[at],
                squared_score_norms=norms[at],
                outward=outward[at],
                inward=inward[at],
            )


def gradient_metrics(
    model: PackedCausalLM,
    batch: TrainBatch,
    rows: NDArray[np.int64],
    plan: Plan,
    device: torch.device,
) -> dict[str, Metric]:
    """Return `gradient/<name>` of `gradient_diagnostics` under the live policy; collective.

    The baseline `used` stands for the advantages of the batch. With an importance-corrected
    estimator they include the ratio, as in the update.

    Args:
        rows: the responses that are measured.
    """
    groups = []
    ids = batch.rollouts.group_ids[rows]
    for group in np.unique(ids):
        members = rows[ids == group]
        # A single response has no variance within its group.
        if len(members) < 2:
            continue
        moments = _group_moments(model, batch, members, plan(members), device)
        groups.append(moments.spread(len(members)))

    diagnostics = gradient_diagnostics(groups)
    return {f"gradient/{name}": mean(value) for name, value in diagnostics.items()}


def _group_moments(
    model: PackedCausalLM,
    batch: TrainBatch,
    members: NDArray[np.int64],
    packs: Sequence[Pack],
    device: torch.device,
) -> GroupMoments:
    """Return the moments of one group, summed over its responses on all ranks; collective."""
    rewards = torch.from_numpy(batch.rewards.rewards[members].astype(np.float64)).to(device)
    plain = plain_weights(rewards, torch.ones_like(rewards))  # [3, G]
    # From rows of the batch to columns of `plain`.
    place = {int(row): i for i, row in enumerate(members)}

    parts = []
    for scores in scores_of_responses(model, packs, batch.rollouts.temperature, device):
        rollout = torch.from_numpy(batch.rollouts.rollout_logprobs[scores.tokens]).to(device)
        used = torch.from_numpy(batch.advantages[scores.tokens]).to(device)
        # The engine sampled the response, so its score has the weight of the sequence's ratio.
        ratio = (scores.logprobs.double() - rollout.double()).sum().exp()
        weights = (ratio * plain[:, place[scores.row], None]).float().expand(-1, len(used))
        parts.append(scores.moments(torch.cat([weights, used[None]])))

    own_sum = sum(parts, start=_no_moments(last_down_projection(model), device))
    arrays = (own_sum.gradient, own_sum.squares, own_sum.same_position, own_sum.proxy)
    for array in arrays:
        dist.all_reduce(array)
    return GroupMoments(*arrays)


def _no_moments(projection: nn.Linear, device: torch.device) -> GroupMoments:
    """Return the moments of no response, for a rank that has none of the group."""
    return response_moments(
        torch.zeros(len(BASELINES), 0, device=device),
        torch.zeros(0, projection.out_features, device=device),
        torch.zeros(0, projection.in_features, device=device),
        torch.zeros(0, device=device),
    )
