"""The metrics that a rank reports of its updates."""

from __future__ import annotations

from collections.abc import Sequence

from rlsys.metrics import Metric, maximum, mean, total
from workers.training.losses import PackLoss


def loss_metrics(
    losses: Sequence[PackLoss], tokens: float, ranks: int, *, drifted: bool
) -> dict[str, Metric]:
    """Return the loss, token-weighted means and maxima of one mini-batch on one rank.

    Args:
        tokens: the number of tokens that `losses` stand for.
        drifted: the old policy has been updated since the engine sampled, so the log-prob
            difference between them is drift, not a mismatch between engine and trainer.
    """
    # The loss of a mini-batch is the sum over packs and ranks. Each rank reports its part times the
    # number of ranks, so that the mean over ranks and mini-batches is the mean loss of a
    # mini-batch. A rank without packs reports 0.
    loss = {"policy/loss": mean(ranks * sum(float(loss.loss.detach()) for loss in losses))}
    if not losses:
        return loss

    def average(name: str) -> Metric:
        return mean(sum(loss.sums[name] for loss in losses) / max(tokens, 1), tokens)

    difference = "drift" if drifted else "logprob_difference"
    metrics = loss | {
        "policy/entropy": average("entropy"),
        "policy/ratio_mean": average("ratio"),
        "policy/ratio_square": average("ratio_square"),
        "policy/clip_fraction": average("clipped"),
        f"policy/{difference}_mean": average("difference"),
        "policy/ratio_max": maximum(max(loss.maxima["ratio"] for loss in losses)),
        f"policy/{difference}_max": maximum(max(loss.maxima["difference"] for loss in losses)),
        "policy/tokens": total(tokens),
    }
    return metrics | {
        f"policy/{name}": average(name)
        for name in losses[0].sums
        if name.startswith(("kl_", "rollout_"))
    }
