"""The charts of a run's report: their titles, and the metrics that each shows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rlsys.run.fault_events import FAULT_KINDS
from rlsys.run.observers.charts import Series, line_chart, stacked_bars
from rlsys.run.observers.metrics_log import MetricsRecord
from rlsys.run.observers.observer import PHASES
from rlsys.run.observers.run_summary import finite_values

COMPONENTS = "reward/component/"
EFFECTIVE_SAMPLE_SIZE = "advantage/effective_fraction/at_"
PREDICTED = "eval/calibration/predicted_at_"
OBSERVED = "eval/calibration/observed_at_"


@dataclass(frozen=True)
class ChartSpec:
    """A chart: its title and the metrics it draws, as (label, metric name, "train" or "eval")."""

    title: str
    lines: tuple[tuple[str, str, str], ...]
    percent: bool = False
    may_be_log: bool = False
    unless_equal: tuple[tuple[str, str, str], ...] = ()  # drawn where they differ from the first
    unless_zero: bool = False  # for failures: not drawn where there are none
    only_with: str = ""  # the metric of a step without which it is not drawn


CHARTS = (
    ChartSpec(
        "Reward of all samples",
        (("mean", "reward/mean", "train"), ("standard deviation", "reward/std", "train")),
        unless_equal=(("mean of trained samples", "trained/reward_mean", "train"),),
    ),
    ChartSpec(
        "Accuracy",
        (("all samples", "reward/accuracy", "train"), ("held out", "eval/accuracy", "eval")),
        percent=True,
        unless_equal=(("trained samples", "trained/accuracy", "train"),),
    ),
    ChartSpec("Response length (tokens)", (("mean", "rollout/response_length", "train"),)),
    ChartSpec(
        "Entropy (nats per token)",
        (("policy", "policy/entropy", "train"), ("all samples", "rollout/entropy", "train")),
    ),
    ChartSpec(
        "Expert iteration: what is learned",
        (
            ("kept responses", "expert/kept_fraction", "train"),
            ("problems with one", "expert/solved_fraction", "train"),
        ),
        percent=True,
    ),
    ChartSpec(
        "KL to the reference (nats per token)",
        (("k1", "policy/kl_ref_k1", "train"), ("k3", "policy/kl_ref_k3", "train")),
        may_be_log=True,
    ),
    ChartSpec(
        "Loss",
        (("mean of the mini-batches", "policy/loss", "train"), ("held out", "eval/loss", "eval")),
        only_with="policy/loss",
    ),
    ChartSpec(
        "Loss of pretraining text (nats per token)",
        (("training", "policy/ptx_loss", "train"), ("held out", "eval/text_loss", "eval")),
    ),
    ChartSpec(
        "Gradient norm", (("before clipping", "policy/grad_norm", "train"),), may_be_log=True
    ),
    ChartSpec("Loss of the critic", (("mean of the mini-batches", "critic/loss", "train"),)),
    ChartSpec(
        "Variance of the returns that the critic explains",
        (("before the update", "critic/explained_variance", "train"),),
    ),
    ChartSpec(
        "Values of the critic and returns",
        (
            ("mean value", "critic/value_mean", "train"),
            ("mean return", "critic/return_mean", "train"),
        ),
    ),
    ChartSpec(
        "Log-prob difference of engine and trainer",
        (
            ("sampled tokens", "policy/logprob_difference_mean", "train"),
            ("probe after sync", "sync/logprob_difference_mean", "train"),
            ("drift since sampling", "policy/drift_mean", "train"),
        ),
        may_be_log=True,
    ),
    ChartSpec(
        "Fractions of groups, responses and tokens",
        (
            ("groups of equal rewards", "rollout/frac_reward_zero_std", "train"),
            ("truncated responses", "rollout/truncated_fraction", "train"),
            ("clipped tokens", "policy/clip_fraction", "train"),
        ),
        percent=True,
    ),
    ChartSpec(
        "Failures per step",
        (
            ("reward errors", "reward/errors", "train"),
            ("reward timeouts", "reward/timeouts", "train"),
            ("reward crashes", "reward/crashes", "train"),
            ("updates skipped", "policy/skipped_updates", "train"),
        ),
        may_be_log=True,
        unless_zero=True,
    ),
    ChartSpec(
        "Faults so far",
        tuple((kind.replace("_", " "), f"faults/{kind}", "train") for kind in FAULT_KINDS),
        unless_zero=True,
    ),
    ChartSpec(
        "Second moment of the gradient, relative to the leave-one-out baseline",
        (
            ("in use", "advantage/variance_ratio/used", "train"),
            ("group mean", "advantage/variance_ratio/group_mean", "train"),
            ("OPO", "advantage/variance_ratio/opo", "train"),
        ),
        may_be_log=True,
    ),
    ChartSpec(
        "True variance of the gradient, relative to the leave-one-out baseline",
        (
            ("in use", "gradient/variance_ratio/used", "train"),
            ("in use, by the proxy", "gradient/proxy_ratio/used", "train"),
            ("group mean", "gradient/variance_ratio/group_mean", "train"),
        ),
        may_be_log=True,
    ),
    ChartSpec(
        "Fraction of the gradient's second moment between different positions",
        (
            ("in use", "gradient/cross_position_fraction/used", "train"),
            ("leave-one-out", "gradient/cross_position_fraction/leave_one_out", "train"),
        ),
    ),
    ChartSpec(
        "Preference accuracy of the implicit reward",
        (
            ("training pairs", "policy/preference_accuracy", "train"),
            ("held out", "eval/preference_accuracy", "eval"),
        ),
        percent=True,
    ),
    ChartSpec(
        "Margin of the implicit reward",
        (
            ("training pairs", "policy/preference_margin", "train"),
            ("held out", "eval/preference_margin", "eval"),
        ),
    ),
    ChartSpec(
        "Implicit rewards of training pairs",
        (
            ("better response", "policy/preference_chosen_reward", "train"),
            ("worse response", "policy/preference_rejected_reward", "train"),
        ),
    ),
    ChartSpec(
        "Loss of the reward model",
        (("training", "reward_model/loss", "train"), ("held out", "eval/loss", "eval")),
        only_with="reward_model/loss",
    ),
    ChartSpec(
        "Ranking accuracy of the reward model",
        (
            ("training", "reward_model/ranking_accuracy", "train"),
            ("held out", "eval/ranking_accuracy", "eval"),
        ),
        percent=True,
    ),
    ChartSpec(
        "Step accuracy of the reward model",
        (
            ("training", "reward_model/step_accuracy", "train"),
            ("held out", "eval/step_accuracy", "eval"),
            ("held out, right steps", "eval/step_accuracy_right", "eval"),
            ("held out, wrong steps", "eval/step_accuracy_wrong", "eval"),
        ),
        percent=True,
    ),
    ChartSpec(
        "Rewards of the reward model",
        (
            ("mean", "reward_model/reward_mean", "train"),
            ("standard deviation", "reward_model/reward_std", "train"),
        ),
    ),
    ChartSpec(
        "Gradient norm of the reward model",
        (("before clipping", "reward_model/grad_norm", "train"),),
        may_be_log=True,
    ),
    ChartSpec(
        "Age of the trained samples (weight versions)",
        (("mean", "staleness/mean", "train"), ("oldest", "staleness/max", "train")),
    ),
    ChartSpec(
        "Idle time (seconds per step)",
        (
            ("trainer", "idle/trainer", "train"),
            ("generation workers, mean", "idle/generation", "train"),
        ),
    ),
    ChartSpec(
        "Learning rate",
        (
            ("policy", "policy/learning_rate", "train"),
            ("critic", "critic/learning_rate", "train"),
            ("reward model", "reward_model/learning_rate", "train"),
        ),
    ),
)


def charts_of(records: Sequence[MetricsRecord]) -> list[str]:
    """Return every chart that has something to draw, as SVG."""
    first, *others = (_chart(spec, records) for spec in CHARTS)
    charts = [
        first,
        _reward_components(records),
        *others,
        _effective_sample_size(records),
        _calibration(records),
        _time_by_phase(records),
    ]
    return [chart for chart in charts if chart]


def charts_called(titles: Sequence[str], records: Sequence[MetricsRecord]) -> list[str]:
    """Return the charts of these titles that have something to draw, in this order."""
    specs = {spec.title: spec for spec in CHARTS}
    charts = [_chart(specs[title], records) for title in titles]
    return [chart for chart in charts if chart]


def _chart(spec: ChartSpec, records: Sequence[MetricsRecord]) -> str:
    if spec.only_with and not any(spec.only_with in record.values for record in records):
        return ""
    lines = [series_of(records, *line) for line in spec.lines]
    extra = [series_of(records, *line) for line in spec.unless_equal]
    lines += [line for line in extra if line.points != lines[0].points]
    if spec.unless_zero:
        nonzero = [line for line in lines if any(y for _, y in line.points)]
        lines = [replace(line, smooth=False) for line in nonzero]
    return line_chart(spec.title, lines, percent=spec.percent, may_be_log=spec.may_be_log)


def _reward_components(records: Sequence[MetricsRecord]) -> str:
    """Draw the reward of each function, where there are several."""
    names = {name for record in records for name in record.values if name.startswith(COMPONENTS)}
    if len(names) < 2:
        return ""
    lines = [
        series_of(records, name.removeprefix(COMPONENTS), name, "train") for name in sorted(names)
    ]
    return line_chart("Reward by function (unweighted mean)", lines)


def _effective_sample_size(records: Sequence[MetricsRecord]) -> str:
    lines = series_over_position(records, EFFECTIVE_SAMPLE_SIZE)
    title = "Effective sample size of the ratios over position (% of the longest response)"
    return line_chart(title, lines, percent=True, at="{} % of the longest response")


def _calibration(records: Sequence[MetricsRecord]) -> str:
    """Draw observed over predicted fractions of held-out pairs, and the diagonal."""
    evaluations = [record for record in records if any(map(_is_predicted, record.values))]
    if not evaluations:
        return ""
    shown = evaluations[:1] + evaluations[1:][-1:]
    lines = [
        Series(f"step {record.step}", tuple(sorted(_calibration_points(record))), markers=True)
        for record in shown
    ]
    diagonal = Series("calibrated", ((50.0, 0.5), (100.0, 1.0)), smooth=False)
    title = "Calibration: observed over predicted fraction of held-out pairs (%)"
    return line_chart(title, [*lines, diagonal], percent=True, at="predicted {} %")


def _is_predicted(name: str) -> bool:
    return name.startswith(PREDICTED)


def _calibration_points(record: MetricsRecord) -> Iterator[tuple[float, float]]:
    for name in filter(_is_predicted, record.values):
        observed = record.values.get(OBSERVED + name.removeprefix(PREDICTED))
        if observed is not None:
            yield round(100 * record.values[name], 1), observed


def _time_by_phase(records: Sequence[MetricsRecord]) -> str:
    train = [record for record in records if record.kind == "train"]
    phases = [name for name in PHASES if any(f"time/{name}" in record.values for record in train)]
    steps = [(record.step, [_seconds(record, name) for name in phases]) for record in train]
    return stacked_bars("Time by phase (seconds per step)", phases, steps, "s")


def _seconds(record: MetricsRecord, phase: str) -> float:
    return sum(finite_values([record], f"time/{phase}"))


def series_of(records: Sequence[MetricsRecord], label: str, name: str, kind: str) -> Series:
    """Return one metric over the steps that have it."""
    points = tuple(
        (record.step, record.values[name])
        for record in records
        if record.kind == kind and name in record.values
    )
    return Series(label, points, markers=kind == "eval")


def series_over_position(records: Sequence[MetricsRecord], prefix: str) -> list[Series]:
    """Return metrics `<prefix><percent of the longest response>` over that percentage.

    One line each for the first, the middle and the last step that have any.
    """
    found = [(record.step, tuple(_by_position(record, prefix))) for record in records]
    steps = [(step, points) for step, points in found if points]
    if not steps:
        return []
    shown = sorted({0, len(steps) // 2, len(steps) - 1})
    lines = [steps[place] for place in shown]
    return [
        Series(f"step {step}", tuple(p for p in points if math.isfinite(p[1])), markers=True)
        for step, points in lines
    ]


def _by_position(record: MetricsRecord, prefix: str) -> Iterator[tuple[float, float]]:
    for name, value in sorted(record.values.items()):
        if name.startswith(prefix):
            yield float(name.removeprefix(prefix)), value
