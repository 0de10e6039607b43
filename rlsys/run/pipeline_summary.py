"""What each stage of a pipeline did, from the files in its directory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlsys.config.rlhf import RlhfRunConfig
from rlsys.data.ranking_files import count_rankings
from rlsys.run.observers.metrics_log import MetricsRecord, read_metrics
from rlsys.run.observers.run_summary import Change, finite_values, run_summary
from rlsys.run.pipeline import TITLES, stage_state
from rlsys.run.pipeline_directory import PipelineDirectory, StageState


@dataclass(frozen=True, kw_only=True)
class StageFigure:
    """One figure of a stage, before and after it; `before` is "" where there is only one."""

    label: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class StageSummary:
    """A stage: how far it is, how long it took, what it changed."""

    name: str
    title: str
    state: StageState
    seconds: float | None  # over all its starts; None: it has not started
    figures: tuple[StageFigure, ...]


# Metrics of the training steps that no evaluation measures: label, name, format.
STEP_FIGURES: tuple[tuple[str, str, str], ...] = (
    ("KL to the SFT model, sampled", "policy/kl_ref_k1", "{:.4f}"),
)


def summarize_pipeline(
    config: RlhfRunConfig, directory: PipelineDirectory
) -> tuple[StageSummary, ...]:
    """Return a summary of each stage, also of those that have not started."""
    seconds = directory.seconds()
    return tuple(
        StageSummary(
            name=stage,
            title=TITLES[stage],
            state=stage_state(config, stage, directory, checksums=False),
            seconds=seconds.get(stage),
            figures=tuple(_figures(stage, directory)),
        )
        for stage in config.stages
    )


def _figures(stage: str, directory: PipelineDirectory) -> Iterator[StageFigure]:
    if stage == "rankings":
        if directory.rankings.is_file():
            yield from _ranking_figures(directory)
        return
    records = read_metrics(directory.stage(stage).metrics)
    for result in run_summary(records).results:
        yield _figure(result.label, result.change, result.form)
    yield from _step_figures(records)


def _figure(label: str, change: Change, form: str) -> StageFigure:
    before, after = change.text(form, arrow="|").split(" | ")
    return StageFigure(label=label, before=before, after=after)


def _step_figures(records: Sequence[MetricsRecord]) -> Iterator[StageFigure]:
    """Yield figures of the first and of the last training step."""
    train = [record for record in records if record.kind == "train"]
    for label, name, form in STEP_FIGURES:
        found = finite_values(train, name)
        if found:
            yield _figure(label, Change(first=found[0], last=found[-1]), form)


def _ranking_figures(directory: PipelineDirectory) -> Iterator[StageFigure]:
    counts = count_rankings(directory.rankings)
    yield StageFigure(label="problems with a ranking", before="", after=f"{counts.rankings:,}")
    yield StageFigure(label="pairs of responses", before="", after=f"{counts.pairs:,}")
    yield StageFigure(label="of these ties", before="", after=f"{counts.ties / counts.pairs:.0%}")
