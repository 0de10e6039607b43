"""docs/metrics.md: every metric that a run writes. `python -m docs.generate.metrics docs/metrics.md`.

Tests hold this table against the source and against what runs write: a metric that is not here fails them.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

INTRODUCTION = """# Metrics

Generated from `docs/generate/metrics.py` by `make docs`. `metrics.jsonl` has a line for each step and each evaluation, `kind` "train" or
"eval"; TensorBoard has the same numbers. A value that is not finite is `null`, for JSON has no NaN; a mean over nothing is absent. `notes` are the
remarks that the console shows below the step's row.

## Which responses

| word | responses |
|---|---|
| all samples | everything that was sampled for training in the step: \
also the groups that dynamic sampling dropped, and responses that are masked out of the loss. \
Not the greedy responses of `remax`, and not evaluations |
| trained | those that enter the loss: kept by dynamic sampling and not masked by `algorithm.overlong.mask_truncated`. \
Groups of equal rewards enter it with advantages of 0 |

`reward/*` and `rollout/*` are over all samples and say how good the policy is. `trained/*` are the same numbers of what was trained: with dynamic
sampling they say little of the policy, since groups that are all right or all wrong are dropped (an accuracy of 0.156 then shows as 0.281). Without
dynamic sampling and masking the two are equal. Console, summary and report show the former, and the latter where they differ.

A response is **correct** where its accuracy, the score of the first reward function clipped to 0..1, is at least 0.5 (`RewardBatch.correct`). That is so
in `reward/accuracy`, `trained/accuracy`, `eval/*`, the column `correct` of the rollout files and the report. A response that could not be scored is not
correct. The mean of a graded score is `reward/component/<function>`.

## How they add up

Over parts, mini-batches, epochs and ranks: *sum* adds; *mean* is weighted by what it is a mean of; *max* takes the largest. Facts that every rank
knows are reported by one. NaN in one part makes the whole NaN.

## All metrics
"""

FILES = """
## Rollout files

`rollouts/step_*.parquet` have a row for each of all samples of the step, also of those that were not trained:

| column | |
|---|---|
| `trained` | whether the response entered the loss |
| `metadata` | the other columns of the data as JSON, where a reward function takes a `RewardInput` |
| `correct`, `accuracy`, `reward`, `reward_<function>`, `reason`, `extracted_answer` | what the reward functions said |
| `advantages` | as the update used them; null where the response was not trained. With `algorithm.advantage.recompute` \
those that the ranks estimated, of the last epoch |
| `rollout_logprobs` | of the engine |
| `old_logprobs`, `ref_logprobs` | null where nothing reads them, and for dropped groups |
| `token_ids`, `response_mask` | the prompt's tokens and the response's; the mask is true where the policy sampled the token |
| `stop_reason` | `end`, or `length` where the response was truncated |

## status.json

How a run ended, or what it is doing: `state` (starting, running, finished, interrupted, failed), `phase`, `message`, `step` of `steps`,
and the process that writes it. A killed run cannot say so: its file still says "running", and whoever looks finds its process gone. The
report says "Died" then, once it is made again: `python -m rlsys.run.observers.html_report runs/NAME`.
"""


@dataclass(frozen=True)
class MetricDoc:
    """One row. `<words>` in the name stand for what the configuration or the data name."""

    name: str
    reduction: str  # sum, mean, max; "driver": made once, by the driver
    over: str
    meaning: str

    @property
    def pattern(self) -> re.Pattern[str]:
        parts = re.split(r"(<\w+>)", self.name)
        return re.compile(
            "".join(".+" if part.startswith("<") else re.escape(part) for part in parts)
        )


ALL, TRAINED, TOKENS = "all samples", "trained", "trained tokens"
STEP, RUN = "the step", "the run so far"

METRICS = (
    MetricDoc("reward/mean", "mean", ALL, "Reward: the weighted sum of the reward functions."),
    MetricDoc("reward/std", "mean", ALL, "Its standard deviation over responses."),
    MetricDoc("reward/accuracy", "mean", ALL, "Share of correct responses."),
    MetricDoc("reward/format_rate", "mean", ALL, "Share whose verdict is not `no_answer`."),
    MetricDoc(
        "reward/component/<function>",
        "mean",
        ALL,
        "Unweighted score of one reward function; of the responses that it could score.",
    ),
    MetricDoc("reward/reason/<reason>", "sum", ALL, "Responses with that verdict."),
    MetricDoc(
        "reward/errors",
        "sum",
        "all samples and greedy responses",
        "Reward functions that raised or returned what is no number, once for each response.",
    ),
    MetricDoc(
        "reward/timeouts",
        "sum",
        "all samples and greedy responses",
        "Reward functions that took too long, once for each response.",
    ),
    MetricDoc(
        "reward/crashes",
        "sum",
        "all samples and greedy responses",
        "Reward functions that ended their process, once for each response.",
    ),
    MetricDoc(
        "reward/failed/<function>",
        "sum",
        "all samples and greedy responses",
        "Responses on which this reward function failed, in any of these ways.",
    ),
    MetricDoc(
        "reward/dropped",
        "sum",
        "kept samples",
        "Responses without a reward (`reward.on_failure` drop): not in the statistics of their "
        "group, not trained; absent where all have one.",
    ),
    MetricDoc("rollout/responses", "sum", ALL, "Responses."),
    MetricDoc("rollout/tokens", "sum", ALL, "Sampled tokens."),
    MetricDoc(
        "rollout/greedy_tokens",
        "sum",
        "greedy responses",
        "Tokens of the greedy responses, where an estimator compares with them.",
    ),
    MetricDoc("rollout/response_length", "mean", ALL, "Sampled tokens a response."),
    MetricDoc("rollout/response_length_max", "max", ALL, "Of the longest."),
    MetricDoc(
        "rollout/truncated_fraction", "mean", ALL, "Share that ended at `generation.max_tokens`."
    ),
    MetricDoc(
        "rollout/frac_reward_zero_std",
        "mean",
        "groups of all samples",
        "Share of groups whose rewards are all equal.",
    ),
    MetricDoc("trained/responses", "sum", TRAINED, "Responses; 0: nothing was trained."),
    MetricDoc("trained/tokens", "sum", TRAINED, "Their tokens, counted once however many epochs."),
    MetricDoc("trained/reward_mean", "mean", TRAINED, "Reward."),
    MetricDoc("trained/reward_std", "mean", TRAINED, "Its standard deviation."),
    MetricDoc("trained/accuracy", "mean", TRAINED, "Share of correct responses."),
    MetricDoc("trained/response_length", "mean", TRAINED, "Tokens a response."),
    MetricDoc("trained/truncated_fraction", "mean", TRAINED, "Share that was truncated."),
    MetricDoc(
        "trained/frac_reward_zero_std",
        "mean",
        "groups of the trained",
        "Share of groups whose trained responses have equal rewards.",
    ),
    MetricDoc(
        "sampling/rounds",
        "sum",
        STEP,
        "Rounds of sampling (with `algorithm.dynamic_sampling`, as the next three).",
    ),
    MetricDoc("sampling/replaced_groups", "sum", STEP, "Dropped groups that teach nothing."),
    MetricDoc(
        "sampling/surplus_groups", "sum", STEP, "Dropped groups beyond the size of the batch."
    ),
    MetricDoc(
        "sampling/missing_groups",
        "sum",
        STEP,
        "Groups that fill the batch for want of better ones.",
    ),
    MetricDoc(
        "advantage/mean_abs",
        "mean",
        "tokens of the batch",
        "Size of the advantages, masked responses included.",
    ),
    MetricDoc("advantage/baseline", "mean", STEP, "`reinforce_baseline`: its moving average."),
    MetricDoc(
        "advantage/alpha",
        "mean",
        STEP,
        "`gpg`: B / (B - M), what the responses with a gradient are scaled up by.",
    ),
    MetricDoc(
        "advantage/variance_ratio/<baseline>",
        "mean",
        "mini-batches or the batch",
        "`hierarchical`: second moment of the gradient's proxy over that of the leave-one-out mean "
        "([hierarchical baselines](hierarchical_baselines.md), also for the next rows).",
    ),
    MetricDoc("advantage/won", "mean", "mini-batches or the batch", "1 where that is below 1."),
    MetricDoc(
        "advantage/effective_fraction/at_<percent>",
        "mean",
        "mini-batches or the batch",
        "Effective share of the responses' ratios, at a position in percent of the longest "
        "response.",
    ),
    MetricDoc(
        "advantage/condition_number",
        "mean",
        "mini-batches or the batch",
        "Of the horizons; null where two are alike.",
    ),
    MetricDoc(
        "advantage/shrinkage_group",
        "mean",
        "mini-batches or the batch",
        "Shrinkage coefficient of the group's own fit.",
    ),
    MetricDoc(
        "advantage/shrinkage_batch",
        "mean",
        "mini-batches or the batch",
        "Shrinkage coefficient of the pooled fit.",
    ),
    MetricDoc(
        "advantage/shrinkage_network",
        "mean",
        "mini-batches",
        "Shrinkage coefficient of the baseline network that was in use.",
    ),
    MetricDoc(
        "advantage/clip_fraction",
        "mean",
        "mini-batches or the batch",
        "Share of log-ratios that were clipped.",
    ),
    MetricDoc(
        "kl/coefficient", "mean", STEP, "KL coefficient that this batch was made with (adaptive)."
    ),
    MetricDoc(
        "kl/old_coefficient",
        "mean",
        STEP,
        "Coefficient of KL(old, live) in the loss of this batch, `algorithm.kl_old` (adaptive).",
    ),
    MetricDoc(
        "entropy/temperature",
        "mean",
        STEP,
        "Entropy temperature that this batch was made with (adaptive).",
    ),
    MetricDoc(
        "policy/loss",
        "mean",
        "mini-batches",
        "Loss of a mini-batch: the sum over its packs and ranks; the mean over mini-batches and "
        "epochs.",
    ),
    MetricDoc("policy/entropy", "mean", TOKENS, "Entropy in nats, at the sampling temperature."),
    MetricDoc("policy/ratio_mean", "mean", TOKENS, "Probability ratio of live to old."),
    MetricDoc("policy/ratio_max", "max", TOKENS, "The largest."),
    MetricDoc(
        "policy/effective_sample_size",
        "mean",
        TOKENS,
        "(sum rho)^2 / (n sum rho^2), over all mini-batches together.",
    ),
    MetricDoc("policy/clip_fraction", "mean", TOKENS, "Share whose gradient the clip removed."),
    MetricDoc(
        "policy/logprob_difference_mean",
        "mean",
        TOKENS,
        "|rollout - old|, engine and trainer at the same weights. With `advantage.recompute` from "
        "the tokens before the first optimizer step of the batch alone, for later `old` has moved.",
    ),
    MetricDoc("policy/logprob_difference_max", "max", TOKENS, "The largest."),
    MetricDoc(
        "policy/drift_mean",
        "mean",
        "trained tokens after an update",
        "|rollout - live| where the live policy has moved since it sampled (`advantage.recompute` "
        "with several mini-batches or epochs).",
    ),
    MetricDoc("policy/drift_max", "max", "trained tokens after an update", "The largest."),
    MetricDoc("policy/kl_ref_k1", "mean", TOKENS, "KL to the reference, estimator k1."),
    MetricDoc("policy/kl_ref_k3", "mean", TOKENS, "KL to the reference, estimator k3."),
    MetricDoc(
        "policy/rollout_correction",
        "mean",
        TOKENS,
        "Weight of `algorithm.rollout_correction`.",
    ),
    MetricDoc(
        "policy/rollout_masked_fraction", "mean", TOKENS, "Share that this correction dropped."
    ),
    MetricDoc("policy/q", "mean", "mini-batches", "Exponent of `adaptive_power`."),
    MetricDoc(
        "policy/tokens",
        "sum",
        "trained tokens of every epoch",
        "Tokens that went through updates: `trained/tokens` times the epochs.",
    ),
    MetricDoc(
        "policy/grad_norm",
        "mean",
        "mini-batches",
        "Norm of the gradient before clipping, where it is finite.",
    ),
    MetricDoc("policy/updates", "sum", "mini-batches", "Optimizer steps taken."),
    MetricDoc("policy/skipped_updates", "sum", "mini-batches", "Optimizer steps not taken."),
    MetricDoc(
        "policy/nonfinite_gradients",
        "sum",
        "mini-batches",
        "Those of them whose gradient was not finite; the others had no trained response.",
    ),
    MetricDoc("policy/learning_rate", "mean", STEP, "Learning rate."),
    MetricDoc(
        "gradient/variance_ratio/<baseline>",
        "mean",
        "mini-batches",
        "`diagnostics.gradient`: true variance of the gradient over that of the leave-one-out "
        "mean.",
    ),
    MetricDoc("gradient/proxy_ratio/<baseline>", "mean", "mini-batches", "The same of the proxy."),
    MetricDoc(
        "gradient/cross_position_fraction/<baseline>",
        "mean",
        "mini-batches",
        "Share of the second moment between different positions.",
    ),
    MetricDoc("sync/bytes", "sum", STEP, "Size of the weights that were sent."),
    MetricDoc(
        "sync/logprob_difference_mean",
        "mean",
        "tokens of the probe",
        "|engine - trainer| after the sync, over all workers.",
    ),
    MetricDoc("sync/logprob_difference_max", "max", "tokens of the probe", "The largest."),
    MetricDoc(
        "time/generate",
        "driver",
        STEP,
        "Seconds of the phase, as the next ones; together they are `time/step`.",
    ),
    MetricDoc("time/logprobs", "driver", STEP, "old and ref log-probabilities."),
    MetricDoc("time/reward", "driver", STEP, "Waiting for rewards that were not ready by then."),
    MetricDoc("time/advantages", "driver", STEP, "Joining the batch and estimating advantages."),
    MetricDoc("time/update", "driver", STEP, "Update, and writing the rollout file."),
    MetricDoc("time/sync", "driver", STEP, "Weight sync and probe."),
    MetricDoc("time/other", "driver", STEP, "The rest of the step."),
    MetricDoc("time/step", "driver", STEP, "The whole step, without evaluation and checkpoint."),
    MetricDoc(
        "time/checkpoint",
        "driver",
        "the checkpoint before the step",
        "Seconds of a checkpoint, written with the step after it.",
    ),
    MetricDoc("time/evaluate", "driver", "an evaluation", "Seconds of an evaluation."),
    MetricDoc(
        "throughput/generate",
        "driver",
        "all samples and greedy responses",
        "Sampled tokens a second of `time/generate`.",
    ),
    MetricDoc("throughput/update", "driver", STEP, "`policy/tokens` a second of `time/update`."),
    MetricDoc(
        "throughput/step",
        "driver",
        "all samples and greedy responses",
        "Sampled tokens a second of `time/step`.",
    ),
    MetricDoc("memory/driver", "max", RUN, "Peak memory of the driver in GiB, as the next ones."),
    MetricDoc("memory/generation", "max", RUN, "Of a generation worker, or its GPU."),
    MetricDoc("memory/policy", "max", RUN, "Of a policy rank, or its GPU."),
    MetricDoc("memory/reference", "max", RUN, "Of a reference rank, or its GPU."),
    MetricDoc(
        "memory/reward", "max", STEP, "Of the reward worker, with what its pool holds at the time."
    ),
    MetricDoc("memory/advantage", "max", RUN, "Of the advantage controller."),
    MetricDoc(
        "eval/accuracy",
        "driver",
        "held-out problems",
        "Share whose greedy response is correct.",
    ),
    MetricDoc("eval/response_length", "driver", "held-out problems", "Tokens of those responses."),
    MetricDoc(
        "eval/mean@<k>", "driver", "held-out problems", "Share of correct ones of k samples."
    ),
    MetricDoc(
        "eval/pass@<k>",
        "driver",
        "held-out problems",
        "Unbiased estimate that one of k samples is correct.",
    ),
    MetricDoc(
        "eval/errors",
        "driver",
        "held-out problems",
        "Responses of the evaluation that could not be scored, as `reward/errors`; absent where "
        "there are none, as the next three.",
    ),
    MetricDoc("eval/timeouts", "driver", "held-out problems", "As `reward/timeouts`."),
    MetricDoc("eval/crashes", "driver", "held-out problems", "As `reward/crashes`."),
    MetricDoc(
        "eval/failed/<function>", "driver", "held-out problems", "As `reward/failed/<function>`."
    ),
)


def documented(name: str) -> MetricDoc | None:
    """The row of a metric; None: it has none."""
    exact = (doc for doc in METRICS if doc.name == name)
    return next(exact, None) or next((d for d in METRICS if d.pattern.fullmatch(name)), None)


def reference() -> str:
    """The page."""
    rows = [f"| `{doc.name}` | {doc.over} | {doc.reduction} | {doc.meaning} |" for doc in METRICS]
    plugins = "\nWhat an estimator of a plug-in puts into its `diagnostics` is written as `advantage/<name>`, a mean over mini-batches.\n"
    return "\n".join(
        [
            INTRODUCTION + "\n| metric | over | adds up as | |",
            "|---|---|---|---|",
            *rows,
            plugins,
            FILES.strip(),
            "",
        ]
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference())
