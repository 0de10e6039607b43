"""docs/metrics.md, the page about every metric that a run writes.

    python -m docs.generate.metrics docs/metrics.md

Tests compare this table with the source and with the metrics of runs; a metric that is missing here
fails them.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from rlsys.run.fault_events import FAULT_KINDS

INTRODUCTION = """# Metrics

Generated from `docs/generate/metrics.py` by `make docs`. `metrics.jsonl` has a line for each step
(`kind` "train") and each evaluation ("eval"); TensorBoard has the same numbers. A value that is not
finite is `null`, since JSON has no NaN; a mean over nothing is absent. `notes` are the remarks that
the console prints below the row of a step.

## Which responses

| word | responses |
|---|---|
| all samples | all responses that were sampled for training in the step, including groups that \
dynamic sampling dropped or that were too old, and responses that are masked out of the loss; \
without the greedy responses of `remax` and without evaluations |
| trained | the responses that enter the loss: kept by dynamic sampling, and not masked by \
`algorithm.overlong.mask_truncated`. Groups with equal rewards enter it with advantages of 0 |

`reward/*` and `rollout/*` are over all samples, and measure how good the policy is. `trained/*` are
the same numbers over the trained responses. With dynamic sampling they do not measure the policy,
since groups that are all correct or all wrong are dropped: an accuracy of 0.156 may show as 0.281.
Without dynamic sampling and masking both are equal. Console, summary and report show the former,
and the latter where they differ.

A response is **correct** if its accuracy, which is the score of the first reward function clipped
to 0..1, is at least 0.5 (`RewardBatch.correct`). This holds for `reward/accuracy`,
`trained/accuracy`, `eval/*`, the column `correct` of the rollout files, and the report. A response
that could not be scored is not correct. The mean of the unclipped score is
`reward/component/<function>`. Where the first reward function is a model, no response is correct or
wrong: these metrics, and `reward/format_rate`, are absent then, and the columns are empty.

## Reduction

Metrics of several parts, mini-batches, epochs and ranks are combined by their reduction: *sum*
adds; *mean* is weighted by the number of elements; *max* takes the largest. *driver* means that the
driver computes the metric once. Facts that every rank knows are reported by one rank. NaN in one
part makes the result NaN.

## All metrics
"""

FILES = """
## Rollout files

`rollouts/step_*.parquet` have a row for each of all samples of the step, trained or not:

| column | |
|---|---|
| `trained` | true if the response entered the loss |
| `metadata` | the other columns of the data as JSON, where a reward function takes a \
`RewardInput` |
| `correct`, `accuracy`, `reward`, `reward_<function>`, `reason`, `extracted_answer` | results of \
the reward functions |
| `step_ends_<function>`, `step_rewards_<function>` | of functions that reward steps: the last \
token of each step, counted from the response's first, and its unweighted reward; null where the \
function failed |
| `values`, `returns` | values of the critic before its update, and its targets; null without a \
critic, and for dropped groups |
| `advantages` | as used in the update; null where the response was not trained. With \
`algorithm.advantage.recompute`, those of the last epoch |
| `rollout_logprobs` | log-probabilities from the engine |
| `old_logprobs`, `ref_logprobs` | log-probabilities from the trainer and the reference; null \
where nothing reads them, and for dropped groups |
| `token_ids`, `response_mask` | tokens of prompt and response; the mask is true where the policy \
sampled the token |
| `weight_version` | of the weights that sampled the response |
| `batch_id` | of the batch of the stream; in asynchronous training that of the first group |
| `stop_reason` | `end`, or `length` where the response was truncated |

## status.json

The present state of a run, or how it ended: `state` (starting, running, finished, interrupted,
failed), `phase`, `message`, `step` of `steps`, and the process that writes the file. A killed run
cannot write its end: its file still says "running", but its process is gone. A report that is made
again then says "Died": `python -m rlsys.run.observers.html_report runs/NAME`.
"""


@dataclass(frozen=True)
class MetricDoc:
    """One row. `<words>` in the name are placeholders, such as the name of a reward function."""

    name: str
    reduction: str  # sum, mean, max; "driver": computed once, by the driver
    over: str
    meaning: str

    @property
    def pattern(self) -> re.Pattern[str]:
        parts = re.split(r"(<\w+>)", self.name)
        patterns = [".+" if part.startswith("<") else re.escape(part) for part in parts]
        return re.compile("".join(patterns))


# What a metric is taken over.
ALL = "all samples"
GROUPS = "groups of the step"
ALL_AND_GREEDY = "all samples and greedy responses"
TRAINED = "trained"
TOKENS = "trained tokens"
TEXT_TOKENS = "tokens of the pretraining texts of the step"
MOVED = "trained tokens after an update"
MINI_BATCHES = "mini-batches"
CRITIC_MINI_BATCHES = "mini-batches of the critic"
SCORED_TOKENS = "tokens of kept samples with a reward"
MINI_BATCHES_OR_BATCH = "mini-batches or the batch"
PROBE = "tokens of the probe"
HELD_OUT = "held-out problems"
EXAMPLES = "held-out examples"
BATCH_EXAMPLES = "examples of the step"
STEP = "the step"
RUN = "the run so far"

METRICS = (
    MetricDoc("reward/mean", "mean", ALL, "Mean reward, the weighted sum of the reward functions."),
    MetricDoc("reward/std", "mean", ALL, "Standard deviation of the reward over responses."),
    MetricDoc("reward/accuracy", "mean", ALL, "Fraction of correct responses."),
    MetricDoc(
        "reward/format_rate",
        "mean",
        ALL,
        "Fraction of responses in which an answer was found (reason other than `no_answer`).",
    ),
    MetricDoc(
        "reward/component/<function>",
        "mean",
        ALL,
        "Mean unweighted score of one reward function, over the responses that it could score.",
    ),
    MetricDoc(
        "reward/steps/<function>",
        "mean",
        ALL,
        "Mean number of steps of a response that a function rewards, over the responses that it "
        "could score; only for functions that reward steps.",
    ),
    MetricDoc(
        "reward/step_mean/<function>",
        "mean",
        ALL,
        "Mean unweighted reward of a step. The rewards of steps are not in `reward/mean`.",
    ),
    MetricDoc("reward/reason/<reason>", "sum", ALL, "Number of responses with this reason."),
    MetricDoc(
        "reward/errors",
        "sum",
        ALL_AND_GREEDY,
        "Number of responses on which a reward function raised an error or returned an invalid "
        "score; each function counts.",
    ),
    MetricDoc(
        "reward/timeouts",
        "sum",
        ALL_AND_GREEDY,
        "Number of responses on which a reward function exceeded `reward.timeout_s`; each "
        "function counts.",
    ),
    MetricDoc(
        "reward/crashes",
        "sum",
        ALL_AND_GREEDY,
        "Number of responses on which a reward function ended its process twice; each function "
        "counts.",
    ),
    MetricDoc(
        "reward/failed/<function>",
        "sum",
        ALL_AND_GREEDY,
        "Number of responses on which this reward function failed in any of these ways.",
    ),
    MetricDoc(
        "reward/dropped",
        "sum",
        "kept samples",
        "Number of responses without a reward (`reward.on_failure` drop), which neither count "
        "in the statistics of their group nor are trained on; absent where there are none.",
    ),
    MetricDoc("rollout/responses", "sum", ALL, "Number of responses."),
    MetricDoc("rollout/tokens", "sum", ALL, "Number of sampled tokens."),
    MetricDoc(
        "rollout/greedy_tokens",
        "sum",
        "greedy responses",
        "Number of tokens of the greedy responses, for estimators that compare with them "
        "(`remax`).",
    ),
    MetricDoc("rollout/response_length", "mean", ALL, "Mean length of a response, in tokens."),
    MetricDoc(
        "rollout/response_length_max",
        "max",
        ALL,
        "Length of the longest response, in tokens.",
    ),
    MetricDoc(
        "rollout/truncated_fraction",
        "mean",
        ALL,
        "Fraction of responses that were truncated at `generation.max_tokens`.",
    ),
    MetricDoc(
        "rollout/frac_reward_zero_std",
        "mean",
        "groups of all samples",
        "Fraction of groups whose rewards are all equal.",
    ),
    MetricDoc(
        "rollout/entropy",
        "mean",
        "tokens of all samples",
        "Expert iteration: entropy of the policy in nats per token, estimated without bias as the "
        "mean of -log pi of the sampled tokens in the engine (with `top_p` 1 and `top_k` 0).",
    ),
    MetricDoc(
        "expert/kept_fraction",
        "mean",
        ALL,
        "Expert iteration: fraction of responses that are learned: correct ones, each once.",
    ),
    MetricDoc(
        "expert/solved_fraction",
        "mean",
        "problems of the step",
        "Expert iteration: fraction of problems with at least one response that is learned.",
    ),
    MetricDoc(
        "expert/duplicates",
        "sum",
        "correct responses",
        "Expert iteration: number of responses that repeat an earlier one to the same problem, "
        "token by token; with `expert.deduplicate` they are not learned.",
    ),
    MetricDoc(
        "trained/responses",
        "sum",
        TRAINED,
        "Number of responses; 0 means that nothing was trained.",
    ),
    MetricDoc(
        "trained/tokens",
        "sum",
        TRAINED,
        "Number of their tokens, counted once however many epochs there are.",
    ),
    MetricDoc("trained/reward_mean", "mean", TRAINED, "Mean reward."),
    MetricDoc("trained/reward_std", "mean", TRAINED, "Standard deviation of the reward."),
    MetricDoc("trained/accuracy", "mean", TRAINED, "Fraction of correct responses."),
    MetricDoc("trained/response_length", "mean", TRAINED, "Mean length of a response, in tokens."),
    MetricDoc("trained/truncated_fraction", "mean", TRAINED, "Fraction of truncated responses."),
    MetricDoc(
        "trained/frac_reward_zero_std",
        "mean",
        "groups of the trained",
        "Fraction of groups whose trained responses have equal rewards.",
    ),
    MetricDoc(
        "sampling/rounds",
        "sum",
        STEP,
        "Number of sampling rounds (only with `algorithm.dynamic_sampling`, as the next three). In "
        "asynchronous training: sampled groups / `trainer.prompts_per_step`.",
    ),
    MetricDoc(
        "sampling/replaced_groups",
        "sum",
        STEP,
        "Number of groups without a learning signal that were replaced by further sampling.",
    ),
    MetricDoc(
        "sampling/surplus_groups",
        "sum",
        STEP,
        "Number of good groups that were dropped because the batch was full.",
    ),
    MetricDoc(
        "sampling/missing_groups",
        "sum",
        STEP,
        "Number of groups without a learning signal that fill the batch, since there were not "
        "enough good ones.",
    ),
    MetricDoc(
        "staleness/mean",
        "mean",
        GROUPS,
        "Asynchronous training: weight versions by which the policy at the start of the update is "
        "ahead of the weights that sampled a group.",
    ),
    MetricDoc("staleness/max", "max", GROUPS, "The same of the oldest group."),
    MetricDoc(
        "staleness/dropped_groups",
        "sum",
        STEP,
        "Groups that were older than `trainer.max_staleness` and not trained, since the step "
        "before: dropped, or sampled again. They belong to all samples of the step.",
    ),
    MetricDoc(
        "staleness/effective_sample_size/<age>",
        "mean",
        "tokens of the batch that are <age> versions old",
        "Asynchronous training: effective sample size of the ratios old / rollout, as a fraction "
        "of the tokens. Absent where nothing reads the old log-probabilities, as the next one.",
    ),
    MetricDoc(
        "staleness/logprob_difference/<age>",
        "mean",
        "tokens of the batch that are <age> versions old",
        "Mean absolute difference of the old and the rollout log-probabilities.",
    ),
    MetricDoc(
        "queue/ready_groups",
        "sum",
        STEP,
        "Asynchronous training: groups with rewards that wait for a further step, when the groups "
        "of this one were taken.",
    ),
    MetricDoc(
        "queue/running_groups", "sum", STEP, "Groups that were being sampled or scored then."
    ),
    MetricDoc(
        "idle/trainer",
        "driver",
        STEP,
        "Asynchronous training: seconds for which the trainer waited for groups; `time/generate`.",
    ),
    MetricDoc(
        "idle/generation",
        "driver",
        STEP,
        "Asynchronous training: seconds for which a generation worker had nothing to sample, since "
        "the step before; mean over the workers.",
    ),
    MetricDoc(
        "advantage/mean_abs",
        "mean",
        "tokens of the batch",
        "Mean absolute advantage, masked responses included.",
    ),
    MetricDoc(
        "advantage/baseline",
        "mean",
        STEP,
        "`reinforce_baseline`: its moving average. `rae`: the mean over the responses of the "
        "average of their problem.",
    ),
    MetricDoc(
        "advantage/seen_before",
        "mean",
        STEP,
        "`rae`: the fraction of responses whose problem was in an earlier batch.",
    ),
    MetricDoc(
        "advantage/alpha",
        "mean",
        STEP,
        "`gpg`: B / (B - M), the factor that scales up the responses with a gradient. `bnpo`: "
        "alpha of its Beta distribution.",
    ),
    MetricDoc("advantage/beta", "mean", STEP, "`bnpo`: beta of its Beta distribution."),
    MetricDoc(
        "advantage/variance_ratio/<baseline>",
        "mean",
        MINI_BATCHES_OR_BATCH,
        "`hierarchical`: second moment of the gradient (by a proxy) with this baseline, divided "
        "by that with the leave-one-out baseline ([hierarchical "
        "baselines](hierarchical_baselines.md), also for the next rows).",
    ),
    MetricDoc(
        "advantage/won",
        "mean",
        MINI_BATCHES_OR_BATCH,
        "1 where that ratio is below 1 for the baseline in use.",
    ),
    MetricDoc(
        "advantage/effective_fraction/at_<percent>",
        "mean",
        MINI_BATCHES_OR_BATCH,
        "Effective sample size of the importance ratios, as a fraction of the responses, at a "
        "position in percent of the longest response.",
    ),
    MetricDoc(
        "advantage/condition_number",
        "mean",
        MINI_BATCHES_OR_BATCH,
        "Condition number of the regression on the horizons, median over positions; null where "
        "two horizons coincide.",
    ),
    MetricDoc(
        "advantage/shrinkage_group",
        "mean",
        MINI_BATCHES_OR_BATCH,
        "Shrinkage coefficient of the within-group fit.",
    ),
    MetricDoc(
        "advantage/shrinkage_batch",
        "mean",
        MINI_BATCHES_OR_BATCH,
        "Shrinkage coefficient of the pooled fit.",
    ),
    MetricDoc(
        "advantage/shrinkage_network",
        "mean",
        MINI_BATCHES,
        "Shrinkage coefficient of the baseline network.",
    ),
    MetricDoc(
        "advantage/clip_fraction",
        "mean",
        MINI_BATCHES_OR_BATCH,
        "Fraction of log-ratios that were clipped.",
    ),
    MetricDoc(
        "kl/coefficient",
        "mean",
        STEP,
        "KL coefficient used for this batch, where it is adaptive.",
    ),
    MetricDoc(
        "kl/old_coefficient",
        "mean",
        STEP,
        "Coefficient of KL(old || live) in the loss of this batch (`algorithm.kl_old`).",
    ),
    MetricDoc(
        "entropy/temperature",
        "mean",
        STEP,
        "Entropy temperature used for this batch, where it is adaptive.",
    ),
    MetricDoc(
        "policy/loss",
        "mean",
        MINI_BATCHES,
        "Loss of a mini-batch (summed over its packs and ranks), averaged over mini-batches and "
        "epochs.",
    ),
    MetricDoc(
        "policy/ptx_loss",
        "mean",
        TEXT_TOKENS,
        "Negative log-likelihood per token of the pretraining texts, without `ptx.coefficient`. "
        "`policy/loss` does not contain it, `policy/grad_norm` does.",
    ),
    MetricDoc(
        "policy/ptx_tokens",
        "sum",
        TEXT_TOKENS,
        "Number of learned tokens of the pretraining texts.",
    ),
    MetricDoc(
        "policy/entropy",
        "mean",
        TOKENS,
        "Mean entropy of the policy in nats, at the sampling temperature.",
    ),
    MetricDoc("policy/ratio_mean", "mean", TOKENS, "Mean probability ratio live / old."),
    MetricDoc("policy/ratio_max", "max", TOKENS, "Largest probability ratio live / old."),
    MetricDoc(
        "policy/effective_sample_size",
        "mean",
        TOKENS,
        "(sum rho)^2 / (n sum rho^2) of the ratios rho = live / old, over all mini-batches "
        "together.",
    ),
    MetricDoc(
        "policy/clip_fraction",
        "mean",
        TOKENS,
        "Fraction of tokens whose gradient the clip removed.",
    ),
    MetricDoc(
        "policy/logprob_difference_mean",
        "mean",
        TOKENS,
        "Mean absolute log-prob difference of engine and trainer at the same weights, |rollout "
        "- old|. With `advantage.recompute`, only from the tokens before the first optimizer "
        "step of the batch.",
    ),
    MetricDoc("policy/logprob_difference_max", "max", TOKENS, "Largest such difference."),
    MetricDoc(
        "policy/drift_mean",
        "mean",
        MOVED,
        "Mean absolute log-prob difference |rollout - live| after the policy has moved since "
        "sampling (`advantage.recompute` with several mini-batches or epochs).",
    ),
    MetricDoc("policy/drift_max", "max", MOVED, "Largest such difference."),
    MetricDoc("policy/kl_ref_k1", "mean", TOKENS, "KL to the reference, estimator k1."),
    MetricDoc("policy/kl_ref_k3", "mean", TOKENS, "KL to the reference, estimator k3."),
    MetricDoc(
        "policy/kl_ref_exact",
        "mean",
        TOKENS,
        "KL to the reference over the vocabulary (with `algorithm.kl.kind: exact`).",
    ),
    MetricDoc(
        "policy/rollout_correction",
        "mean",
        TOKENS,
        "Mean importance weight of `algorithm.rollout_correction`.",
    ),
    MetricDoc(
        "policy/rollout_masked_fraction",
        "mean",
        TOKENS,
        "Fraction of tokens that `algorithm.rollout_correction` masked.",
    ),
    MetricDoc("policy/q", "mean", MINI_BATCHES, "Exponent q of `adaptive_power`."),
    MetricDoc(
        "policy/skipped_fraction",
        "mean",
        "trained responses",
        "Fraction without a backward pass, since all their advantages are 0 and no KL or entropy "
        "term brings a gradient. "
        "The metrics of the policy are those of every fourth of their groups.",
    ),
    MetricDoc(
        "policy/tokens",
        "sum",
        "trained tokens of every epoch",
        "Number of tokens in updates: `trained/tokens` times the epochs.",
    ),
    MetricDoc(
        "policy/grad_norm",
        "mean",
        MINI_BATCHES,
        "Norm of the gradient before clipping, where it is finite.",
    ),
    MetricDoc("policy/updates", "sum", MINI_BATCHES, "Number of optimizer steps."),
    MetricDoc(
        "policy/skipped_updates",
        "sum",
        MINI_BATCHES,
        "Number of optimizer steps that were skipped.",
    ),
    MetricDoc(
        "policy/nonfinite_gradients",
        "sum",
        MINI_BATCHES,
        "Number of skipped optimizer steps with a gradient that was not finite; the other "
        "skipped ones had no trained response.",
    ),
    MetricDoc(
        "policy/learning_rate",
        "mean",
        STEP,
        "Learning rate; with expert iteration that of the last update of the step. In "
        "`critic.warmup_steps` a step has no `policy/*` but the memory.",
    ),
    MetricDoc(
        "critic/loss",
        "mean",
        CRITIC_MINI_BATCHES,
        "Value loss of a mini-batch (its token mean, over its packs and ranks), averaged over "
        "mini-batches and epochs. This and the next rows only with `critic.enabled`.",
    ),
    MetricDoc(
        "critic/explained_variance",
        "mean",
        SCORED_TOKENS,
        "1 - Var(returns - values) / Var(returns) of the values before their update: 1 is perfect, "
        "0 no better than a constant. Absent where all returns are equal.",
    ),
    MetricDoc("critic/value_mean", "mean", SCORED_TOKENS, "Mean value, before the update."),
    MetricDoc("critic/return_mean", "mean", SCORED_TOKENS, "Mean return, the critic's target."),
    MetricDoc(
        "critic/clip_fraction",
        "mean",
        "scored tokens of every epoch",
        "Fraction of tokens whose gradient `critic.value_clip` removed.",
    ),
    MetricDoc(
        "critic/grad_norm",
        "mean",
        CRITIC_MINI_BATCHES,
        "Norm of the critic's gradient before clipping, where it is finite.",
    ),
    MetricDoc("critic/updates", "sum", CRITIC_MINI_BATCHES, "Number of its optimizer steps."),
    MetricDoc(
        "critic/skipped_updates",
        "sum",
        CRITIC_MINI_BATCHES,
        "Number of its optimizer steps that were skipped.",
    ),
    MetricDoc(
        "critic/nonfinite_gradients",
        "sum",
        CRITIC_MINI_BATCHES,
        "Number of skipped ones with a gradient that was not finite; the others had no response "
        "with a reward.",
    ),
    MetricDoc("critic/learning_rate", "mean", STEP, "Learning rate of the critic."),
    MetricDoc(
        "gradient/variance_ratio/<baseline>",
        "mean",
        MINI_BATCHES,
        "`diagnostics.gradient`: true variance of the gradient with this baseline, divided by "
        "that with the leave-one-out baseline.",
    ),
    MetricDoc(
        "gradient/proxy_ratio/<baseline>",
        "mean",
        MINI_BATCHES,
        "The same ratio by the proxy.",
    ),
    MetricDoc(
        "gradient/cross_position_fraction/<baseline>",
        "mean",
        MINI_BATCHES,
        "Fraction of the gradient's second moment that comes from pairs of different positions, "
        "which the proxy neglects.",
    ),
    MetricDoc("sync/bytes", "sum", STEP, "Size of the synced weights, in bytes."),
    MetricDoc(
        "sync/logprob_difference_mean",
        "mean",
        PROBE,
        "Mean absolute log-prob difference of engine and trainer after the weight sync, over "
        "all workers.",
    ),
    MetricDoc("sync/logprob_difference_max", "max", PROBE, "Largest such difference."),
    MetricDoc(
        "time/generate",
        "driver",
        STEP,
        "Seconds of sampling. This phase and the next seven add up to `time/step`.",
    ),
    MetricDoc(
        "time/logprobs",
        "driver",
        STEP,
        "Seconds of computing old and reference log-probabilities, and values.",
    ),
    MetricDoc(
        "time/reward",
        "driver",
        STEP,
        "Seconds of waiting for rewards that were not ready by then.",
    ),
    MetricDoc(
        "time/advantages",
        "driver",
        STEP,
        "Seconds of joining the batch and estimating advantages.",
    ),
    MetricDoc("time/critic", "driver", STEP, "Seconds of updating the critic; absent without one."),
    MetricDoc(
        "time/update",
        "driver",
        STEP,
        "Seconds of the update, and of writing the rollout file.",
    ),
    MetricDoc("time/sync", "driver", STEP, "Seconds of the weight sync and its check."),
    MetricDoc(
        "time/sync_export",
        "sum",
        STEP,
        "Part of `time/sync`: seconds until all weights are gathered and stored.",
    ),
    MetricDoc(
        "time/sync_load",
        "sum",
        STEP,
        "Part of `time/sync`: seconds until all engines have loaded them.",
    ),
    MetricDoc(
        "time/sync_probe",
        "sum",
        STEP,
        "Part of `time/sync`: seconds by which the check prolongs it. The trainer computes its "
        "side while the engines load. Absent where the sync is not checked "
        "(`generation.probe_every`).",
    ),
    MetricDoc("time/other", "driver", STEP, "Seconds of the rest of the step."),
    MetricDoc(
        "time/step",
        "driver",
        STEP,
        "Seconds of the whole step, without evaluation and checkpoint.",
    ),
    MetricDoc(
        "time/checkpoint",
        "driver",
        "the checkpoint before the step",
        "Seconds of saving a checkpoint, reported with the next step.",
    ),
    MetricDoc(
        "time/checkpoint_copy",
        "driver",
        "the checkpoint before the step",
        "With `trainer.checkpoints.asynchronous`, in place of `time/checkpoint`: seconds for which "
        "training stood still to copy its state into host memory. Reported with the next step.",
    ),
    MetricDoc(
        "time/checkpoint_wait",
        "driver",
        "the checkpoint before the step",
        "Seconds for which training stood still before `time/checkpoint_copy` or "
        "`time/checkpoint`, since the files of the checkpoint before were still being written. "
        "Absent where they were complete.",
    ),
    MetricDoc(
        "time/checkpoint_write",
        "driver",
        "a checkpoint",
        "Seconds from the copy into host memory until the checkpoint was complete, beside "
        "training. Reported with the first step after it, only with "
        "`trainer.checkpoints.asynchronous`.",
    ),
    MetricDoc("time/evaluate", "driver", "an evaluation", "Seconds of an evaluation."),
    MetricDoc(
        "throughput/generate",
        "driver",
        ALL_AND_GREEDY,
        "Sampled tokens per second of `time/generate`. Absent in asynchronous training, where "
        "`time/generate` is the wait for groups.",
    ),
    MetricDoc("throughput/update", "driver", STEP, "`policy/tokens` per second of `time/update`."),
    MetricDoc(
        "throughput/step",
        "driver",
        ALL_AND_GREEDY,
        "Sampled tokens per second of `time/step`.",
    ),
    MetricDoc("memory/driver", "max", RUN, "Peak memory of the driver, in GiB."),
    MetricDoc(
        "memory/generation",
        "max",
        RUN,
        "Peak memory of a generation worker, or of its GPU, in GiB.",
    ),
    MetricDoc("memory/policy", "max", RUN, "Peak memory of a policy rank, or of its GPU, in GiB."),
    MetricDoc(
        "memory/reference",
        "max",
        RUN,
        "Peak memory of a reference rank, or of its GPU, in GiB.",
    ),
    MetricDoc("memory/critic", "max", RUN, "Peak memory of a critic rank, or of its GPU, in GiB."),
    MetricDoc(
        "memory/reward",
        "max",
        STEP,
        "Peak memory of the reward worker plus the present memory of its processes, in GiB.",
    ),
    MetricDoc("memory/advantage", "max", RUN, "Peak memory of the advantage controller, in GiB."),
    MetricDoc(
        "memory/filter",
        "max",
        RUN,
        "Expert iteration: peak memory of the worker that chooses responses, in GiB.",
    ),
    *(
        MetricDoc(
            f"faults/{kind}",
            "driver",
            RUN,
            f"Number of {meaning}; it continues in a resumed run. See docs/fault_tolerance.md.",
        )
        for kind, meaning in FAULT_KINDS.items()
    ),
    MetricDoc(
        "eval/loss",
        "mean",
        EXAMPLES,
        "Runs on examples: loss of the held-out examples.",
    ),
    MetricDoc(
        "eval/text_loss",
        "mean",
        "tokens of held-out text",
        "Negative log-likelihood per token of held-out text (`ptx.eval`).",
    ),
    MetricDoc(
        "eval/tokens",
        "sum",
        EXAMPLES,
        "Runs on examples: number of learned tokens of the held-out examples.",
    ),
    MetricDoc(
        "eval/entropy",
        "mean",
        EXAMPLES,
        "Runs on examples: entropy at the learned tokens, in nats.",
    ),
    MetricDoc(
        "eval/preference_accuracy",
        "mean",
        EXAMPLES,
        "DPO: fraction of pairs whose better response has the higher implicit reward; equal "
        "rewards count one half.",
    ),
    MetricDoc(
        "policy/preference_accuracy",
        "mean",
        BATCH_EXAMPLES,
        "DPO: fraction of pairs whose better response has the higher implicit reward; equal "
        "rewards count one half.",
    ),
    MetricDoc(
        "eval/preference_margin",
        "mean",
        EXAMPLES,
        "DPO: difference of the implicit rewards of a pair.",
    ),
    MetricDoc(
        "policy/preference_margin",
        "mean",
        BATCH_EXAMPLES,
        "DPO: difference of the implicit rewards of a pair.",
    ),
    MetricDoc(
        "eval/preference_chosen_reward",
        "mean",
        EXAMPLES,
        "DPO: implicit reward of the better response.",
    ),
    MetricDoc(
        "policy/preference_chosen_reward",
        "mean",
        BATCH_EXAMPLES,
        "DPO: implicit reward of the better response.",
    ),
    MetricDoc(
        "eval/preference_rejected_reward",
        "mean",
        EXAMPLES,
        "DPO: implicit reward of the worse response.",
    ),
    MetricDoc(
        "policy/preference_rejected_reward",
        "mean",
        BATCH_EXAMPLES,
        "DPO: implicit reward of the worse response.",
    ),
    MetricDoc(
        "eval/preference_chosen_logprob",
        "mean",
        EXAMPLES,
        "DPO: log-probability of the better response, summed over its tokens, or their mean with "
        "`objective.length_normalized`.",
    ),
    MetricDoc(
        "policy/preference_chosen_logprob",
        "mean",
        BATCH_EXAMPLES,
        "DPO: log-probability of the better response, summed over its tokens, or their mean with "
        "`objective.length_normalized`.",
    ),
    MetricDoc(
        "eval/ranking_accuracy",
        "mean",
        EXAMPLES,
        "Reward models: fraction of the pairs of a prompt whose better response has the higher "
        "reward; equal rewards count one half.",
    ),
    MetricDoc(
        "eval/calibration/predicted_at_<p>",
        "mean",
        "held-out pairs of a bin",
        "Reward models: probability `sigmoid(|r_i - r_j|)` of the order that the rewards predict, "
        "in five bins from 50 to 100 %; `<p>` is the middle of the bin.",
    ),
    MetricDoc(
        "eval/calibration/observed_at_<p>",
        "mean",
        "held-out pairs of a bin",
        "Reward models: fraction of the pairs in the bin whose predicted order is right.",
    ),
    MetricDoc(
        "eval/calibration_error",
        "driver",
        "held-out pairs",
        "Reward models: mean over pairs of the difference of the predicted and the observed "
        "fraction of their bin (expected calibration error).",
    ),
    MetricDoc(
        "reward_model/ranking_accuracy",
        "mean",
        BATCH_EXAMPLES,
        "Reward models: fraction of the pairs of a prompt whose better response has the higher "
        "reward; equal rewards count one half.",
    ),
    MetricDoc(
        "eval/step_accuracy",
        "mean",
        EXAMPLES,
        "Process reward models: fraction of the steps whose label is the more probable one.",
    ),
    MetricDoc(
        "eval/step_accuracy_right",
        "mean",
        EXAMPLES,
        "Process reward models: the same over the steps that are right.",
    ),
    MetricDoc(
        "eval/step_accuracy_wrong",
        "mean",
        EXAMPLES,
        "Process reward models: the same over the steps that are wrong.",
    ),
    MetricDoc(
        "eval/right_step_fraction",
        "mean",
        EXAMPLES,
        "Process reward models: fraction of the steps that are right.",
    ),
    MetricDoc(
        "reward_model/step_accuracy",
        "mean",
        BATCH_EXAMPLES,
        "Process reward models: fraction of the steps whose label is the more probable one.",
    ),
    MetricDoc(
        "reward_model/step_accuracy_right",
        "mean",
        BATCH_EXAMPLES,
        "Process reward models: the same over the steps that are right.",
    ),
    MetricDoc(
        "reward_model/step_accuracy_wrong",
        "mean",
        BATCH_EXAMPLES,
        "Process reward models: the same over the steps that are wrong.",
    ),
    MetricDoc(
        "reward_model/right_step_fraction",
        "mean",
        BATCH_EXAMPLES,
        "Process reward models: fraction of the steps that are right.",
    ),
    MetricDoc(
        "eval/reward_mean",
        "mean",
        EXAMPLES,
        "Reward models: mean reward of the responses.",
    ),
    MetricDoc(
        "reward_model/reward_mean",
        "mean",
        BATCH_EXAMPLES,
        "Reward models: mean reward of the responses.",
    ),
    MetricDoc(
        "eval/reward_std",
        "mean",
        EXAMPLES,
        "Reward models: standard deviation of the reward over responses.",
    ),
    MetricDoc(
        "reward_model/reward_std",
        "mean",
        BATCH_EXAMPLES,
        "Reward models: standard deviation of the reward over responses.",
    ),
    MetricDoc(
        "reward_model/loss",
        "mean",
        BATCH_EXAMPLES,
        "Reward models: loss of the step.",
    ),
    MetricDoc(
        "reward_model/grad_norm",
        "mean",
        MINI_BATCHES,
        "Reward models: norm of the gradient before clipping; absent if it was not finite.",
    ),
    MetricDoc(
        "reward_model/learning_rate",
        "mean",
        STEP,
        "Reward models: learning rate of the step.",
    ),
    MetricDoc(
        "reward_model/updates",
        "sum",
        MINI_BATCHES,
        "Reward models: optimizer steps.",
    ),
    MetricDoc(
        "reward_model/skipped_updates",
        "sum",
        MINI_BATCHES,
        "Reward models: optimizer steps that were skipped.",
    ),
    MetricDoc(
        "reward_model/nonfinite_gradients",
        "sum",
        MINI_BATCHES,
        "Reward models: optimizer steps that were skipped because the gradient was not finite.",
    ),
    MetricDoc(
        "batch/examples",
        "driver",
        STEP,
        "Runs on examples: number of examples, each prompt with all its responses.",
    ),
    MetricDoc(
        "batch/tokens",
        "driver",
        STEP,
        "Runs on examples: number of tokens of prompts and responses.",
    ),
    MetricDoc(
        "memory/reward_model",
        "max",
        RUN,
        "Peak memory of a rank of the reward model, in GiB.",
    ),
    MetricDoc(
        "eval/accuracy",
        "driver",
        HELD_OUT,
        "Fraction of problems whose greedy response is correct.",
    ),
    MetricDoc(
        "eval/reward",
        "driver",
        HELD_OUT,
        "Mean reward of the greedy responses; where one of `reward.functions` is a model.",
    ),
    MetricDoc(
        "eval/component/<function>",
        "driver",
        HELD_OUT,
        "Mean unweighted reward of one function over the greedy responses; as `eval/reward`.",
    ),
    MetricDoc(
        "eval/step_mean/<function>",
        "driver",
        HELD_OUT,
        "Mean unweighted reward of a step over the greedy responses; as `eval/reward`. The rewards "
        "of steps are not in `eval/reward`.",
    ),
    MetricDoc(
        "eval/response_length",
        "driver",
        HELD_OUT,
        "Mean length of the greedy responses, in tokens.",
    ),
    MetricDoc(
        "eval/mean@<k>",
        "driver",
        HELD_OUT,
        "Fraction of correct responses among k samples per problem.",
    ),
    MetricDoc(
        "eval/pass@<k>",
        "driver",
        HELD_OUT,
        "Unbiased estimate of the probability that at least one of k samples is correct.",
    ),
    MetricDoc(
        "eval/errors",
        "driver",
        HELD_OUT,
        "As `reward/errors`, for the responses of the evaluation. Absent where there are none, "
        "as the next three.",
    ),
    MetricDoc("eval/timeouts", "driver", HELD_OUT, "As `reward/timeouts`."),
    MetricDoc("eval/crashes", "driver", HELD_OUT, "As `reward/crashes`."),
    MetricDoc("eval/failed/<function>", "driver", HELD_OUT, "As `reward/failed/<function>`."),
)


def documented(name: str) -> MetricDoc | None:
    """Return the row of a metric, or None where it has none."""
    for doc in METRICS:
        if doc.name == name:
            return doc
    for doc in METRICS:
        if doc.pattern.fullmatch(name):
            return doc
    return None


def reference() -> str:
    """Return the page."""
    lines = [INTRODUCTION]
    lines += ["| metric | over | reduction | meaning |", "|---|---|---|---|"]
    for doc in METRICS:
        lines.append(f"| `{doc.name}` | {doc.over} | {doc.reduction} | {_cell(doc.meaning)} |")
    lines += [
        "",
        "The `diagnostics` of an estimator in a plug-in are written as `advantage/<name>`, means",
        "over mini-batches.",
        "",
        FILES.strip(),
        "",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Return text for a cell of a Markdown table, in which a | separates cells."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference())
