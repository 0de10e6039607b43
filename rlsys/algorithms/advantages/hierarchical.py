"""Hierarchical token-level baselines: one baseline a layer of the future importance ratio."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.algorithms.advantages.grouping import Groups, outcome_rewards
from rlsys.algorithms.advantages.hierarchical_fits import GroupedBatch, chunks, group_corrections, pooled_features
from rlsys.algorithms.advantages.hierarchical_layers import Layers, prefix_ratios, self_normalised
from rlsys.algorithms.advantages.hierarchical_strength import FEWEST_OTHERS, Folds, fold_strengths, lone_group_strengths
from rlsys.algorithms.advantages.inputs import AdvantageInputs, AdvantageOutput, register_advantage_estimator


@register_advantage_estimator("hierarchical")
def hierarchical_advantages(
    inputs: AdvantageInputs,
    *,
    layers: str = "current_and_final",
    block_size: int = 256,
    output: str = "score_weight",
    weights: str = "tempered",
    scope: str = "auto",
    log_ratio_clip: float | None = None,
    ratio_truncation: float | None = None,
    self_normalise: bool = False,
) -> AdvantageOutput:
    mask = inputs.response_mask
    ratios = prefix_ratios(
        inputs.rollout_logprobs, inputs.old_logprobs, mask, log_ratio_clip=log_ratio_clip, ratio_truncation=ratio_truncation
    )
    groups = Groups.of(inputs.group_ids)
    if self_normalise:
        ratios = self_normalised(ratios, groups)
    rewards = outcome_rewards(inputs.rewards, inputs.token_rewards, mask).double()
    places, present = padded_places(groups)
    alive = (mask[places] & present[..., None]).double()
    padded = torch.where(present[..., None], ratios[places], 0.0)
    n = alive if inputs.score_norms is None else alive * inputs.score_norms[places].double()
    batch = GroupedBatch(
        padded,
        torch.where(present, rewards[places], 0.0),
        present,
        regression_weights(weights, padded, alive, n),
        Layers.of(layers, mask.shape[1], block_size),
    )
    correction, _ = automatic_corrections(batch, n, scope, 1.0, 1.0)
    weight = (batch.base[..., None] - correction) * alive
    out = torch.zeros_like(ratios)
    out[places[present]] = weight[present]
    if output == "residual":
        out = out / ratios
    return AdvantageOutput(advantages=out.float())


hierarchical_advantages.needs_old_logprobs = True  # type: ignore[attr-defined]


def padded_places(groups: Groups) -> tuple[Tensor, Tensor]:
    size = int(groups.counts.max())
    order = torch.argsort(groups.index, stable=True)
    starts = groups.counts.cumsum(0) - groups.counts
    slots = torch.arange(size)[None]
    present = slots < groups.counts[:, None]
    return order[(starts[:, None] + slots).clamp(max=len(order) - 1)], present


def regression_weights(name: str, ratios: Tensor, alive: Tensor, n: Tensor) -> Tensor:
    if name == "tempered":
        return alive * 2 / (1 + ratios[:, :, -1:])
    if name == "ratio":
        return alive / ratios[:, :, -1:].clamp(min=1e-100)
    if name == "score":
        return n
    if name == "ratio_squared":
        return alive
    return alive / ratios.square().clamp(min=1e-200)


def automatic_corrections(batch: GroupedBatch, n: Tensor, scope: str, group_ridge: float, batch_ridge: float) -> tuple[Tensor, Tensor]:
    K, _, T = batch.ratios.shape
    positions = torch.arange(T)
    if K == 1:
        if scope == "batch" or int(batch.present.sum()) - 1 < FEWEST_OTHERS:
            return torch.zeros_like(batch.ratios), torch.zeros(1)
        s = lone_group_strengths(batch, n, group_ridge)
        return s[..., None] * group_corrections(batch, positions, group_ridge), s
    s = fold_strengths(batch, n, scope, group_ridge, batch_ridge)
    of_group, F = Folds.deal(K, positions.device)
    out = torch.zeros_like(batch.ratios)
    if (s[:, 1] > 0).any():
        out += s[of_group, 1][:, None, None] * group_corrections(batch, positions, group_ridge)
    if (s[:, 0] > 0).any():
        for part in chunks(positions, batch.rewards.numel() * (batch.layers.most + 2)):
            folds = Folds.at(batch, part)
            x = pooled_features(batch, part)
            for f in range(F):
                if s[f, 0] > 0:
                    m = of_group == f
                    out[m[:, None, None].expand_as(out) & torch.isin(positions, part)] += 0  # placeholder
                    out[m.nonzero()[:, 0][:, None, None], torch.arange(out.shape[1])[None, :, None], part[None, None]] += s[f, 0] * torch.einsum(
                        "ktgp,tp->kgt", x[m], folds.coefficients(torch.tensor([f]), batch_ridge)
                    )
    return out, s
