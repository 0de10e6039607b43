"""Estimators of KL divergences, the place where each has the right gradient, and coefficients."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlsys.algorithms.bounded_ratio import bounded_ratio, finite_logprobs

KL_KINDS = ("k1", "k2", "k3", "k3_k2")
KL_DIRECTIONS = ("reverse", "forward")
KL_LEVELS = ("token", "sequence")
KL_IMPORTANCE_RATIOS = ("none", "token", "prefix", "product")
# Kinds that are used for their own gradient: an importance ratio weights it and has none itself.
GRADIENT_KINDS = ("k2", "k3_k2")


class KLLossTerms(NamedTuple):
    """The estimate of the KL that a loss contains."""

    kind: str
    direction: str = "reverse"
    level: str = "token"
    importance_ratio: str = "none"


def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, kind: str, *, direction: str = "reverse"
) -> Tensor:
    """Estimate a KL divergence at each token that the policy sampled.

        d = logprobs - ref_logprobs,  r = exp(-d)

               reverse: KL(policy || reference)      forward: KL(reference || policy)
        k1     d                                     -r d
        k2     d^2 / 2                               r d^2 / 2
        k3     r - 1 + d                             1 - r - r d
        k3_k2  the value of k3, the gradient of k2

    As values: k1 is unbiased with a large variance and may be negative; k2 is biased with a small
    variance; k3 is unbiased, has a small variance and is never negative. An unbiased value does not
    make an unbiased gradient: `kl_loss` and `kl_rewards` say where each kind may be used.

    Source: Schulman 2020, Approximating KL Divergence. Gradients: Tang and Munos 2025, On a Few
    Pitfalls in KL Divergence Gradient Estimation for RL (arXiv:2506.09477).

    Shapes: any, elementwise.

    Conventions: differentiable in `logprobs`. r is capped at e^20 and keeps its gradient there; a
    token to which the reference gives probability 0 counts as one of log-probability -10,000. So
    every value is finite.

    Raises:
        ValueError: unknown kind or direction, or k3_k2 of the forward direction.
    """
    _check_kind(kind, direction)
    return _of_difference(logprobs - finite_logprobs(ref_logprobs), kind, direction)


def _check_kind(kind: str, direction: str) -> None:
    if direction not in KL_DIRECTIONS:
        raise ValueError(
            f"algorithm.kl.direction: unknown {direction!r}. Choose from "
            f"{', '.join(KL_DIRECTIONS)}."
        )
    if kind not in KL_KINDS:
        raise ValueError(
            f"algorithm.kl.kind: unknown estimator {kind!r}. Choose from {', '.join(KL_KINDS)}."
        )
    if kind == "k3_k2" and direction == "forward":
        raise ValueError(
            "algorithm.kl.kind: 'k3_k2' has the gradient of the reverse k2, and the forward "
            "direction has no counterpart. Choose k1 or k3 with algorithm.kl.importance_ratio, or "
            "the reverse direction."
        )


def _of_difference(difference: Tensor, kind: str, direction: str) -> Tensor:
    """Return the estimate from d = logprobs - ref_logprobs."""
    if direction == "forward":
        return _forward(difference, kind)
    if kind == "k1":
        return difference

    k2 = difference**2 / 2
    if kind == "k2":
        return k2

    k3 = _reverse_k3(difference)
    if kind == "k3":
        return k3
    # The second term is 0; only its gradient counts.
    return k3.detach() + (k2 - k2.detach())


def _reverse_k3(difference: Tensor) -> Tensor:
    # expm1 keeps the digits of a small difference; for a large one the cap matters instead.
    near = difference.abs() < 1
    exact = torch.where(near, -difference, 0.0).expm1()
    capped = bounded_ratio(-difference) - 1
    return torch.where(near, exact, capped) + difference


def _forward(difference: Tensor, kind: str) -> Tensor:
    ratio = bounded_ratio(-difference)
    if kind == "k1":
        return -ratio * difference
    if kind == "k2":
        return ratio * difference**2 / 2
    return 1 - ratio - ratio * difference


def kl_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    terms: KLLossTerms,
) -> Tensor:
    """Compute the KL term of a loss at each token, before its coefficient.

        token level      w_t k(d_t)      w_t: 1 | rho_t | prod_{s<=t} rho_s
        sequence level   w k(D)          w:   1 | prod_s rho_s,      D = sum_s d_s

        rho = exp(logprobs - old_logprobs)

    Its gradient, with samples of `old` and the live policy pi (`docs/algorithms.md` has the size
    of each error):

        k2, k3_k2      E[w_t d_t grad log pi_t]: that of the KL of each position given its prefix,
                       at prefixes that `old` visits (w_t up to rho_t) or pi (prefix). A token gets
                       no credit for the KL of later tokens. Right for responses of one token, and
                       at sequence level, where D is that of the whole response. Without w only
                       on-policy.
        k3             Without w that of the **forward** KL of each position, on-policy. With w that
                       of E_pi[k3], the reverse KL: the gradient flows through w as well. `prefix`
                       is right over whole responses.
        k1             Without w 0 in expectation. With w as k3, with more variance.
        forward k1,    With w that of the forward KL of each position, at prefixes as above; at
        forward k3     sequence level that of the whole response. Without w that of no KL.

    Source: Tang and Munos 2025 (arXiv:2506.09477); k3 times rho_t: DeepSeek-AI 2025, DeepSeek-V3.2,
    section 3.1 (unbiased KL estimate); k3 of whole responses: Guo et al. 2025, DeepSeek-R1,
    equation 2 (arXiv:2501.12948).

    Shapes: [B, T] -> [B, T], 0 outside the mask. Gradient flows through `logprobs` alone.

    Conventions: at sequence level each token carries the response's value and the gradient through
    its own log-probability, as the ratio levels of the objective do: summed over tokens the
    gradient is that of w k(D). w is capped at e^20. For k2 and k3_k2 w has no gradient. All of this
    is about sums over the tokens of a response (`sequence_sum`, or `constant` for a fixed fraction
    of it): the other aggregations weight responses by their lengths, KL and objective alike.

    Raises:
        ValueError: unknown or contradictory terms.
    """
    check_kl_loss(terms)
    ref = finite_logprobs(ref_logprobs.detach())
    old = finite_logprobs(old_logprobs.detach())
    differences = torch.where(response_mask, logprobs - ref, 0.0)
    log_ratios = torch.where(response_mask, logprobs - old, 0.0)

    if terms.level == "sequence":
        differences = _of_response(differences)
        log_ratios = _of_response(log_ratios)
    elif terms.importance_ratio == "prefix":
        log_ratios = log_ratios.cumsum(1)

    estimate = _of_difference(differences, terms.kind, terms.direction)
    if terms.importance_ratio != "none":
        weights = bounded_ratio(log_ratios)
        if terms.kind in GRADIENT_KINDS:
            weights = weights.detach()
        estimate = estimate * weights
    return torch.where(response_mask, estimate, 0.0)


def _of_response(values: Tensor) -> Tensor:
    """Return the response's sum at each token, with gradient through the token's own value."""
    return values.sum(1, keepdim=True).detach() + values - values.detach()


def check_kl_loss(terms: KLLossTerms) -> None:
    """Refuse terms whose gradient is not that of a KL divergence.

    Raises:
        ValueError: names field, value and remedy.
    """
    kind, direction, level, ratio = terms
    _check_kind(kind, direction)
    if level not in KL_LEVELS:
        raise ValueError(
            f"algorithm.kl.level: unknown {level!r}. Choose from {', '.join(KL_LEVELS)}."
        )
    if ratio not in KL_IMPORTANCE_RATIOS:
        raise ValueError(
            f"algorithm.kl.importance_ratio: unknown {ratio!r}. Choose from "
            f"{', '.join(KL_IMPORTANCE_RATIOS)}."
        )
    _check_gradient(kind, direction, ratio)
    _check_ratio_of_level(level, ratio)


def _check_gradient(kind: str, direction: str, ratio: str) -> None:
    """Refuse kinds whose gradient in the loss is 0 or that of no divergence."""
    if direction == "forward" and kind == "k2":
        raise ValueError(
            "algorithm.kl.kind: 'k2' of the forward direction cannot be a loss: its gradient is "
            "not that of a KL. Choose k1 or k3 with algorithm.kl.importance_ratio."
        )
    if direction == "forward" and ratio == "none":
        raise ValueError(
            f"algorithm.kl.direction: 'forward' with kind {kind!r} in the loss does not have the "
            "gradient of a KL without an importance ratio. Set algorithm.kl.importance_ratio, or "
            "use direction reverse with kind k3, whose on-policy gradient is that of the forward "
            "KL."
        )
    if kind == "k1" and ratio == "none":
        raise ValueError(
            "algorithm.kl.kind: 'k1' in the loss has the mean gradient 0 (the expected score), so "
            "it only adds noise. Choose k2, k3 or k3_k2, set algorithm.kl.importance_ratio, or "
            "place k1 in the reward."
        )


def _check_ratio_of_level(level: str, ratio: str) -> None:
    if level == "sequence" and ratio in ("token", "prefix"):
        raise ValueError(
            f"algorithm.kl.importance_ratio: {ratio!r} weighs tokens, and algorithm.kl.level "
            "'sequence' has one term per response. Choose product or none."
        )
    if level == "token" and ratio == "product":
        raise ValueError(
            "algorithm.kl.importance_ratio: 'product' at algorithm.kl.level 'token' has more "
            "variance than 'prefix', which is exact already. Choose prefix."
        )


def kl_rewards(
    old_logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, coefficient: float
) -> Tensor:
    """Compute the KL penalty of each token in the reward: -beta d_t.

        d_t = old_logprobs_t - ref_logprobs_t

    The score function turns a reward into a gradient, E[sum_t grad log pi_t sum_{s>=t} d_s], which
    is that of KL(pi || ref) over whole responses, exactly. So only k1 is right here: another
    estimate c(d) has the gradient E[grad log pi c(d)] alone and lacks E[grad c(d)], which is 0 for
    k1. k2 and k3 also penalise a token for being rarer than under the reference; the score function
    makes a penalised token rarer still, and the policy moves **away** from the reference.

    Source: Tang and Munos 2025 (arXiv:2506.09477); Ouyang et al. 2022 (the per-token cost).

    Shapes: [B, T] -> [B, T] float32 or better, no gradient, 0 outside the mask.
    """
    return -coefficient * token_log_ratios(old_logprobs, ref_logprobs, response_mask)


def token_log_ratios(old_logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """Compute d_t = old_logprobs_t - ref_logprobs_t.

    Shapes: [B, T] -> [B, T] float32 or better, no gradient, finite, 0 outside the mask.
    """
    work = torch.float64 if old_logprobs.dtype == torch.float64 else torch.float32
    old = finite_logprobs(old_logprobs.detach().to(work))
    ref = finite_logprobs(ref_logprobs.detach().to(work))
    return torch.where(response_mask, old - ref, 0.0)


def check_kl_in_reward(kind: str, direction: str, placement: str) -> None:
    """Refuse estimates that, as a reward, drive the policy away from the reference.

    Raises:
        ValueError: names field, value and remedy.
    """
    _check_kind(kind, direction)
    if direction != "reverse":
        raise ValueError(
            f"algorithm.kl.direction: {direction!r} with placement {placement!r} drives the policy "
            "away from the reference: as a reward only the reverse k1 has the gradient of a KL. "
            "Set direction reverse, or placement loss."
        )
    if kind != "k1":
        raise ValueError(
            f"algorithm.kl.kind: {kind!r} with placement {placement!r} drives the policy away from "
            "the reference: as a reward only k1 has the gradient of the KL. Leave kind null, or "
            "set placement loss."
        )


def check_exact_kl(direction: str, level: str, importance_ratio: str, placement: str) -> None:
    """Refuse variants of the KL over the vocabulary that are not implemented.

    Raises:
        ValueError: names field, value and remedy.
    """
    for field, value, only in (
        ("direction", direction, "reverse"),
        ("level", level, "token"),
        ("importance_ratio", importance_ratio, "none"),
    ):
        if value != only:
            raise ValueError(
                f"algorithm.kl.{field}: {value!r} is for estimates from the sampled tokens, and "
                f"algorithm.kl.kind 'exact' sums over the vocabulary. Set {only}, or another kind."
            )
    if placement == "advantage":
        raise ValueError(
            "algorithm.kl.kind: 'exact' with placement 'advantage': the estimator has a KL of its "
            "own. Leave kind null, or set placement loss or reward."
        )


def exact_token_kl(logits: Tensor, ref_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Compute KL(policy || reference) over the vocabulary at each position, without sampling noise.

        KL_t = sum_a pi_a (log pi_a - log ref_a)

    As a loss it has the gradient of each position's KL given its prefix. As a reward it depends on
    the prefix alone, so its own token gets no gradient from it: over whole responses the gradient
    is that of KL_t in the loss and of the *later* KL_{s>t} in the reward, together.

    Source: Ouyang et al. 2022 (KL of the RLHF reward); Tang and Munos 2025 (arXiv:2506.09477).

    Shapes: [..., V], [..., V] -> [...]. Differentiable in `logits`, at least float32.

    Conventions: a token to which the policy gives probability 0 counts 0.

    Raises:
        ValueError: shapes differ.
    """
    if logits.shape != ref_logits.shape:
        raise ValueError(
            f"logits and ref_logits must have one shape, not {tuple(logits.shape)} and "
            f"{tuple(ref_logits.shape)}"
        )
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logs = (logits.to(work) / temperature).log_softmax(-1)
    ref_logs = (ref_logits.detach().to(work) / temperature).log_softmax(-1)

    probabilities = logs.exp()
    # Without the mask 0 * (-inf) would be NaN, in value and gradient.
    differences = torch.where(probabilities > 0, logs - ref_logs, 0.0)
    return (probabilities * differences).sum(-1)


def old_policy_kl(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Estimate KL(old || live) at each token that `old` sampled.

        rho - 1 - log rho,   rho = exp(logprobs - old_logprobs)

    The samples are those of `old`, so value and gradient are unbiased, over whole responses too; at
    the old policy itself both are exactly 0.

    Source: Schulman et al. 2015, TRPO (its penalty form); Schulman et al. 2017, PPO, equation 8
    (arXiv:1707.06347). The estimate: k3 of Schulman 2020.

    Shapes: any, elementwise; differentiable in `logprobs`. rho is capped at e^20 and keeps its
    gradient there.
    """
    return _reverse_k3(finite_logprobs(old_logprobs.detach()) - logprobs)


def adapted_penalty(coefficient: float, kl: float, *, target: float) -> float:
    """Compute the coefficient of KL(old || live) for the next batch.

        beta / 2 where KL < target / 1.5,    2 beta where KL > 1.5 target,    else beta

    KL is the KL per token that the updates on this batch reached.

    Source: Schulman et al. 2017, PPO, section 4 (arXiv:1707.06347).

    Conventions: a KL of NaN (a batch without tokens) changes nothing.
    """
    if kl > 1.5 * target:
        return 2 * coefficient
    if kl < target / 1.5:
        return coefficient / 2
    return coefficient


def adapted_coefficient(
    coefficient: float, kl: float, *, target: float, horizon: float, tokens: float = 1.0
) -> float:
    """Compute the KL coefficient for the next batch, so that the KL moves towards `target`.

        beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) tokens / horizon)

    Source: Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences, section 2.2
    (arXiv:1909.08593), where n counts samples and the horizon is 10,000 of them.

    Conventions: `tokens` and `horizon` count the same thing; here training steps (tokens = 1). A KL
    of NaN (a batch without tokens) changes nothing.
    """
    if math.isnan(kl):
        return coefficient

    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * tokens / horizon)
