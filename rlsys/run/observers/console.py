"""Console output of a run: a live display on a terminal, plain lines elsewhere, and a summary."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlsys.run.directory import RunDirectory
from rlsys.run.fault_events import Fault, count_faults
from rlsys.run.observers.headlines import further_results, headline_of
from rlsys.run.observers.metrics_log import MetricsRecord
from rlsys.run.observers.observer import PHASES, Observer, Outcome
from rlsys.run.observers.run_status import read_status
from rlsys.run.observers.run_summary import TrainingSummary, run_summary
from rlsys.run.observers.step_notes import step_notes

COLUMNS = (
    ("loss", "policy/loss", "{:.4f}"),
    ("loss", "reward_model/loss", "{:.4f}"),
    ("right", "policy/preference_accuracy", "{:.1%}"),
    ("margin", "policy/preference_margin", "{:.3f}"),
    ("right", "reward_model/ranking_accuracy", "{:.1%}"),
    ("right", "reward_model/step_accuracy", "{:.1%}"),
    ("reward", "reward_model/reward_mean", "{:.3f}"),
    ("std", "reward_model/reward_std", "{:.3f}"),
    ("grad", "reward_model/grad_norm", "{:.2f}"),
    ("reward", "reward/mean", "{:.3f}"),
    ("correct", "reward/accuracy", "{:.1%}"),
    ("kept", "expert/kept_fraction", "{:.1%}"),
    ("length", "rollout/response_length", "{:.1f}"),
    ("entropy", "policy/entropy", "{:.3f}"),
    ("grad", "policy/grad_norm", "{:.2f}"),
    ("mismatch", "policy/logprob_difference_mean", "{:.4f}"),
    ("tok/s", "throughput/step", "{:.0f}"),
    ("s/step", "time/step", "{:.1f}"),
)
# The columns of a run that samples, which are there although a step may lack the metric.
ALWAYS = (
    *("reward/mean", "reward/accuracy", "rollout/response_length", "policy/entropy"),
    *("policy/grad_norm", "policy/logprob_difference_mean", "throughput/step", "time/step"),
)
# Those of expert iteration.
EXPERT = (
    *("policy/loss", "reward/mean", "reward/accuracy", "expert/kept_fraction"),
    *("rollout/response_length", "policy/entropy", "policy/grad_norm"),
    *("throughput/step", "time/step"),
)
HEADER_EVERY = 20  # plain lines
CELL = 8  # characters of a number


def duration(seconds: float) -> str:
    """Return seconds as 42 s, 3 m 20 s, 1 h 05 m."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} m"
    return f"{minutes} m {rest:02d} s" if minutes else f"{rest} s"


def cell(values: Mapping[str, float], name: str, form: str) -> str:
    """Return a metric in at most `CELL` characters; "-" where it is absent or not finite."""
    value = values.get(name, math.nan)
    if not math.isfinite(value):
        return "-"
    text = form.format(value)
    return text if len(text) <= CELL else f"{value:.1e}"


def phase_line(values: Mapping[str, float]) -> str:
    """Return the time by phase of one step: "generate 1.2 s (40 %), update ..."."""
    total = values.get("time/step") or 1.0
    parts = [(name, values.get(f"time/{name}", 0.0)) for name in PHASES]
    return ", ".join(
        f"{name} {seconds:.2f} s ({seconds / total:.0%})"
        for name, seconds in parts
        if seconds >= 0.005
    )


def columns_of(values: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Return the columns of a row: those of the run's kind."""
    if "expert/kept_fraction" in values:
        names = EXPERT
    elif "reward/mean" in values:
        names = ALWAYS
    else:
        names = tuple(values)
    return [column for column in COLUMNS if column[1] in names]


class Progress(Observer):
    """Observer that shows a run on the console."""

    def __init__(self, console: Console, *, live: bool) -> None:
        self._console = console
        self._live = (
            Live(console=console, refresh_per_second=4, transient=True)
            if live and console.is_terminal
            else None
        )
        self._total = self._first = self._step = 0
        self._began = time.monotonic()
        self._phase = "starting"
        self._values: Mapping[str, float] = {}
        self._evaluations: list[tuple[int, str]] = []
        self._headline = ""
        self._warned: set[str] = set()  # kinds of the notes on the previous step
        self._rows = 0

    def on_start(self, first_step: int, total_steps: int) -> None:
        self._first, self._total, self._step = first_step, total_steps, first_step - 1
        self._began = time.monotonic()
        if self._live:
            self._live.start()
        self._show()

    def on_phase(self, step: int, phase: str) -> None:
        self._phase = phase
        self._show()

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        self._step, self._values = step, values
        if self._live is None:
            self._print_row(step, values)
        self._print_notes(step, values)
        self._show()

    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        headline = headline_of(values)
        if headline is None:
            return
        self._headline = headline.label
        self._evaluations.append((step, headline.text(values)))
        sampled = [
            f"{name.removeprefix('eval/')} {value:.1%}"
            for name, value in values.items()
            if name.startswith(("eval/mean@", "eval/pass@"))
        ]
        line = f"{headline.label} after {step} steps: {headline.text(values)}"
        details = [*sampled, *further_results(values, headline)]
        if details:
            line += f" ({', '.join(details)})"
        self._print(line)

    def on_checkpoint(self, step: int, path: str) -> None:
        self._print(f"checkpoint {path}")

    def on_fault(self, fault: Fault) -> None:
        self._print(fault.line())

    def on_end(self, outcome: Outcome, message: str) -> None:
        if self._live:
            self._live.stop()
        if outcome in ("finished", "restarting"):  # the command prints that it restarts
            return
        line = f"run {outcome} after {self._step} steps"
        if message and outcome != "failed":  # the command prints the reason of a failure
            line += f": {message}"
        self._print(line)

    def notice(self, text: str) -> None:
        """Print a text for the user at once."""
        self._print(text)

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _eta(self) -> str:
        done = self._step - self._first + 1
        if done <= 0:
            return "-"
        return duration((time.monotonic() - self._began) / done * (self._total - self._step))

    def _print_row(self, step: int, values: Mapping[str, float]) -> None:
        columns = columns_of(values)
        if self._rows % HEADER_EVERY == 0:
            names = "".join(f"{name:>9}" for name, _, _ in columns)
            self._print(f"    step {names}       ETA  time by phase")
        self._rows += 1
        cells = "".join(f"{cell(values, name, form):>9}" for _, name, form in columns)
        timed = [name for name in PHASES if f"time/{name}" in values]
        phases = " ".join(f"{name[:3]} {values[f'time/{name}']:.1f}" for name in timed)
        self._print(f"{step:>4}/{self._total:<4}{cells}{self._eta():>10}  {phases}")

    def _print_notes(self, step: int, values: Mapping[str, float]) -> None:
        """Print the notes on a step below its row.

        The live display shows the notes of the last step only; a new warning is printed above it.
        """
        notes = step_notes(values)
        for note in notes:
            if self._live is None:
                self._print(f"{'!' if note.warning else '':>9}  {note.text}")
            elif note.warning and note.kind not in self._warned:
                self._print(f"! step {step}: {note.text}")
        self._warned = {note.kind for note in notes}

    def _show(self) -> None:
        if self._live is not None:
            self._live.update(Group(*self._panel()))

    def _panel(self) -> Iterator[RenderableType]:
        """Yield the lines of the live display."""
        head = Table.grid(padding=(0, 2))
        head.add_row(
            f"step {self._step}/{self._total}",
            ProgressBar(total=max(1, self._total), completed=self._step, width=30),
            f"ETA {self._eta()}",
            Text(self._phase, style="dim"),
        )
        yield head
        yield from self._figures()
        if self._values:
            yield Text(phase_line(self._values), style="dim")
            for note in step_notes(self._values):
                yield Text(note.text, style="yellow" if note.warning else "dim")
        if self._evaluations:
            newest = self._evaluations[-8:]
            curve = "  ".join(f"{step}: {result}" for step, result in newest)
            yield Text(f"{self._headline}  {curve}")

    def _figures(self) -> Iterator[Table]:
        """Yield the columns of a row, in as many lines as the terminal's width requires."""
        shown = [
            (name, cell(self._values, key, form))
            for name, key, form in COLUMNS
            if key in self._values
        ]
        per_line = max(1, self._console.width // (CELL + 1))
        for first in range(0, len(shown), per_line):
            part = shown[first : first + per_line]
            table = Table.grid(padding=(0, 2))
            table.add_row(*(Text(name, style="dim") for name, _ in part))
            table.add_row(*(value for _, value in part))
            yield table


def print_summary(
    console: Console, records: Sequence[MetricsRecord], directory: RunDirectory, seconds: float
) -> None:
    """Print the table at the end of a run, and the paths of its files."""
    summary = run_summary(records)
    table = Table(title="summary", show_header=False, title_justify="left")
    status = read_status(directory)
    if status and status.state != "finished":
        table.add_row("run", f"{status.state} after {status.step} of {status.steps} steps")
    if summary.evaluated_steps:
        first, last = summary.evaluated_steps
        for result in summary.results:
            table.add_row(result.label, f"{result.text()} (steps {first} -> {last})")
    if summary.training:
        for label, text in _training_rows(summary.training):
            table.add_row(label, text)
        for warnings in summary.training.warnings:
            label = Text(warnings.kind, style="yellow")
            table.add_row(label, f"{warnings.steps} (last: {warnings.last})")
    faults = count_faults(directory.faults)
    if faults:
        counts = ", ".join(f"{kind} {count}" for kind, count in faults.items())
        table.add_row(Text("faults", style="yellow"), counts)
    table.add_row("wall time", duration(seconds))
    console.print(table)
    _print_paths(console, directory)


def _training_rows(training: TrainingSummary) -> Iterator[tuple[str, str]]:
    """Yield label and text of the rows about the training steps."""
    steps = training.averaged_steps
    averaged = f"(mean of the first and last {steps} steps)"
    if training.sampled_tokens:
        yield "reward", f"{training.reward.text('{:.3f}')} {averaged}"
    else:
        yield "loss", f"{training.loss.text('{:.4f}')} {averaged}"
    if training.failed_rewards:
        yield "failed rewards", training.failed_rewards
    if training.trained:
        yield (
            "trained on",
            f"{training.trained.fraction:.1%} of the responses, "
            f"their reward {training.trained.reward.text('{:.3f}')}",
        )
    yield "steps", f"{training.last_step}, {training.seconds['time/step']:.2f} s each"
    yield "time by phase", phase_line(training.seconds)
    if training.sampled_tokens:
        yield (
            "sampled tokens",
            f"{training.sampled_tokens:,.0f}, "
            f"{training.tokens_per_second:.0f} per second while generating",
        )
    memory = [f"{name} {gib:.2f} GiB" for name, gib in training.peak_memory_gib.items()]
    yield "peak memory", ", ".join(memory) or "-"


def _print_paths(console: Console, directory: RunDirectory) -> None:
    written = {
        "report": directory.report,
        "metrics": directory.metrics,
        "rollouts": directory.rollouts,
        "checkpoints": directory.checkpoints,
        "faults": directory.faults,
        "log": directory.log,
    }
    for label, path in written.items():
        if path.exists():
            console.print(f"{label:<12} {path}", highlight=False, soft_wrap=True)
