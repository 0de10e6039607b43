"""The loss of demonstrations: the negative log-likelihood of the tokens to learn."""

from __future__ import annotations

from torch import Tensor

from rlsys.algorithms.loss_aggregation import aggregate_loss


def negative_log_likelihood(
    logprobs: Tensor, loss_mask: Tensor, *, num_tokens: float | None = None
) -> Tensor:
    """Return the mean negative log-likelihood of the learned tokens.

        - sum_it m_it log pi(y_it | x_i, y_i<t) / num_tokens

    Source: Ouyang et al. 2022, section 3.5 (supervised fine-tuning, arXiv:2203.02155); the usual
    cross-entropy of language models.

    Shapes: logprobs [B, T], loss_mask [B, T] bool -> scalar.

    Conventions: every learned token counts alike, whatever the length of its example. The
    denominator is that of the whole mini-batch over all ranks, passed in, so that losses of
    microbatches ADD UP to that of the mini-batch; None counts this tensor's own. A tensor without a
    learned token contributes 0 to the sum.

    Raises:
        ValueError: the shapes differ, or `num_tokens` is None and no token is learned.

    Example: log-probabilities [-1, -2, -3] of which the last two are learned give 5/2.
    """
    if logprobs.shape != loss_mask.shape:
        raise ValueError(
            f"log-probabilities {tuple(logprobs.shape)} and loss mask {tuple(loss_mask.shape)} "
            "must have the same shape"
        )
    if num_tokens is None and not loss_mask.any():
        raise ValueError("no token is learned, so the mean has no value: pass num_tokens")
    return aggregate_loss(-logprobs, loss_mask, "token_mean", num_tokens=num_tokens)
