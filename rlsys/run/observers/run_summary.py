"""Statistics over all steps of a run, for the console at its end and for the top of the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rlsys.run.observers.headlines import HEADLINES
from rlsys.run.observers.metrics_log import MetricsRecord
from rlsys.run.observers.observer import PHASES
from rlsys.run.observers.step_notes import step_notes
from rlsys.run.reward_failures import total_failures


@dataclass(frozen=True, kw_only=True)
class Change:
    """A metric at the beginning and at the end of a run; NaN where it has no value."""

    first: float
    last: float

    def text(self, form: str, arrow: str = "->") -> str:
        """Return both in one format, such as "{:.3f}"; "-" where there is no value."""
        ends = [form.format(end) if math.isfinite(end) else "-" for end in (self.first, self.last)]
        return f" {arrow} ".join(ends)


@dataclass(frozen=True, kw_only=True)
class Result:
    """A result of the first and of the last evaluation."""

    label: str
    change: Change
    form: str

    def text(self, arrow: str = "->") -> str:
        """Return both values."""
        return self.change.text(self.form, arrow)


@dataclass(frozen=True, kw_only=True)
class TrainedPart:
    """The responses that entered the loss, where not all of them did."""

    fraction: float  # of the sampled ones
    reward: Change


@dataclass(frozen=True, kw_only=True)
class Warnings:
    """All warnings of one kind."""

    kind: str
    steps: str  # "3 steps, 5 to 9"
    last: str


@dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    """Statistics over the training steps."""

    last_step: int
    averaged_steps: int  # each end of a `Change` is the mean over so many steps
    reward: Change
    loss: Change
    failed_rewards: str  # the functions that failed, with counts; "" where none did
    trained: TrainedPart | None  # None: all responses
    seconds: Mapping[str, float]  # time/<phase> and time/step, means per step
    sampled_tokens: float
    tokens_per_second: float  # while generating
    peak_memory_gib: Mapping[str, float]  # by worker
    warnings: Sequence[Warnings]


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """Statistics over a run; a part without records is None."""

    accuracy: Change | None  # held out, of the first and the last evaluation; None: not measured
    results: Sequence[Result]  # all that the evaluations measured, the most telling first
    evaluated_steps: tuple[int, int] | None  # steps after which those two were made
    training: TrainingSummary | None


def run_summary(records: Iterable[MetricsRecord]) -> RunSummary:
    """Summarize the records of a run, which may still be going on."""
    records = list(records)
    train = [record for record in records if record.kind == "train"]
    evaluations = [record for record in records if record.kind == "eval"]
    training = _training_summary(train) if train else None
    if not evaluations:
        return RunSummary(accuracy=None, results=(), evaluated_steps=None, training=training)
    first, last = evaluations[0], evaluations[-1]
    results = [
        Result(
            label=headline.label,
            change=_between(first, last, headline.metric),
            form=headline.form,
        )
        for headline in HEADLINES
        if headline.metric in last.values
    ]
    has_accuracy = "eval/accuracy" in last.values
    return RunSummary(
        accuracy=_between(first, last, "eval/accuracy") if has_accuracy else None,
        results=results,
        evaluated_steps=(first.step, last.step),
        training=training,
    )


def _between(first: MetricsRecord, last: MetricsRecord, name: str) -> Change:
    return Change(first=first.values.get(name, math.nan), last=last.values.get(name, math.nan))


def finite_values(records: Iterable[MetricsRecord], name: str) -> list[float]:
    """Return the finite values of one metric."""
    found = (record.values.get(name, math.nan) for record in records)
    return [value for value in found if math.isfinite(value)]


def _training_summary(train: Sequence[MetricsRecord]) -> TrainingSummary:
    tenth = max(1, len(train) // 10)
    tokens = _sum(train, "rollout/tokens") + _sum(train, "rollout/greedy_tokens")
    times = [f"time/{name}" for name in (*PHASES, "step")]
    return TrainingSummary(
        last_step=train[-1].step,
        averaged_steps=tenth,
        reward=_change(train, "reward/mean", tenth),
        loss=_change(train, _loss_name(train), tenth),
        failed_rewards=total_failures(record.values for record in train),
        trained=_trained_part(train, tenth),
        seconds={name: _sum(train, name) / len(train) for name in times},
        sampled_tokens=tokens,
        tokens_per_second=tokens / max(_sum(train, "time/generate"), 1e-9),
        peak_memory_gib=_peak_memory(train),
        warnings=_counted_warnings(train),
    )


def _loss_name(train: Sequence[MetricsRecord]) -> str:
    """Return the loss of the model that the run trains."""
    own = "reward_model/loss"
    return own if own in train[-1].values else "policy/loss"


def _sum(records: Iterable[MetricsRecord], name: str) -> float:
    return sum(finite_values(records, name))


def _change(train: Sequence[MetricsRecord], name: str, steps: int) -> Change:
    """Compare the means over the first and the last `steps` steps."""
    return Change(first=_mean(train[:steps], name), last=_mean(train[-steps:], name))


def _mean(records: Sequence[MetricsRecord], name: str) -> float:
    found = finite_values(records, name)
    return sum(found) / len(found) if found else math.nan


def _trained_part(train: Sequence[MetricsRecord], averaged_steps: int) -> TrainedPart | None:
    trained, sampled = "trained/responses", "rollout/responses"
    differs = any(
        record.values.get(trained, math.nan) < record.values.get(sampled, math.nan)
        for record in train
    )
    if not differs:
        return None
    return TrainedPart(
        fraction=_sum(train, trained) / max(_sum(train, sampled), 1e-9),
        reward=_change(train, "trained/reward_mean", averaged_steps),
    )


def _peak_memory(train: Sequence[MetricsRecord]) -> dict[str, float]:
    """Return the highest memory of each worker that the last step still reports."""
    names = [name for name in train[-1].values if name.startswith("memory/")]
    peaks = {name: finite_values(train, name) for name in names}
    return {name.removeprefix("memory/"): max(found) for name, found in peaks.items() if found}


def _counted_warnings(train: Iterable[MetricsRecord]) -> list[Warnings]:
    """Collect the warnings of each kind, with their steps and the newest text."""
    steps: dict[str, list[int]] = {}
    texts: dict[str, str] = {}
    for record in train:
        for note in step_notes(record.values):
            if note.warning:
                steps.setdefault(note.kind, []).append(record.step)
                texts[note.kind] = note.text
    return [
        Warnings(kind=kind, steps=_step_range(found), last=texts[kind])
        for kind, found in steps.items()
    ]


def _step_range(steps: Sequence[int]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]}"
    return f"{len(steps)} steps, {steps[0]} to {steps[-1]}"
