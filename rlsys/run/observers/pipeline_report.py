"""report.html of a pipeline: the table over all stages, and the main curves of each."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from rlsys.config.command_line import flat
from rlsys.config.rlhf import COMPARISON, RlhfRunConfig
from rlsys.data.ranking_files import read_ranking_rows
from rlsys.run.directory import write_whole
from rlsys.run.observers.console import duration
from rlsys.run.observers.html_report import render_page
from rlsys.run.observers.metrics_log import read_metrics
from rlsys.run.observers.run_charts import charts_called
from rlsys.run.pipeline_directory import PipelineDirectory
from rlsys.run.pipeline_summary import StageSummary, summarize_pipeline

logger = logging.getLogger(__name__)

SHOWN_RANKINGS = 8

PPO_CHARTS = (
    "Reward of all samples",
    "Accuracy",
    "KL to the reference (nats per token)",
    "Loss of pretraining text (nats per token)",
    "Variance of the returns that the critic explains",
)

MAIN_CHARTS: Mapping[str, tuple[str, ...]] = {
    "sft": ("Loss", "Accuracy"),
    "rankings": (),
    "reward_model": ("Loss of the reward model", "Ranking accuracy of the reward model"),
    "ppo": PPO_CHARTS,
    COMPARISON: PPO_CHARTS,
}


def write_pipeline_report(config: RlhfRunConfig, directory: PipelineDirectory) -> None:
    """Write report.html; log an error instead of raising it, so that the stages go on."""
    try:
        write_whole(directory.report, render_pipeline(config, directory))
    except Exception:
        logger.exception("the report could not be written")


def render_pipeline(config: RlhfRunConfig, directory: PipelineDirectory) -> str:
    """Return the page."""
    stages = summarize_pipeline(config, directory)
    fields = flat(config.model_dump(mode="json"))
    return render_page(
        "pipeline_template.html",
        name=directory.path.resolve().name,
        recipe=config.recipe,
        model=config.model.path,
        status=_status(stages),
        stages=[_shown(stage, directory) for stage in stages],
        rankings=_rankings(directory),
        config=[(name, json.dumps(value, ensure_ascii=False)) for name, value in fields.items()],
    )


def _status(stages: tuple[StageSummary, ...]) -> tuple[str, str]:
    complete = [stage for stage in stages if stage.state == "complete"]
    total = duration(sum(stage.seconds or 0.0 for stage in stages))
    if len(complete) == len(stages):
        return "finished", f"All {len(stages)} stages are complete, in {total}"
    return "interrupted", f"{len(complete)} of {len(stages)} stages are complete, in {total}"


def _shown(stage: StageSummary, directory: PipelineDirectory) -> dict[str, Any]:
    report = directory.stage(stage.name).report
    records = read_metrics(directory.stage(stage.name).metrics)
    return {
        "name": stage.name,
        "title": stage.title,
        "state": stage.state,
        "time": "–" if stage.seconds is None else duration(stage.seconds),
        "figures": stage.figures,
        "report": f"{stage.name}/{report.name}" if report.is_file() else None,
        "charts": charts_called(MAIN_CHARTS[stage.name], records),
    }


def _rankings(directory: PipelineDirectory) -> list[dict[str, Any]]:
    """Return the first rankings, with their responses from the best to the worst."""
    if not directory.rankings.is_file():
        return []
    rows = []
    for row in read_ranking_rows(directory.rankings, limit=SHOWN_RANKINGS):
        ranked = sorted(zip(row["ranks"], row["responses"], strict=True), key=lambda one: one[0])
        rows.append({"prompt": row["prompt"], "answer": row["answer"], "ranked": ranked})
    return rows
