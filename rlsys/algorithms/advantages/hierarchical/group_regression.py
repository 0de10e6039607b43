"""The regression within a group, for each response without itself.

Its target is the policy-gradient weight rho_{<=L} R - sum_s rho_{<=s} beta_t^(s) instead of the
residual Delta_t, which is that weight over rho_{<=t}. It is the same regression with the ratio
moved into the weights, without a division, and with features that do not depend on t.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlsys.algorithms.advantages.hierarchical.grouped_batch import TINY, GroupedBatch

# Numbers in the largest temporary array: 16 MiB in float64, of which a handful live at once.
CHUNK = 1 << 21
JITTER = 1e-12  # of a matrix's mean diagonal, on top of the ridge: two horizons may be the same


def power_of_two(mass: Tensor) -> Tensor:
    """Return [...] the mean squared score norm from [..., 2] sum and number, as a power of two.

    It is the nearest power of two, and 1 where there are no norms.

    Conventions: a ridge needs the order of magnitude of the matrix that it is added to, and may not
    get it from the response that is left out. Rounded, it is the same for nearly all responses of a
    group, so that they still share their factorisations.
    """
    total, number = mass.unbind(dim=-1)
    known = (total > 0) & (number > 0)
    mean = torch.where(known, total, 1.0) / torch.where(known, number, 1.0)
    return torch.exp2(mean.log2().round())


def ridge_units(mass: Tensor) -> Tensor:
    """Return [K, G] the unit of a ridge for each response.

    It is the mean squared score norm of the other responses of its group, as a power of two.
    """
    others = 1 - torch.eye(mass.shape[1], dtype=mass.dtype, device=mass.device)
    return power_of_two(others @ mass)


def chunks(positions: Tensor, numbers_per_position: int) -> Iterator[Tensor]:
    """Yield `positions` in runs whose temporaries stay within CHUNK numbers."""
    yield from positions.split(max(1, CHUNK // max(numbers_per_position, 1)))


def group_corrections(batch: GroupedBatch, positions: Tensor, ridge: float) -> Tensor:
    """Return [K, G, t] the corrections fitted within the group, for each response without itself.

        f_i(t) = sum_s rho_{<=s, i} beta_{t, -i}^(s)

        beta_{t, -i} = argmin  sum_{j != i} n_j(t) (rho_j (R_j - c_i) - x_j(t) . beta)^2
                               + ridge |beta|^2,      x: `Horizons.features`

    c_i is the leave-one-out baseline of i, which does not depend on R_i either. The fit is not
    repeated G times: the residual of a left-out response is e_i / (1 - h_ii), and since the target
    is linear in c_i, the residual for c_i is a linear combination of two such residuals.

    Source: docs/hierarchical_derivation.md, section 7; the leave-one-out residual: Allen 1974, The
    relationship between variable selection and data augmentation and a method for prediction,
    Technometrics 16.

    Conventions: the unit of `ridge` is one response with all ratios 1 and the squared norm of
    `ridge_units`. A response without a token at t has weight 0 there and gets 0, as does one where
    no other response of the group has a token.
    """
    units = ridge_units(batch.mass)
    corrections = torch.zeros_like(batch.ratios[:, :, positions])

    # Responses with one unit share their factorisations; a group may have several units.
    for unit in units[batch.present].unique():
        with_unit = (units == unit) & batch.present
        groups = with_unit.any(dim=1)
        fitted = _fitted(batch.groups(groups), positions, ridge * float(unit))
        selected = with_unit[groups][..., None]
        corrections[groups] = torch.where(selected, fitted, corrections[groups])
    return corrections


def _fitted(batch: GroupedBatch, positions: Tensor, ridge: float) -> Tensor:
    """Return [K, G, t] `group_corrections` with one ridge for all responses."""
    size = batch.rewards.shape[1]
    most = batch.horizons.most
    fit = _by_features if most < size else _by_products

    numbers_per_position = batch.rewards.numel() * (min(size, most) + 2)
    parts = chunks(positions, numbers_per_position)
    return torch.cat([fit(batch, part, ridge) for part in parts], dim=2)


def _targets(batch: GroupedBatch) -> Tensor:
    """Return [K, 1, G, 2] the two parts of the target, rho R and rho.

    rho (R - c) is the first less c times the second.
    """
    return torch.stack([batch.final * batch.rewards, batch.final], dim=-1)[:, None]


def _by_features(batch: GroupedBatch, positions: Tensor, ridge: float) -> Tensor:
    """Solve one p x p system per position, for fewer horizons than responses."""
    n = batch.weights[:, :, positions].transpose(1, 2)  # [K, t, G]
    x = batch.horizons.features(batch.ratios, positions)  # [K, t, G, p]
    y = _targets(batch).expand(*n.shape, 2)
    weighted = (x * n[..., None]).transpose(2, 3)
    factor = torch.linalg.cholesky(ridged(weighted @ x, ridge))
    fitted = x @ torch.cholesky_solve(weighted @ y, factor)

    # The prediction for i by the fit without i, whose residual there is e_i / (1 - h_ii).
    hat = (weighted * torch.cholesky_solve(x.transpose(2, 3), factor)).sum(dim=2)[..., None]
    fitted = (fitted - hat * y) / (1 - hat).clamp(min=JITTER)
    return _less_baseline(batch, fitted, n)


def _by_products(batch: GroupedBatch, positions: Tensor, ridge: float) -> Tensor:
    """Solve one G x G system per position, for as many horizons as responses or more.

    With K = N^1/2 X X^T N^1/2 the residuals of the weighted fit are
    (1 - hat) y = ridge (K + ridge)^-1 y, and 1 - h_ii is the ridge times the diagonal of that
    inverse. The ridge cancels in their quotient.
    """
    n = batch.weights[:, :, positions].transpose(1, 2)
    roots = n.sqrt()
    kernel = batch.horizons.kernel(batch.ratios, positions, roots)
    diagonal = kernel.diagonal(dim1=2, dim2=3)  # a view: the sum below changes the kernel
    diagonal += ridge + JITTER * diagonal.mean(dim=2, keepdim=True) + TINY
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel))

    y = _targets(batch) * roots[..., None]
    residual = (inverse @ y) / inverse.diagonal(dim1=2, dim2=3)[..., None]
    fitted = (y - residual) / roots.clamp(min=TINY)[..., None]
    return _less_baseline(batch, fitted, n)


def ridged(gram: Tensor, ridge: Tensor | float) -> Tensor:
    """Return `gram` with ridge and jitter on its diagonal."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    scale = diagonal.mean(dim=-1, keepdim=True)
    return gram + torch.diag_embed((ridge + JITTER * scale + TINY).expand_as(diagonal))


def _less_baseline(batch: GroupedBatch, parts: Tensor, n: Tensor) -> Tensor:
    """Combine the predictions of both parts of the target into [K, G, t]; 0 without a token."""
    fitted = parts[..., 0] - batch.baseline[:, None] * parts[..., 1]
    return torch.where(n > 0, fitted, 0.0).transpose(1, 2)
