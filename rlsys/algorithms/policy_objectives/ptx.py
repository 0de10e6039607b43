"""PPO-ptx: a language-modelling loss on pretraining text, mixed into the policy's loss."""

from __future__ import annotations

from torch import Tensor

from rlsys.algorithms.supervised import negative_log_likelihood


def ptx_loss(
    logprobs: Tensor, text_mask: Tensor, *, coefficient: float, num_tokens: float | None = None
) -> Tensor:
    """Return the term that pretraining text adds to the loss of the policy.

        loss(theta) = loss_RL(theta) + ptx
        ptx = - coefficient / num_tokens * sum_it m_it log pi_theta(x_it | x_i,<t)

    Source: Ouyang et al. 2022, equation 2 (arXiv:2203.02155): the objective gains
    gamma * E_{x ~ D_pretrain}[log pi_theta(x)].

    Shapes: logprobs [B, T], text_mask [B, T] bool -> scalar.

    Conventions: the expectation is a mean over all text tokens of one optimizer step on all ranks,
    whatever the lengths of the texts. Its denominator is its own: the number of sampled tokens does
    not enter, so `coefficient` means the same for every aggregation of the policy's loss. The
    log-probabilities are at temperature 1, also where responses are sampled at another one.
    `num_tokens` None counts this tensor's own; passed in, terms of microbatches ADD UP to that of
    the optimizer step.

    Raises:
        ValueError: see `negative_log_likelihood`.

    Example: log-probabilities [-1, -2, -3] of which the last two are of text, with coefficient 0.5,
    give 0.5 * 5/2 = 1.25, and each of the two a gradient of -0.25.
    """
    return coefficient * negative_log_likelihood(logprobs, text_mask, num_tokens=num_tokens)
