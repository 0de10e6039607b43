"""Losses of reward models: rankings of responses to one prompt, and labels of single steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

RANKING_KINDS = ("pairwise", "plackett_luce")
ABSENT = -1  # the rank of a place without a response


def ranking_loss(
    rewards: Tensor,
    ranks: Tensor,
    *,
    kind: str = "pairwise",
    margin: float = 0.0,
    num_prompts: float | None = None,
) -> Tensor:
    """Return the loss of rewards against rankings of the responses to each prompt.

        pairwise        mean over prompts of the mean over their pairs (w better than l) of
                        - log sigmoid(r_w - r_l - margin)
        plackett_luce   mean over prompts of
                        - sum_i log(e^r_i / (e^r_i + sum_{j worse than i} e^r_j))

    With K = 2 and no margin both are the Bradley-Terry loss - log sigmoid(r_w - r_l).

    Source: Ouyang et al. 2022, equation 1 (InstructGPT, arXiv:2203.02155: all pairs of a prompt,
    weighted 1 / C(K, 2)); Touvron et al. 2023, section 3.2.2 (Llama 2, arXiv:2307.09288: the
    margin); Plackett 1975 and Luce 1959.

    Shapes: rewards [P, K], ranks [P, K] int -> scalar.

    Conventions: rank 0 is best, equal ranks are a tie, -1 is a place without a response. Tied
    responses are not compared with one another: they form no pair, and in `plackett_luce` neither
    is in the other's denominator. A prompt without a pair is left out of the mean. `num_prompts` is
    the number of prompts with a pair of the whole mini-batch over all ranks, so that losses of
    microbatches ADD UP; None counts this tensor's own.

    Raises:
        ValueError: unknown kind, shapes that differ, a margin with `plackett_luce`, or no pair at
            all while `num_prompts` is None.

    Example: rewards (1, 0) of ranks (0, 1) give log(1 + e^-1) = 0.3133.
    """
    _check(rewards, ranks, kind, margin)
    better = better_than(ranks)
    has_pair = better.any(dim=(1, 2))
    if num_prompts is None:
        if not has_pair.any():
            raise ValueError("ranks: no response is better than another, so there is no pair")
        num_prompts = float(has_pair.sum())

    if kind == "pairwise":
        differences = rewards[:, :, None] - rewards[:, None, :] - margin
        losses = torch.where(better, -F.logsigmoid(differences), 0.0)
        counts = better.sum(dim=(1, 2)).clamp(min=1)
        per_prompt = losses.sum(dim=(1, 2)) / counts
    else:
        competes = better | torch.eye(ranks.shape[1], dtype=torch.bool, device=ranks.device)
        values = torch.where(competes, rewards[:, None, :], -torch.inf)
        per_response = values.logsumexp(dim=2) - rewards
        per_prompt = torch.where(ranks != ABSENT, per_response, 0.0).sum(dim=1)
    return per_prompt.sum() / num_prompts


def better_than(ranks: Tensor) -> Tensor:
    """Return [P, K, K] True where response i is better than response j of the same prompt."""
    present = ranks != ABSENT
    both = present[:, :, None] & present[:, None, :]
    return both & (ranks[:, :, None] < ranks[:, None, :])


def ranking_accuracy(rewards: Tensor, ranks: Tensor) -> Tensor:
    """Return [P] the fraction of each prompt's pairs whose better response has the higher reward.

    Conventions: equal rewards count one half; NaN for a prompt without a pair. A random reward has
    one half in expectation.
    """
    better = better_than(ranks)
    differences = rewards[:, :, None] - rewards[:, None, :]
    right = (differences > 0).double() + 0.5 * (differences == 0)
    return torch.where(better, right, 0.0).sum(dim=(1, 2)) / better.sum(dim=(1, 2))


@dataclass(frozen=True, kw_only=True)
class CalibrationBins:
    """Pairs of responses by how sure the reward is of their order; all [n], one entry a bin."""

    pairs: Tensor  # number of pairs
    predicted: Tensor  # sum of the predicted probabilities
    observed: Tensor  # number of pairs in the predicted order; equal rewards count one half


def calibration_bins(rewards: Tensor, ranks: Tensor, *, num_bins: int = 5) -> CalibrationBins:
    """Return how often the order that the rewards predict is right, by its predicted probability.

        p = sigmoid(|r_i - r_j|)        for all pairs of one prompt that are not tied

    The bins divide 1/2 to 1 evenly. A calibrated reward model is right in a fraction p of the pairs
    to which it gives probability p.

    Source: the Bradley-Terry model of `ranking_loss`; reliability diagrams as in Guo et al. 2017,
    section 2 (arXiv:1706.04599).

    Shapes: rewards [P, K], ranks [P, K] as in `ranking_loss` -> [num_bins] float64.

    Conventions: each pair counts alike, so a prompt with many pairs counts more than one with few.
    The ranges contain their lower bound, and the last one both. Plackett-Luce predicts the same
    probability of a pair. A margin of the loss is not part of the prediction.

    Example: a better response with the reward 1 and a worse one with 0 give one pair with
    p = 0.731 in the third of five bins, 0.7 to 0.8, observed 1.
    """
    better = better_than(ranks)
    differences = (rewards[:, :, None] - rewards[:, None, :])[better].double()
    probabilities = torch.sigmoid(differences.abs())
    bins = ((probabilities - 0.5) * 2 * num_bins).long().clamp(max=num_bins - 1)
    right = (differences > 0).double() + 0.5 * (differences == 0)

    def per_bin(weights: Tensor) -> Tensor:
        return torch.bincount(bins, weights=weights, minlength=num_bins)

    return CalibrationBins(
        pairs=per_bin(torch.ones_like(right)),
        predicted=per_bin(probabilities),
        observed=per_bin(right),
    )


def step_loss(logits: Tensor, labels: Tensor, *, num_steps: float | None = None) -> Tensor:
    """Return the binary cross-entropy of the logits of steps against their labels.

        mean over steps of  - y log p - (1 - y) log(1 - p),    p = sigmoid(logit)

    Source: Lightman et al. 2023, Let's Verify Step by Step, section 2.6 and appendix F
    (arXiv:2305.20050): the correctness of a step is predicted after its last token.

    Shapes: logits and labels of one shape -> scalar.

    Conventions: a label is 1 (right), 0 (wrong), or negative where no step ends. There is one
    logit; two of them with a softmax (TRL's `PRMTrainer`) are the same model, with their difference
    as the logit. All steps count alike, so a long response counts more than a short one.
    `num_steps` is the number of steps of the whole mini-batch over all ranks, so that losses of
    microbatches ADD UP; None counts this tensor's own.

    Raises:
        ValueError: shapes that differ, or no step at all while `num_steps` is None.

    Example: logits (0, 2) of labels (1, 0) give (log 2 + log(1 + e^2)) / 2 = 1.4100.
    """
    is_step = _steps_of(logits, labels)
    if num_steps is None:
        if not is_step.any():
            raise ValueError("labels: no step ends anywhere, so there is nothing to learn")
        num_steps = float(is_step.sum())

    targets = labels.clamp(min=0).to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return torch.where(is_step, losses, 0.0).sum() / num_steps


def right_steps(logits: Tensor, labels: Tensor) -> Tensor:
    """Return for each step whether the more probable label is the right one, as 1 or 0.

    Conventions: as `step_loss`. A logit of 0 counts one half; 0 where no step ends.

    Example: logits (1, -1, 0) of labels (1, 1, 0) give (1, 0, 1/2).
    """
    is_step = _steps_of(logits, labels)
    signed = torch.where(labels > 0, logits, -logits)
    return torch.where(is_step, (signed > 0).double() + 0.5 * (signed == 0), 0.0)


def _steps_of(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must have one shape"
        )
    return labels >= 0


def centre_rewards(rewards: Tensor, calibration: Tensor) -> Tensor:
    """Return rewards moved so that those of a calibration set have mean 0.

        r - mean(r over the calibration set)

    Source: Ouyang et al. 2022, section 3.5 (arXiv:2203.02155): a ranking loss does not change when
    all rewards move together, so the mean is set to 0 before PPO.

    Shapes: rewards of any shape, calibration [n] -> as rewards.

    Raises:
        ValueError: an empty calibration set.
    """
    if calibration.numel() == 0:
        raise ValueError("calibration: a set of no rewards has no mean. Give at least one.")
    return rewards - calibration.mean()


def _check(rewards: Tensor, ranks: Tensor, kind: str, margin: float) -> None:
    if kind not in RANKING_KINDS:
        raise ValueError(
            f"objective.kind: unknown kind {kind!r}. Choose from {', '.join(RANKING_KINDS)}."
        )
    if rewards.shape != ranks.shape or rewards.ndim != 2:
        raise ValueError(
            f"rewards {tuple(rewards.shape)} and ranks {tuple(ranks.shape)} must both be [P, K]"
        )
    if margin and kind != "pairwise":
        raise ValueError(
            f"objective.margin: {margin:g} is for kind 'pairwise', not {kind!r}. Set it to 0."
        )
