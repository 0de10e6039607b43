"""Problems from Parquet, JSONL and Hugging Face data sets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlsys.config import ColumnNames
from rlsys.data.problems import Problem


def read_problems(
    source: str,
    *,
    columns: ColumnNames,
    field: str,
    levels: Sequence[int] | None = None,
    subjects: Sequence[str] | None = None,
) -> list[Problem]:
    """The problems of a .parquet or .jsonl file or a hub data set (`id` or `id:split`), filtered.

    Args:
        field: name of the config field that holds `source`, for messages.

    Raises:
        ValueError: the source is missing or unreadable, lacks a column, or holds nothing after the filters.
    """
    rows, present = _read_rows(source, field)
    for role, name in (("problem", columns.problem), ("answer", columns.answer)):
        if name not in present:
            raise ValueError(
                f"{field}: {source!r} has no column {name!r}. Its columns are {', '.join(sorted(present))}; name the right one in "
                f"data.columns.{role}."
            )
    problems = [_problem(row, columns, i) for i, row in enumerate(rows)]
    kept = [
        problem
        for problem in problems
        if (levels is None or problem.level in levels)
        and (subjects is None or problem.subject in subjects)
    ]
    if not kept:
        filters = [f"data.levels={list(levels)}"] if levels is not None else []
        filters += [f"data.subjects={list(subjects)}"] if subjects is not None else []
        found_levels = sorted({p.level for p in problems if p.level is not None})
        found_subjects = sorted({p.subject for p in problems if p.subject is not None})
        raise ValueError(
            f"{field}: no problem of {source!r} is left ({len(problems)} rows read"
            + (
                f", filters {', '.join(filters)}; the file has levels {found_levels} and subjects {found_subjects}"
                if filters
                else ""
            )
            + "). Give a file with rows, or widen the filters."
        )
    return kept


def _problem(row: Mapping[str, Any], columns: ColumnNames, number: int) -> Problem:
    identity = row.get(columns.id) if columns.id else None
    level = row.get(columns.level) if columns.level else None
    subject = row.get(columns.subject) if columns.subject else None
    return Problem(
        problem_id=str(number if identity is None else identity),
        problem=str(row[columns.problem]),
        answer=str(row[columns.answer]),
        level=_level_number(level),
        subject=None if subject is None else str(subject),
    )


def _level_number(level: object) -> int | None:
    """MATH writes levels as 3 or as "Level 3", and "Level ?" where there is none."""
    digits = "".join(filter(str.isdigit, str(level)))
    return int(digits) if digits else None


def _read_rows(source: str, field: str) -> tuple[list[dict[str, Any]], set[str]]:
    path = Path(source).expanduser()
    if path.suffix in (".parquet", ".jsonl"):
        if not path.is_file():
            raise ValueError(
                f"{field}: no such file {source!r}. Give the path of an existing .parquet or .jsonl file."
            )
        rows = (
            _read_parquet(path, field)
            if path.suffix == ".parquet"
            else list(_read_jsonl(path, field))
        )
    elif path.exists() or source.startswith((".", "/", "~")):
        raise ValueError(
            f"{field}: {source!r} is neither a .parquet nor a .jsonl file. Convert it, or give a data set id."
        )
    else:
        rows = _read_hub(source, field)
    return rows, set(rows[0]) if rows else set()


def _read_parquet(path: Path, field: str) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"{field}: cannot read {str(path)!r} as Parquet ({error}). Write the file again."
        ) from error


def _read_jsonl(path: Path, field: str) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{field}: cannot read {str(path)!r} ({error}). Give a readable UTF-8 file."
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{field}: line {number} of {str(path)!r} is no JSON ({error}). Mend or drop the line."
            ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{field}: line {number} of {str(path)!r} is no JSON object. Write one object a line."
            )
        yield row


def _read_hub(source: str, field: str) -> list[dict[str, Any]]:
    from datasets import load_dataset

    name, _, split = source.partition(":")
    try:
        return [dict(row) for row in load_dataset(name, split=split or "train")]  # pyright: ignore[reportCallIssue, reportArgumentType]
    except (
        Exception
    ) as error:  # the library raises many kinds, all of which mean that it is not to be had
        raise ValueError(
            f"{field}: the data set {source!r} could not be loaded ({type(error).__name__}: {error}). Check the id and split "
            "(owner/name:split) and the network, or give a local .parquet or .jsonl file."
        ) from error
