"""Problems from files and Hugging Face data sets: every row is checked, and named if it is unfit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rlsys.config import ColumnNames
from rlsys.data.problems import Problem
from rlsys.data.row_files import Row, Table, read_table
from rlsys.data.row_values import (
    Blank,
    Unfit,
    answer_text,
    id_text,
    level_number,
    lookup,
    prompt_parts,
    subject_text,
)

T = TypeVar("T")
EXAMPLES = 5  # unfit rows that a message shows
SHOWN_NAMES = 20  # columns, levels or subjects that a message lists


def read_problems(
    source: str,
    *,
    columns: ColumnNames,
    field: str,
    levels: Sequence[int] | None = None,
    subjects: Sequence[str] | None = None,
    on_dropped: Callable[[str], None] | None = None,
) -> list[Problem]:
    """The problems of a file or a hub data set (`id` or `id:split`), filtered.

    Args:
        field: name of the config field that holds `source`, for messages.
        on_dropped: drops rows without a problem or an answer, and is told which. None: such rows
            are refused like all others that cannot be used.

    Raises:
        ValueError: the source is missing or unreadable, lacks a column, has rows that cannot be
            used, or holds nothing after the filters.
    """
    names = [columns.problem, columns.answer, columns.id, columns.level, columns.subject]
    table = read_table(source, needed=[name for name in names if name], field=field)
    filters = _Filters(levels, subjects)
    _check_columns(table, columns, filters, source, field)

    problems, unfit = _problems(table, columns, filters)
    refused = [row for row in unfit if not (on_dropped and problems and row.blank)]
    if refused:
        raise ValueError(
            f"{field}: {len(refused)} of {len(table.rows)} rows of {source!r} cannot be used: "
            f"{_examples(refused)}. {_remedies(refused)}"
        )
    if unfit and on_dropped:
        on_dropped(
            f"{field}: {len(unfit)} of {len(table.rows)} rows of {source!r} lack a problem or an "
            f"answer and were dropped: {_examples(unfit)}"
        )
    kept = [problem for problem in problems if filters.keep(problem)]
    if not kept:
        raise ValueError(
            f"{field}: no problem of {source!r} is left ({len(problems)} rows read, filters "
            f"{filters}; the file has levels [{_found(problem.level for problem in problems)}] and "
            f"subjects [{_found(problem.subject for problem in problems)}]). Drop or widen the filters."
        )
    return kept


@dataclass(frozen=True)
class _Filters:
    """data.levels and data.subjects; None keeps all."""

    levels: Sequence[int] | None
    subjects: Sequence[str] | None

    def keep(self, problem: Problem) -> bool:
        return (self.levels is None or problem.level in self.levels) and (
            self.subjects is None or problem.subject in self.subjects
        )

    def __str__(self) -> str:
        named = {"data.levels": self.levels, "data.subjects": self.subjects}
        return ", ".join(f"{name}={list(v)}" for name, v in named.items() if v is not None)


def _found(values: Iterable[Any]) -> str:
    return _listed(list(map(repr, sorted({value for value in values if value is not None}))))


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _check_columns(
    table: Table, columns: ColumnNames, filters: _Filters, source: str, field: str
) -> None:
    """Refuse a mapping to columns that no row has.

    The default names of id, level and subject may be absent, unless a filter needs them.
    """
    if not table.columns:
        return  # every row is defective, which is said with the rows
    defaults = ColumnNames()
    required = {
        "problem": True,
        "answer": True,
        "id": columns.id != defaults.id,
        "level": columns.level != defaults.level or filters.levels is not None,
        "subject": columns.subject != defaults.subject or filters.subjects is not None,
    }
    for filter_, values, name in (
        ("levels", filters.levels, columns.level),
        ("subjects", filters.subjects, columns.subject),
    ):
        if values is not None and name is None:
            role = filter_.removesuffix("s")
            raise ValueError(
                f"data.columns.{role}: null leaves data.{filter_} nothing to look at. Name the "
                "column, or drop the filter."
            )
    for role, is_required in required.items():
        name = getattr(columns, role)
        if is_required and name and not _has_column(table, name):
            raise ValueError(
                f"{field}: {source!r} has no column {name!r}. Its columns are "
                f"{_columns(table.columns)}; name the right one in data.columns.{role}."
            )


def _has_column(table: Table, name: str) -> bool:
    return name in table.columns or name.split(".")[0] in table.columns


def _columns(names: Sequence[str]) -> str:
    quoted = [name if name and name == name.strip() else repr(name) for name in sorted(names)]
    return _listed(quoted)


@dataclass(frozen=True)
class _UnfitRow:
    """A row that is no problem, and why."""

    place: str
    error: Unfit

    @property
    def blank(self) -> bool:
        return isinstance(self.error, Blank)

    def __str__(self) -> str:
        column = "" if self.error.column is None else f"{self.error.column!r} "
        return f"{self.place}: {column}{self.error}"


def _problems(
    table: Table, columns: ColumnNames, filters: _Filters
) -> tuple[list[Problem], list[_UnfitRow]]:
    """One problem a row, and the rows that are none."""
    problems: list[Problem] = []
    unfit: list[_UnfitRow] = []
    for number, row in enumerate(table.rows):
        try:
            problems.append(_problem(row, columns, filters, number))
        except Unfit as error:
            unfit.append(_UnfitRow(row.place, error))
    return problems, unfit


def _examples(unfit: Sequence[_UnfitRow]) -> str:
    """The first few rows with place and reason, and how many more there are."""
    shown = "; ".join(map(str, unfit[:EXAMPLES]))
    rest = len(unfit) - EXAMPLES
    return shown + (f"; and {rest} more" if rest > 0 else "")


def _remedies(unfit: Sequence[_UnfitRow]) -> str:
    return " ".join(dict.fromkeys(row.error.remedy for row in unfit[:EXAMPLES]))


def _problem(row: Row, columns: ColumnNames, filters: _Filters, number: int) -> Problem:
    if row.defect is not None:
        raise Unfit(row.defect, "Mend or drop the rows.")
    text, messages = _cell(row.values, columns.problem, prompt_parts)
    return Problem(
        problem_id=_optional(row.values, columns.id, lambda value: id_text(value, number)),
        problem=text,
        answer=_cell(row.values, columns.answer, answer_text),
        level=_filtered(row.values, columns.level, level_number, filters.levels),
        subject=_filtered(row.values, columns.subject, subject_text, filters.subjects),
        messages=messages,
    )


def _cell(row: Mapping[str, Any], name: str, convert: Callable[[Any], T]) -> T:
    try:
        value = lookup(row, name)
    except KeyError:
        raise Unfit(
            f"has no column {name!r}",
            "Name a column that every row has, or drop the rows.",
        ) from None
    try:
        return convert(value)
    except Unfit as error:
        error.column = name
        raise


def _optional(row: Mapping[str, Any], name: str | None, convert: Callable[[Any], T]) -> T:
    """The converted value, or that of null where the row has no such column."""
    try:
        value = lookup(row, name) if name else None
    except KeyError:
        value = None
    try:
        return convert(value)
    except Unfit as error:
        error.column = name
        raise


def _filtered(
    row: Mapping[str, Any],
    name: str | None,
    convert: Callable[[Any], T | None],
    wanted: Sequence[Any] | None,
) -> T | None:
    """A value that serves a filter only: without the filter an unfit one is as good as none."""
    try:
        return _optional(row, name, convert)
    except Unfit:
        if wanted is None:
            return None
        raise
