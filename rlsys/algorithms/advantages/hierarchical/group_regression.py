"""The regressions behind hierarchical baselines: within a group without the response itself, and over groups without its own.

Written for the policy-gradient weight rho_{<=L} R - sum_s rho_{<=s} beta_t^(s) instead of the residual Delta_t, which is that weight
over rho_{<=t}: the same regression with the ratio moved into the weights, without a division, and with features that do not depend on t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.algorithms.advantages.hierarchical.horizons import Layers

CHUNK = (
    1 << 21
)  # numbers in the largest temporary array: 16 MiB in float64, of which a handful live at once
JITTER = 1e-12  # of a matrix's mean diagonal, on top of the ridge: two layers may be the same
Solve = Callable[
    [Tensor, Tensor, Tensor | None], Tensor
]  # ([..., p, p], [..., p], [..., p] where to start; None: 0) -> [..., p]


@dataclass(frozen=True)
class GroupedBatch:
    """A batch as K groups padded to G responses; absent responses have `present` False, ratio, reward and weight 0."""

    ratios: Tensor  # [K, G, T] float64 rho_{<=t}
    rewards: Tensor  # [K, G] float64
    centre: Tensor  # [K, G] what the reward is compared with before the layers are fitted: `others_mean`, for one
    present: Tensor  # [K, G] bool
    weights: Tensor  # [K, G, T] float64 weight of a response in the regression of position t; 0 where it has no token there
    layers: Layers
    steady: bool = False  # the weights are the same at every position
    mass: Tensor | None = (
        None  # [K, G, 2] sum of a response's score norms and their number, whose mean a ridge counts in; None: 1
    )

    @property
    def final(self) -> Tensor:
        """[K, G] ratio of the whole response."""
        return self.ratios[:, :, -1]

    @property
    def base(self) -> Tensor:
        """[K, G] policy-gradient weight before any layer: rho_{<=L} (R - centre)."""
        return self.final * (self.rewards - self.centre)

    def groups(self, which: Tensor) -> GroupedBatch:
        """Those groups alone."""
        return GroupedBatch(
            self.ratios[which],
            self.rewards[which],
            self.centre[which],
            self.present[which],
            self.weights[which],
            self.layers,
            self.steady,
            None if self.mass is None else self.mass[which],
        )


def others_mean(rewards: Tensor, present: Tensor) -> Tensor:
    """[K, G] mean reward of the others of the group; the own reward of a response that is alone, so that it gets exactly 0."""
    others = present.sum(dim=1, keepdim=True) - 1
    mean = (rewards.sum(dim=1, keepdim=True) - rewards) / others.clamp(min=1)
    first = rewards[:, :1]
    equal = ((rewards == first) | ~present).all(
        dim=1, keepdim=True
    )  # also of one: whatever rounding does to the mean of equal numbers
    return torch.where(equal | (others < 1), rewards, mean)


def others_variance(rewards: Tensor, present: Tensor) -> Tensor:
    """[K, G] variance of the rewards of the others of the group, divided by their number; exactly 0 where they are all equal."""
    others = (present.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    centred = torch.where(
        present, rewards - rewards.sum(dim=1, keepdim=True) / (others + 1), 0.0
    )  # first centred: no cancellation
    squares = (centred.square().sum(dim=1, keepdim=True) - centred.square()) / others
    variance = squares - (centred / others).square()
    return torch.where(variance > 1e-12 * squares, variance, 0.0)


def power_of_two(mass: Tensor) -> Tensor:
    """[...] mean of score norms from [..., 2] their sum and number, to the nearest power of two; 1 where there are none.

    Conventions: a ridge needs the order of magnitude of what it is added to, and that may not come from the response which is left out. Rounded, it is
    the same for nearly all responses of a group, so that they still share their factorisations.
    """
    total, number = mass.unbind(dim=-1)
    known = (total > 0) & (number > 0)
    mean = torch.where(known, total, 1.0) / torch.where(known, number, 1.0)
    return torch.exp2(mean.log2().round())


def ridge_units(mass: Tensor) -> Tensor:
    """[K, G] what a ridge of 1 is for each response: the mean score norm of the others of its group, as a power of two."""
    others = 1 - torch.eye(mass.shape[1], dtype=mass.dtype, device=mass.device)
    return power_of_two(others @ mass)


def chunks(positions: Tensor, numbers_per_position: int) -> Iterator[Tensor]:
    """`positions` in runs whose temporaries stay within CHUNK numbers."""
    yield from positions.split(max(1, CHUNK // max(numbers_per_position, 1)))


def group_corrections(
    batch: GroupedBatch,
    positions: Tensor,
    ridge: float,
    *,
    left_out: bool = True,
    solve: Solve | None = None,
) -> Tensor:
    """[K, G, t] what the layers fitted within the group add to the centre, for each response without itself.

        f_i(t) = sum_s rho_{<=s, i} beta_{t, -i}^(s)
        beta_{t, -i} = argmin  sum_{j != i} n_j(t) (rho_j (R_j - c_i) - x_j(t) . beta)^2 + ridge |beta|^2,   x: `Layers.features`

    with c_i the centre of i, which has not seen R_i either. Not fitted G times: the residual of a left-out response is e_i / (1 - h_ii),
    and since the target is linear in c, that of the fit centred for i is the same combination of two such residuals.

    Source: references/hierarchical_token_baselines.md, section 7; the leave-one-out residual: Allen 1974, The relationship between variable
    selection and data augmentation and a method for prediction, Technometrics 16.

    Conventions: `ridge` counts responses with all ratios 1 and, where weights are score norms, one of `ridge_units`. A response without a
    token at t has weight 0 there and gets 0, as does one whose group has no other with a token. `left_out=False` fits on i too, which is
    biased. With `solve` every left-out system is formed and solved by it, which takes p^2 numbers a token.
    """
    if batch.mass is None:
        return _fitted(batch, positions, ridge, left_out, solve)
    units = ridge_units(batch.mass)
    corrections = torch.zeros_like(batch.ratios[:, :, positions])
    for unit in units[batch.present].unique():
        its = (units == unit) & batch.present
        some = its.any(dim=1)
        fitted = _fitted(batch.groups(some), positions, ridge * float(unit), left_out, solve)
        corrections[some] = torch.where(its[some][..., None], fitted, corrections[some])
    return corrections


def _fitted(
    batch: GroupedBatch, positions: Tensor, ridge: float, left_out: bool, solve: Solve | None
) -> Tensor:
    """[K, G, t] `group_corrections` with one ridge for all, in numbers."""
    size, most = batch.rewards.shape[1], batch.layers.most
    if (
        batch.steady and solve is None and ridge >= 1e-3
    ):  # subtractions, which a ridge keeps from cancelling
        return _by_one_factorisation(batch, positions, ridge, left_out)
    fit = _by_features if most < size else _by_products
    if solve is not None:
        fit = _by_solving(solve)
    width = batch.rewards.numel() * (min(size, most) + 2 if solve is None else most * most)
    return torch.cat(
        [fit(batch, part, ridge, left_out) for part in chunks(positions, width)], dim=2
    )


def targets(batch: GroupedBatch) -> Tensor:
    """[K, 1, G, 2] the two parts of the target, rho R and rho: rho (R - c) is the first less c times the second."""
    return torch.stack([batch.final * batch.rewards, batch.final], dim=-1)[:, None]


def _by_one_factorisation(
    batch: GroupedBatch, positions: Tensor, ridge: float, left_out: bool
) -> Tensor:
    """With one G x G system for all positions between two fixed layers, where the weights are the same everywhere.

    The normal equations of those positions differ in the current layer alone, a term of rank one: (A + u u^T)^-1 = M - q q^T / (1 + u . q) with
    M = A^-1 and q = M u (Sherman and Morrison 1950).
    """
    layers = batch.layers
    before = torch.searchsorted(layers.base, positions)  # fixed layers before each position
    roots = batch.weights[:, :, 0].sqrt()
    y = targets(batch)[:, 0] * roots[..., None]  # [K, G, 2]
    runs = []
    for part in before.unique_consecutive(return_counts=True)[1].tolist():
        here, positions = positions[:part], positions[part:]
        kernel = layers.fixed_kernel(batch.ratios, here[:1], roots[:, None])[:, 0]
        diagonal = kernel.diagonal(dim1=1, dim2=2)
        shrink = ridge + JITTER * diagonal.mean(dim=1)[:, None] + TINY
        diagonal += shrink
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel))
        own, residual = (
            inverse.diagonal(dim1=1, dim2=2)[..., None],
            (inverse @ y)[:, :, None],
        )  # [K, G, 1], [K, G, 1, 2]
        if layers.current:
            now = (
                batch.ratios[:, :, here] * (roots / layers.count(here[:1]).sqrt())[..., None]
            )  # u [K, G, t]
            turned = inverse @ now  # q
            scale = 1 + (now * turned).sum(dim=1, keepdim=True)
            shared = (
                torch.einsum("kgt,kgc->ktc", now, residual[:, :, 0])[:, None] / scale[..., None]
            )  # [K, 1, t, 2]
            own = (own - turned.square() / scale).clamp(min=JITTER * own)
            residual = residual - turned[..., None] * shared
        residual = residual / own[..., None] if left_out else residual * shrink[..., None, None]
        parts = (y[:, :, None] - residual) / roots.clamp(min=TINY)[..., None, None]
        fitted = parts[..., 0] - batch.centre[..., None] * parts[..., 1]
        runs.append(torch.where(batch.present[..., None], fitted, 0.0).expand(-1, -1, part))
    return torch.cat(runs, dim=2)


def _by_features(batch: GroupedBatch, positions: Tensor, ridge: float, left_out: bool) -> Tensor:
    """With one p x p system a position, for fewer layers than responses."""
    n = batch.weights[:, :, positions].transpose(1, 2)  # [K, t, G]
    x = batch.layers.features(batch.ratios, positions)  # [K, t, G, p]
    y = targets(batch).expand(*n.shape, 2)
    weighted = (x * n[..., None]).transpose(2, 3)
    factor = torch.linalg.cholesky(ridged(weighted @ x, ridge))
    fitted = x @ torch.cholesky_solve(weighted @ y, factor)
    if left_out:
        leverage = (weighted * torch.cholesky_solve(x.transpose(2, 3), factor)).sum(dim=2)[
            ..., None
        ]  # h_ii
        fitted = (fitted - leverage * y) / (1 - leverage).clamp(min=JITTER)
    return _centred(batch, fitted, n)


def _by_products(batch: GroupedBatch, positions: Tensor, ridge: float, left_out: bool) -> Tensor:
    """With one G x G system a position, for as many layers as responses or more."""
    n = batch.weights[:, :, positions].transpose(1, 2)
    inverse, roots, shrink = inverse_kernel(batch, positions, ridge)
    y = targets(batch) * roots[..., None]
    residual = inverse @ y
    residual = (
        residual / inverse.diagonal(dim1=2, dim2=3)[..., None] if left_out else residual * shrink
    )
    return _centred(batch, (y - residual) / roots.clamp(min=TINY)[..., None], n)


def _by_solving(solve: Solve) -> Callable[[GroupedBatch, Tensor, float, bool], Tensor]:
    """With one p x p system a token, each without the response it is for."""

    def fit(batch: GroupedBatch, positions: Tensor, ridge: float, left_out: bool) -> Tensor:
        n = batch.weights[:, :, positions].transpose(1, 2)
        x = batch.layers.features(batch.ratios, positions)
        weighted = x * n[..., None]
        own = weighted[..., None] * x[..., None, :] * left_out  # [K, t, G, p, p]
        gram = (weighted.transpose(2, 3) @ x)[:, :, None] - own
        y = targets(batch)
        pair = (weighted.transpose(2, 3) @ y.expand(*n.shape, 2))[:, :, None] - weighted[
            ..., None
        ] * y[..., None, :] * left_out
        moment = pair[..., 0] - batch.centre[:, None, :, None] * pair[..., 1]
        fitted = (x * solve(ridged(gram, ridge), moment, None)).sum(dim=3)
        return torch.where(n > 0, fitted, 0.0).transpose(1, 2)

    return fit


def ridged(gram: Tensor, ridge: Tensor | float) -> Tensor:
    """`gram` with ridge and jitter on its diagonal."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    scale = diagonal.mean(dim=-1, keepdim=True)
    return gram + torch.diag_embed((ridge + JITTER * scale + TINY).expand_as(diagonal))


def inverse_kernel(
    batch: GroupedBatch, positions: Tensor, ridge: float
) -> tuple[Tensor, Tensor, Tensor]:
    """[K, t, G, G] inverse of N^1/2 X X^T N^1/2 + ridge, which is (1 - hat matrix) / ridge; [K, t, G] N^1/2; [K, t, 1, 1] that ridge."""
    roots = batch.weights[:, :, positions].transpose(1, 2).sqrt()
    kernel = batch.layers.kernel(batch.ratios, positions, roots)
    diagonal = kernel.diagonal(dim1=2, dim2=3)
    shrink = ridge + JITTER * diagonal.mean(dim=2, keepdim=True) + TINY
    diagonal += shrink
    return torch.cholesky_inverse(torch.linalg.cholesky(kernel)), roots, shrink[..., None]


TINY = 1e-100


def _centred(batch: GroupedBatch, parts: Tensor, n: Tensor) -> Tensor:
    """[K, G, t] from the predictions of both parts of the target; 0 where the response has no token."""
    fitted = parts[..., 0] - batch.centre[:, None] * parts[..., 1]
    return torch.where(n > 0, fitted, 0.0).transpose(1, 2)


def gauss_seidel(
    gram: Tensor,
    moment: Tensor,
    *,
    start: Tensor | None = None,
    sweeps: int = 5000,
    tolerance: float = 1e-10,
) -> tuple[Tensor, int]:
    """Solution of gram @ beta = moment, one increment of the layers at a time, and the sweeps it took.

        beta <- beta + d_k (d_k . moment - d_k . gram beta) / (d_k . gram d_k),   d_k: `increments`

    Source: references/hierarchical_token_baselines.md, section 8.4, route 2, whose d_k are the layers themselves.

    Shapes: gram [..., p, p], moment and start [..., p] -> [..., p].

    Conventions: `start` 0 where not given. Stops when no step of a sweep is longer than `tolerance` of the largest beta. Converges for every
    symmetric positive definite matrix, from every start, to the same solution: the d_k are a basis.
    """
    beta = torch.zeros_like(moment) if start is None else start.clone()
    along = increments(gram)
    turned = along @ gram
    curvature = (turned * along).sum(dim=-1).clamp(min=TINY)
    wanted = (along @ moment[..., None])[..., 0]
    for sweep in range(1, sweeps + 1):
        moved = 0.0
        for k in range(moment.shape[-1]):
            step = (wanted[..., k] - (turned[..., k, :] * beta).sum(dim=-1)) / curvature[..., k]
            beta += step[..., None] * along[..., k, :]
            moved = max(moved, float(step.abs().max()))
        if moved <= tolerance * float(beta.abs().max()):
            return beta, sweep
    return beta, sweeps


def increments(gram: Tensor) -> Tensor:
    """[..., p, p] a basis, one direction a row: each layer less the one before it, so that its feature is rho_{<=s} - rho_{<=r}.

    Sampled from the policy in the denominator, rho_{<=s} is a martingale: its increments do not correlate, while the ratios themselves are nearly
    the same where layers are close. In this basis the matrix is therefore near a diagonal, and sweeping over it fast.

    Conventions: layers in the order of their squares on the diagonal, which is that of their positions on average; any order gives a basis. A layer
    that has nothing to do with the one before it (one that lies before the position has feature 0) stands for itself.
    """
    order = gram.diagonal(dim1=-2, dim2=-1).argsort(dim=-1)
    layers = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)[order]
    before = layers[..., :-1, :]
    related = ((layers[..., 1:, :] @ gram) * before).sum(dim=-1, keepdim=True) != 0
    return torch.cat([layers[..., :1, :], layers[..., 1:, :] - before * related], dim=-2)


def by_cholesky(gram: Tensor, moment: Tensor, start: Tensor | None = None) -> Tensor:
    """Solution of gram @ beta = moment for symmetric positive definite matrices. A `start` is what iterations have; this needs none."""
    return torch.cholesky_solve(moment[..., None], torch.linalg.cholesky(gram))[..., 0]
