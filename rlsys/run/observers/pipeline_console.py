"""The table at the end of a pipeline."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlsys.config.rlhf import RlhfRunConfig
from rlsys.run.observers.console import duration
from rlsys.run.pipeline_directory import PipelineDirectory
from rlsys.run.pipeline_summary import StageSummary, summarize_pipeline


def print_pipeline(console: Console, config: RlhfRunConfig, directory: PipelineDirectory) -> None:
    """Print a table over all stages, and where their reports are."""
    stages = summarize_pipeline(config, directory)
    console.print(_table(stages))
    total = sum(stage.seconds or 0.0 for stage in stages)
    console.print(f"{'wall time':<12} {duration(total)}", highlight=False)
    console.print(f"{'report':<12} {directory.report}", highlight=False, soft_wrap=True)


def _table(stages: tuple[StageSummary, ...]) -> Table:
    table = Table(title="stages", title_justify="left")
    for head in ("stage", "time", "result", "before", "after"):
        table.add_column(head, justify="right" if head in ("before", "after") else "left")
    for stage in stages:
        time = "-" if stage.seconds is None else duration(stage.seconds)
        name = stage.name if stage.state == "complete" else f"{stage.name} ({stage.state})"
        rows = [(one.label, one.before, one.after) for one in stage.figures] or [("-", "", "")]
        for number, cells in enumerate(rows):
            first = (name, time) if number == 0 else ("", "")
            table.add_row(*map(Text, (*first, *cells)))
    return table
