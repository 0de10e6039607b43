"""Direct preference optimization: a policy learns from pairs, without a reward model."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

PREFERENCE_KINDS = ("sigmoid", "ipo")


@dataclass(frozen=True, kw_only=True)
class PreferenceOutput:
    """Losses and implicit rewards of n pairs; gradient flows through the losses only."""

    losses: Tensor  # [n], unreduced
    chosen_rewards: Tensor  # [n] beta log(pi / ref) of the better response
    rejected_rewards: Tensor  # [n] of the worse one


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    kind: str = "sigmoid",
) -> PreferenceOutput:
    """Return the loss of each pair, and the implicit rewards of both responses.

        h = (log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l))

        sigmoid   - (1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)      e = label_smoothing
        ipo       (h - 1 / (2 beta))^2

    The minimum of `sigmoid` over all policies, with preferences from the Bradley-Terry model of a
    reward r, is pi proportional to ref exp(r / beta).

    Source: Rafailov et al. 2023, equation 7 (DPO, arXiv:2305.18290); Mitchell 2023 (conservative
    DPO: the label smoothing); Azar et al. 2023, equation 17 (IPO, arXiv:2310.12036).

    Shapes: four times [n] -> [n].

    Conventions: the log-probabilities are sums over the tokens of a response. For the
    length-normalised variants pass means instead, of the policy and of the reference alike; TRL
    does so for `ipo`. The implicit reward is beta times the log-ratio, also for `ipo`. The
    reference gets no gradient.

    Raises:
        ValueError: unknown kind, a beta that is not positive, label smoothing outside of [0, 0.5)
            or with `ipo`.

    Example: beta 0.5 and h = 2 give log(1 + e^-1) = 0.3133 and (2 - 1)^2 = 1.
    """
    _check(beta, label_smoothing, kind)
    chosen = chosen_logprobs - ref_chosen_logprobs.detach()
    rejected = rejected_logprobs - ref_rejected_logprobs.detach()
    difference = chosen - rejected

    if kind == "sigmoid":
        right, wrong = F.logsigmoid(beta * difference), F.logsigmoid(-beta * difference)
        losses = -(1 - label_smoothing) * right - label_smoothing * wrong
    else:
        losses = (difference - 1 / (2 * beta)) ** 2
    return PreferenceOutput(
        losses=losses,
        chosen_rewards=beta * chosen.detach(),
        rejected_rewards=beta * rejected.detach(),
    )


def _check(beta: float, label_smoothing: float, kind: str) -> None:
    if kind not in PREFERENCE_KINDS:
        raise ValueError(
            f"objective.kind: unknown kind {kind!r}. Choose from {', '.join(PREFERENCE_KINDS)}."
        )
    if beta <= 0:
        raise ValueError(f"objective.beta: {beta:g} is not positive. Set it above 0.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"objective.label_smoothing: {label_smoothing:g} is not in [0, 0.5). At 0.5 the labels "
            "say nothing, above it they are reversed."
        )
    if kind == "ipo" and label_smoothing:
        raise ValueError(
            f"objective.label_smoothing: {label_smoothing:g} is not defined for kind 'ipo'. Set it "
            "to 0, or choose sigmoid."
        )
