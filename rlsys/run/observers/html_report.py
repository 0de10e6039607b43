"""report.html: a self-contained page about a run, made from the files in its directory.

The page needs no network: curves are SVG, and the script for values under the pointer is inline. A
run updates it regularly. It can be made again at any time, also for a run that was killed:

    python -m rlsys.run.observers.html_report runs/NAME
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from rlsys.config.command_line import flat
from rlsys.config.secrets import VARIABLE
from rlsys.data.rollout_files import read_rollouts
from rlsys.run.directory import RunDirectory, write_whole
from rlsys.run.fault_events import read_faults
from rlsys.run.observers.charts import format_number
from rlsys.run.observers.metrics_log import read_metrics
from rlsys.run.observers.observer import Observer, Outcome
from rlsys.run.observers.run_charts import charts_of
from rlsys.run.observers.run_status import RunStatus, read_status
from rlsys.run.observers.run_summary import RunSummary, run_summary
from rlsys.run.shown_text import shown

logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent
SAMPLES_PER_STEP = 12


def _tiles(summary: RunSummary, status: RunStatus | None) -> Iterator[tuple[str, str]]:
    """Yield the figures at the top of the page, as label and value."""
    for result in summary.results:
        yield result.label, result.text(arrow="→")
    training = summary.training
    if training is None:
        return
    if training.sampled_tokens:
        yield "training reward", training.reward.text("{:.3f}", arrow="→")
    else:
        yield "training loss", training.loss.text("{:.4f}", arrow="→")
    total = f" of {status.steps}" if status and status.steps else ""
    yield "steps", f"{training.last_step}{total}"
    yield "seconds per step", f"{training.seconds['time/step']:.2f}"
    if training.sampled_tokens:
        yield "sampled tokens", f"{training.sampled_tokens:,.0f}"
        yield "tokens/s generating", f"{training.tokens_per_second:,.0f}"
    if training.trained:
        yield "trained on", f"{training.trained.fraction:.1%} of the samples"
    if training.failed_rewards:
        yield "failed rewards", training.failed_rewards


def status_line(status: RunStatus | None, now: float) -> tuple[str, str]:
    """Return (css class, text): how the run ended, or that it had not when the page was written."""
    if status is None:
        return "unknown", "No status.json: it is not known how this run ended"
    of_all = f" of {status.steps} steps" if status.steps else " steps"
    text = f"{status.state.capitalize()} after {status.step}{of_all}"
    if status.state == "finished":
        return status.state, text
    if not status.is_over:
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        return status.state, f"{text} when this page was written, {written}"
    if status.state == "died" and status.phase:
        text += f", in {status.phase}"
    if status.message:
        text += f": {status.message}"
    return status.state, text


def _samples(directory: RunDirectory) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return responses of the first and of the last step that were written, each with its title."""
    files = sorted(directory.rollouts.glob("step_*.parquet"))
    chosen = files if len(files) < 2 else [files[0], files[-1]]
    return [
        (f"Step {int(file.stem.removeprefix('step_'))}", _spread(read_rollouts(file)))
        for file in chosen
    ]


def _spread(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows at regular intervals from a batch, with the columns that the table shows."""
    step = max(1, len(rows) // SAMPLES_PER_STEP)
    return [_sample(row) for row in rows[::step][:SAMPLES_PER_STEP]]


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt": row["prompt"],
        "question": row["prompt"].rstrip().split("\n\n")[-1][-300:],
        "response": row["response"],
        "answer": row["extracted_answer"],
        "truth": row["ground_truth"],
        "reward": format_number(row["reward"]),
        "right": row.get("correct", row["accuracy"] >= 0.5),
        "trained": row.get("trained", True),
        "reason": row["reason"],
        "advantage": _first_advantage(row),
    }


def _faults(directory: RunDirectory) -> list[dict[str, str]]:
    """Return the deaths of processes, with the columns that the table shows."""
    return [
        {
            "time": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(fault.time)),
            "place": f"{fault.phase} of step {fault.step}" if fault.phase else "start",
            "event": fault.event,
            "reason": fault.reason,
            "action": fault.action,
            "evidence": fault.evidence,
        }
        for fault in read_faults(directory.faults)
    ]


def _first_advantage(row: Mapping[str, Any]) -> str:
    """Return the advantage of the first sampled token; a dash where the file has none.

    It has none for responses that were not trained.
    """
    if row["advantages"] is None:
        return "–"
    tokens = zip(row["advantages"], row["response_mask"], strict=True)
    first = next((advantage for advantage, sampled in tokens if sampled), 0.0)
    return f"{first:+.2f}"


def render_report(directory: RunDirectory) -> str:
    """Return the page."""
    records = read_metrics(directory.metrics)
    summary = run_summary(records)
    config = yaml.safe_load(directory.config.read_text(encoding="utf-8"))
    status, now = read_status(directory), time.time()
    return render_page(
        "report_template.html",
        name=directory.path.resolve().name,
        recipe=config.get("recipe", ""),
        model=config.get("model", {}).get("path", ""),
        status=status_line(status, now),
        written=now,
        tiles=list(_tiles(summary, status)),
        warnings=summary.training.warnings if summary.training else (),
        faults=_faults(directory),
        charts=charts_of(records),
        config=[(name, json.dumps(v, ensure_ascii=False)) for name, v in flat(config).items()],
        samples=_samples(directory),
    )


def render_page(template: str, **values: Any) -> str:
    """Return a page with the common style, and the script for values under the pointer.

    All values are escaped, but for those that the template marks as safe: style, script and charts.
    All are shown without secrets and without characters that act on the display.
    """
    secrets = {name: value for name, value in os.environ.items() if VARIABLE.search(name)}

    def finalize(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return type(value)(shown(value, secrets))

    environment = jinja2.Environment(
        autoescape=True,
        finalize=finalize,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(TEMPLATES),
    )
    return environment.get_template(template).render(
        style=(TEMPLATES / "report_style.html").read_text(),
        script=(TEMPLATES / "report_script.html").read_text(),
        **values,
    )


def write_report(directory: RunDirectory) -> None:
    """Write report.html atomically."""
    write_whole(directory.report, render_report(directory))


def update_report(directory: RunDirectory) -> None:
    """Write the report; log an error instead of raising it, so that training goes on."""
    try:
        write_report(directory)
    except Exception:
        logger.exception("the report could not be written")


class ReportWriter(Observer):
    """Observer that updates report.html after each evaluation and checkpoint, and at the end."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory

    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        update_report(self._directory)

    def on_checkpoint(self, step: int, path: str) -> None:
        update_report(self._directory)

    def on_end(self, outcome: Outcome, message: str) -> None:
        update_report(self._directory)


def main(arguments: Sequence[str]) -> None:
    """Make the report of a run again, from its directory."""
    directory = RunDirectory(Path(arguments[0])) if len(arguments) == 1 else None
    if directory is None or not directory.config.is_file():
        sys.exit(
            "usage: python -m rlsys.run.observers.html_report runs/NAME, the directory of a run"
        )
    write_report(directory)
    print(directory.report)


if __name__ == "__main__":
    main(sys.argv[1:])
