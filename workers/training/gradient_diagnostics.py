"""`diagnostics.gradient`: the scores of the last layer's down projection, and the gradient's variance from them."""

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

Plan = Callable[
    [NDArray[np.int64]], Sequence[Pack]
]  # rows -> this rank's packs, each prompt computed for each response


def last_down_projection(model: PackedCausalLM) -> nn.Linear:
    """The linear map whose gradients are looked at.

    Raises:
        UnsupportedModelError: the model has none of that name.
    """
    layers = getattr(model.model.get_decoder(), "layers", None) or [None]
    module = getattr(getattr(layers[-1], "mlp", None), "down_proj", None)
    if not isinstance(module, nn.Linear):
        raise UnsupportedModelError(
            f"diagnostics.gradient: the last layer of {type(model.model).__name__} has no mlp.down_proj, whose gradients would be measured. Set it to "
            "false for this model."
        )
    return module


def check_diagnosable(model: PackedCausalLM) -> None:
    """Refuse a model whose gradients cannot be measured, before the first rollouts.

    Raises:
        UnsupportedModelError: no such linear map, or the model does not run packed.
    """
    last_down_projection(model)
    if not model.packing:
        raise UnsupportedModelError(
            f"diagnostics.gradient: true needs the packed forward pass, and {type(model.model).__name__} runs padded. "
            "Set it to false for this model."
        )


def pack_scores(
    model: PackedCausalLM, pack: Pack, temperature: float, device: torch.device
) -> tuple[PackResult, Tensor, Tensor]:
    """Log-probabilities of the pack's m tokens, [m, d] their gradients by the projection's output and [m, f] its input, float32.

    No hidden state may predict two tokens, so the pack must not share prompts. Gradients of parameters are not touched.
    """
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.extend((inputs[0], output))

    hook = last_down_projection(model).register_forward_hook(keep)
    with torch.enable_grad():
        result = model(PackTensors.of(pack, device, temperature))
    hook.remove()
    inward, output = seen
    (outward,) = torch.autograd.grad(result.logprobs.sum(), output)
    at = torch.from_numpy(pack.predict_positions).to(device)
    return result, outward[0, at].float(), inward.detach()[0, at].float()


@dataclass(frozen=True)
class ResponseScores:
    """What one response of m tokens says of the gradient by the projection."""

    row: int  # of the batch
    tokens: NDArray[np.int64]  # [m] where they lie in the batch's flat arrays
    positions: NDArray[np.int64]  # [m] in the response
    logprobs: Tensor  # [m] under the live policy
    squared_score_norms: Tensor  # [m]
    outward: Tensor  # [m, d]
    inward: Tensor  # [m, f]

    def moments(self, weights: Tensor) -> GroupMoments:
        """With the weights [M, m] of M baselines."""
        return response_moments(weights, self.outward, self.inward, self.squared_score_norms)


def scores_of_responses(
    model: PackedCausalLM, packs: Sequence[Pack], temperature: float, device: torch.device
) -> Iterator[ResponseScores]:
    """One after the other, so that the scores of a single pack are in memory at a time."""
    for pack in packs:
        result, outward, inward = pack_scores(model, pack, temperature, device)
        for index, row in enumerate([] if pack.is_padding else pack.rows):
            own = pack.response_index == index
            at = torch.from_numpy(own).to(device)
            arrays = (
                result.logprobs.detach(),
                result.squared_score_norms.detach(),
                outward,
                inward,
            )
            yield ResponseScores(
                int(row),
                pack.flat_positions[own],
                pack.response_positions[own],
                *(array[at] for array in arrays),
            )


def gradient_metrics(
    model: PackedCausalLM,
    batch: TrainBatch,
    rows: NDArray[np.int64],
    plan: Plan,
    device: torch.device,
) -> dict[str, Metric]:
    """`gradient/<name>` of `gradient_diagnostics` for the responses `rows` under the live policy. All ranks must be asked.

    `used` are the batch's advantages as they stand: with an importance-corrected estimator, what the update
    weights scores by.
    """
    groups = []
    ids = batch.rollouts.group_ids[rows]
    for group in np.unique(ids):
        members = rows[ids == group]
        if len(members) > 1:
            groups.append(
                _group_moments(model, batch, members, plan(members), device).spread(len(members))
            )
    return {f"gradient/{name}": mean(value) for name, value in gradient_diagnostics(groups).items()}


def _group_moments(
    model: PackedCausalLM,
    batch: TrainBatch,
    members: NDArray[np.int64],
    packs: Sequence[Pack],
    device: torch.device,
) -> GroupMoments:
    """Over all ranks. A response's scores are used as soon as they are there; its weights need the rewards of the whole group only."""
    rewards = torch.from_numpy(batch.rewards.rewards[members].astype(np.float64)).to(device)
    plain = plain_weights(rewards, torch.ones_like(rewards))  # [3, G]
    place = {int(row): i for i, row in enumerate(members)}
    projection = last_down_projection(model)
    outward, inward, none = (
        torch.zeros(0, size, device=device)
        for size in (projection.out_features, projection.in_features, len(BASELINES))
    )
    nothing = response_moments(
        none.T, outward, inward, none[:, 0]
    )  # all that a rank without a response of the group has
    parts = []
    for scores in scores_of_responses(model, packs, batch.rollouts.temperature, device):
        sampled, used = (
            torch.from_numpy(array[scores.tokens]).to(device)
            for array in (batch.rollouts.rollout_logprobs, batch.advantages)
        )
        ratio = (scores.logprobs.double() - sampled.double()).sum().exp()
        weights = (ratio * plain[:, place[scores.row], None]).float().expand(-1, len(used))
        parts.append(scores.moments(torch.cat([weights, used[None]])))
    own_sum = sum(parts, start=nothing)
    arrays = (own_sum.gradient, own_sum.squares, own_sum.same_position, own_sum.proxy)
    for array in arrays:
        dist.all_reduce(array)
    return GroupMoments(*arrays)
