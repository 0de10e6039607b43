"""Metrics that an earlier version wrote under another name, for the reports of its runs."""

# Old name of a metric, or the beginning of its name up to a "/": the present one.
RENAMED_METRICS = {
    "rollout/equal_reward_groups": "rollout/frac_reward_zero_std",
    "rollout/truncated_share": "rollout/truncated_fraction",
    "trained/equal_reward_groups": "trained/frac_reward_zero_std",
    "trained/truncated_share": "trained/truncated_fraction",
    "policy/clipped_share": "policy/clip_fraction",
    "policy/logprob_gap_mean": "policy/logprob_difference_mean",
    "policy/logprob_gap_max": "policy/logprob_difference_max",
    "policy/rollout_masked_share": "policy/rollout_masked_fraction",
    "sync/logprob_gap_mean": "sync/logprob_difference_mean",
    "sync/logprob_gap_max": "sync/logprob_difference_max",
    "advantage/clipped_share": "advantage/clip_fraction",
    "advantage/effective_share": "advantage/effective_fraction",
    "advantage/strength_group": "advantage/shrinkage_group",
    "advantage/strength_batch": "advantage/shrinkage_batch",
    "advantage/strength_network": "advantage/shrinkage_network",
    "gradient/cross_position_share": "gradient/cross_position_fraction",
}


def current_name(metric: str) -> str:
    """Return the present name of a metric."""
    for old, new in RENAMED_METRICS.items():
        if metric == old or metric.startswith(f"{old}/"):
            return new + metric.removeprefix(old)
    return metric
