"""The report of the checks: a Markdown page, and the same as JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.gpu_check.catalogue import MACHINE, named
from benchmarks.gpu_check.results import CheckResult, Figure

PHASE_COLUMNS = ("time", "rate", "MFU", "peak memory")

INTRODUCTION = """# Measurements on a GPU

The page is written by one command, on a machine with an NVIDIA GPU:

```sh
make check-gpu
```

That sets up the environment where it is missing. Where it cannot be set up, any Python that has
torch and transformers will do: `python -m benchmarks.gpu_check` in the repository. It takes less
than ten minutes. Each check runs in a process of its own; what a machine lacks is skipped by name.
"""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All outcomes so far, in the order in which the checks ran."""

    results: tuple[CheckResult, ...]
    device: str
    when: datetime

    @staticmethod
    def of(results: Sequence[CheckResult], device: str) -> Report:
        """Make the report of now."""
        # datetime.UTC is younger than Python 3.10.
        return Report(results=tuple(results), device=device, when=datetime.now(timezone.utc))  # noqa: UP017

    @property
    def failed(self) -> tuple[CheckResult, ...]:
        """The checks that failed."""
        return tuple(result for result in self.results if result.status == "failed")

    def to_json(self) -> str:
        """Return the report as JSON."""
        results = [asdict(result) for result in self.results]
        facts = {"when": self.when.isoformat(timespec="seconds"), "device": self.device}
        return json.dumps({**facts, "results": results}, indent=1) + "\n"

    def to_markdown(self) -> str:
        """Return the page."""
        parts = [INTRODUCTION, self._machine(), self._outcomes()]
        parts += [section(result) for result in self.results if has_section(result)]
        return "\n".join(parts)

    def write(self, page: Path) -> None:
        """Write the page and, beside it, the JSON file."""
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(self.to_markdown())
        page.with_suffix(".json").write_text(self.to_json())

    def _machine(self) -> str:
        found = next((one for one in self.results if one.name == MACHINE.name), None)
        rows = [("date", self.when.strftime("%Y-%m-%d %H:%M UTC")), ("device", self.device)]
        if found is not None:
            rows += found.facts.items()
            rows += [(figure.name, shown(figure)) for figure in found.figures]
        return "## Machine\n\n" + table(("what", "here"), rows)

    def _outcomes(self) -> str:
        rows = []
        for result in self.results:
            outcome = f"**{result.status}**" if result.status == "failed" else result.status
            seconds = f"{result.seconds:.1f}" if result.seconds else ""
            proves = named(result.name).proves
            rows.append((f"`{result.name}`", proves, outcome, seconds, result.reason))
        columns = ("check", "what it proves", "outcome", "seconds", "why")
        return "## Checks\n\n" + table(columns, rows)


def has_section(result: CheckResult) -> bool:
    """Return whether a check has figures that its section shows."""
    return result.name != MACHINE.name and bool(result.figures)


def section(result: CheckResult) -> str:
    """Return the section of one check."""
    lines = [f"## {result.name}", "", f"{named(result.name).proves}.", ""]
    if result.facts:
        lines += [*(f"- {name}: {value}" for name, value in result.facts.items()), ""]
    text = "\n".join(lines)
    phases = {figure.name.partition(": ")[0] for figure in result.figures if is_of_phase(figure)}
    if result.name.startswith("throughput") and phases:
        return text + phase_table(result.figures)
    return text + table(("figure", "value"), [(one.name, shown(one)) for one in result.figures])


def is_of_phase(figure: Figure) -> bool:
    """Return whether a figure is a cell of the table of phases."""
    return figure.name.partition(": ")[2] in PHASE_COLUMNS


def phase_table(figures: Sequence[Figure]) -> str:
    """Return one row for each phase."""
    cells: dict[str, dict[str, str]] = {}
    others = []
    for figure in figures:
        phase, _, column = figure.name.partition(": ")
        if is_of_phase(figure):
            cells.setdefault(phase, {})[column] = shown(figure)
        else:
            others.append(f"{figure.name}: {shown(figure)}.\n\n")
    rows = [
        (phase, *(row.get(column, "") for column in PHASE_COLUMNS)) for phase, row in cells.items()
    ]
    return "".join(others) + table(("phase", *PHASE_COLUMNS), rows)


def shown(figure: Figure) -> str:
    """Return a number with its unit, in four digits."""
    value = figure.value
    digits = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{digits} {figure.unit}".strip()


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"
