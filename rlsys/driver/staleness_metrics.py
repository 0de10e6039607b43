"""Drift of the trained policy from the weights that sampled a batch, by the age of samples."""

from __future__ import annotations

import numpy as np
import torch

from rlsys.algorithms.bounded_ratio import finite_logprobs
from rlsys.algorithms.policy_objectives import effective_sample_size
from rlsys.data.batches import ScoredBatch
from rlsys.metrics import Metric, mean


def staleness_metrics(batch: ScoredBatch, weight_version: int) -> dict[str, Metric]:
    """Return `staleness/effective_sample_size/<age>` and `staleness/logprob_difference/<age>`.

    Of the tokens that weights of each age have sampled, with d = old - rollout:

        effective sample size   (sum exp(d))^2 / (n sum exp(d)^2),   from 1/n to 1
        difference              mean |d|

    Nothing where the old log-probabilities were not computed. At age 0 both measure the mismatch of
    engine and trainer alone.

    Args:
        weight_version: of the policy at the start of the update.
    """
    if batch.old_logprobs is None:
        return {}
    rollouts = batch.rollouts
    mask = rollouts.response_mask
    ages = weight_version - rollouts.weight_versions[mask]
    old = finite_logprobs(torch.from_numpy(batch.old_logprobs[mask]))
    differences = old - torch.from_numpy(rollouts.rollout_logprobs[mask])

    metrics: dict[str, Metric] = {}
    for age in np.unique(ages).tolist():
        own = differences[torch.from_numpy(ages == age)]
        size, difference = float(effective_sample_size(own)), float(own.abs().mean())
        metrics[f"staleness/effective_sample_size/{age}"] = mean(size, len(own))
        metrics[f"staleness/logprob_difference/{age}"] = mean(difference, len(own))
    return metrics
