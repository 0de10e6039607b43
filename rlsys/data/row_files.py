"""Rows of Parquet, JSONL, JSON, CSV and TSV files and of Hugging Face data sets, with places.

    .parquet        rows counted from 0, as pandas and datasets count them
    .jsonl          one object a line; lines end with \\n or \\r\\n and nothing else
    .json           one array of objects, or JSONL under another name
    .csv .tsv       the first line names the columns; every cell is text
    owner/name      a data set of the Hugging Face hub, the split after a colon

Text is UTF-8, with or without a byte order mark. Numbers of JSON keep all their digits.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
LONGEST_CELL = 2**31 - 1  # the csv module stops at 131072 characters by default


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row: its values by column, or the defect for which it has none."""

    place: str  # "line 3" or "row 3"
    values: Mapping[str, Any]
    defect: str | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """All rows of one source."""

    rows: Sequence[Row]
    columns: tuple[str, ...]  # of all rows, in the order of their first appearance


def read_table(source: str, *, needed: Sequence[str] | None, field: str) -> Table:
    """Read the table of a file, or of a data set of the hub (`id` or `id:split`).

    Args:
        needed: columns that will be used; Parquet files are not read beyond them. None: all.
        field: name of the config field that holds `source`, for messages.

    Raises:
        ValueError: the source is missing, unreadable or empty, or names a column twice.
    """
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    reader = READERS.get(suffix)

    if path.is_dir():
        raise ValueError(
            f"{field}: {source!r} is a directory. Give one file ({_known_suffixes()}) in it."
        )
    if reader is None:
        if suffix in COMPRESSED:
            raise ValueError(f"{field}: {source!r} is compressed. Unpack it first.")
        if path.exists() or source.startswith((".", "/", "~")):
            raise ValueError(
                f"{field}: {source!r} is not one of {_known_suffixes()}. Convert it, or give a "
                "data set id."
            )
        table = _read_hub(source, needed, field)
    elif path.is_file():
        table = reader(path, needed, field)
    else:
        raise ValueError(
            f"{field}: no such file {source!r}. Give the path of an existing file "
            f"({_known_suffixes()})."
        )

    if not table.rows:
        raise ValueError(f"{field}: {source!r} holds no rows. Give a file with problems.")
    return table


def _known_suffixes() -> str:
    return ", ".join(READERS)


def _all_columns(rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for row in rows for name in row))


def _refuse_repeated(names: Iterable[str], path: Path, field: str) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{field}: {str(path)!r} has more than one column {repeated[0]!r}. Rename or drop all "
            "but one."
        )


# Text files


def _read_text(path: Path, field: str) -> str:
    """Return the text of a UTF-8 file without its byte order mark."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{field}: cannot read {str(path)!r} ({error.strerror}). Give a readable file."
        ) from error
    if content.startswith(UTF16_MARKS):
        raise ValueError(f"{field}: {str(path)!r} is UTF-16. Save it as UTF-8.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{field}: line {line} of {str(path)!r} is not UTF-8 "
            f"(byte 0x{content[error.start]:02x}). Save the file as UTF-8."
        ) from error
    if not text.strip():
        raise ValueError(f"{field}: {str(path)!r} is empty. Give a file with problems.")
    return text


class _RepeatedKeyError(ValueError):
    """A JSON object with a repeated key, of which json silently keeps the last value."""


def _parse_json(text: str) -> Any:
    """Parse a JSON text; numbers with a fraction or an exponent become Decimal."""
    return json.loads(text, parse_float=Decimal, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated = next(name for name, count in Counter(n for n, _ in pairs).items() if count > 1)
        raise _RepeatedKeyError(f"the key {repeated!r} twice in one object")
    return values


def _json_error(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error)


def _read_jsonl(path: Path, needed: Sequence[str] | None, field: str) -> Table:
    text = _read_text(path, field)
    table = _parse_jsonl(text)
    if text.lstrip().startswith("[") and all(row.defect for row in table.rows):
        raise ValueError(
            f"{field}: {str(path)!r} looks like one array, not one object per line. Name it .json."
        )
    return table


def _parse_jsonl(text: str) -> Table:
    """Parse one object per line. Only \\n ends a line: JSON text may contain U+2028 and U+0085."""
    lines = enumerate(text.split("\n"), start=1)
    rows = [_json_row(line, f"line {number}") for number, line in lines if line.strip(" \t\r")]
    return Table(rows=rows, columns=_all_columns(row.values for row in rows))


def _json_row(line: str, place: str) -> Row:
    try:
        value = _parse_json(line)
    except (ValueError, RecursionError) as error:
        return Row(place=place, values={}, defect=f"is not valid JSON ({_json_error(error)})")
    return _object_row(value, place)


def _object_row(value: Any, place: str) -> Row:
    if isinstance(value, dict):
        return Row(place=place, values=value)
    return Row(place=place, values={}, defect=f"is not a JSON object but {json_kind(value)}")


def json_kind(value: Any) -> str:
    """Return the name of a JSON value's kind, for messages."""
    if value is None:
        return "null"
    kinds = {str: "text", bool: "true or false", list: "an array", dict: "an object"}
    return kinds.get(type(value), "a number")


def _read_json(path: Path, needed: Sequence[str] | None, field: str) -> Table:
    """Read one array of objects; a file with one object per line is read as JSONL."""
    text = _read_text(path, field)
    try:
        value = _parse_json(text)
    except (ValueError, RecursionError) as error:
        table = _parse_jsonl(text)
        if not any(row.defect is None for row in table.rows):
            line = f"line {error.lineno}, " if isinstance(error, json.JSONDecodeError) else ""
            raise ValueError(
                f"{field}: {str(path)!r} is not valid JSON ({line}{_json_error(error)}). Write an "
                "array of objects."
            ) from error
        return table

    if not isinstance(value, list):
        raise ValueError(
            f"{field}: {str(path)!r} holds {json_kind(value)}, not an array of objects. Write "
            "[{...}, ...], or one object per line into a .jsonl file."
        )
    rows = [_object_row(item, f"row {number}") for number, item in enumerate(value)]
    return Table(rows=rows, columns=_all_columns(row.values for row in rows))


def _read_csv(path: Path, needed: Sequence[str] | None, field: str) -> Table:
    return _parse_csv(_read_text(path, field), ",", path, field)


def _read_tsv(path: Path, needed: Sequence[str] | None, field: str) -> Table:
    return _parse_csv(_read_text(path, field), "\t", path, field)


def _parse_csv(text: str, delimiter: str, path: Path, field: str) -> Table:
    """Parse cells by the header; a row's place is the line on which it begins."""
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = None
    rows = []

    # A quoted cell may hold line breaks, so the reader is at the last line of the row that it read.
    begin = 1
    try:
        for cells in reader:
            line, begin = begin, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                _refuse_repeated(header, path, field)
            else:
                rows.append(_csv_row(cells, header, f"line {line}"))
    except csv.Error as error:
        raise ValueError(
            f"{field}: the row that begins on line {begin} of {str(path)!r} cannot be read "
            f"({error}). Quote cells with commas, quotes or line breaks, and double the quotes "
            "inside."
        ) from error

    return Table(rows=rows, columns=tuple(header or ()))


def _csv_row(cells: Sequence[str], header: Sequence[str], place: str) -> Row:
    if len(cells) != len(header):
        defect = f"has {len(cells)} cells where the header has {len(header)}"
        return Row(place=place, values={}, defect=defect)
    return Row(place=place, values=dict(zip(header, cells, strict=True)))


# Arrow


def _read_parquet(path: Path, needed: Sequence[str] | None, field: str) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        _refuse_repeated(names, path, field)
        used = _used_columns(names, needed)
        table = file.read(columns=used)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"{field}: cannot read {str(path)!r} as Parquet ({error}). Write the file again."
        ) from error
    return Table(rows=list(_arrow_rows(table)), columns=tuple(names))


def _used_columns(names: Sequence[str], needed: Iterable[str] | None) -> list[str]:
    """Return the columns to read: `reward_model` for `reward_model.ground_truth`.

    A source with none of them has its first column read, so that its rows are counted.
    """
    if needed is None:
        return list(names)
    wanted = {part for name in needed for part in (name, name.split(".")[0])}
    return [name for name in names if name in wanted] or list(names)[:1]


def _arrow_rows(table: pyarrow.Table) -> Iterator[Row]:
    kinds = {name: table.schema.field(name).type for name in table.column_names}
    lists = [_python_values(table.column(name), kind) for name, kind in kinds.items()]
    for number in range(table.num_rows):
        values = {name: column[number] for name, column in zip(kinds, lists, strict=True)}
        yield Row(place=f"row {number}", values=values)


def _python_values(column: pyarrow.ChunkedArray, kind: pyarrow.DataType) -> list[Any]:
    values = column.to_pylist()
    if "float" in str(kind):  # float or halffloat, also inside a struct; not double
        return [_shortest(value, kind) for value in values]
    return values


def _shortest(value: Any, kind: pyarrow.DataType) -> Any:
    """Return a narrow float with its own shortest digits: 0.1, not 0.10000000149011612."""
    import pyarrow.types

    if value is None:
        return None
    if pyarrow.types.is_float32(kind):
        return Decimal(str(np.float32(value)))
    if pyarrow.types.is_float16(kind):
        return Decimal(str(np.float16(value)))
    if pyarrow.types.is_struct(kind):
        return {part.name: _shortest(value[part.name], part.type) for part in kind}
    return value


def _read_hub(source: str, needed: Sequence[str] | None, field: str) -> Table:
    from datasets import load_dataset

    name, _, split = source.partition(":")
    try:
        dataset: Any = load_dataset(name, split=split or "train")
        names = dataset.column_names
        used = dataset.select_columns(_used_columns(names, needed))
        rows = list(_arrow_rows(used.with_format("arrow")[:]))
    except Exception as error:  # of many kinds, which all mean that it cannot be loaded
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{field}: the data set {source!r} could not be loaded ({reason}). Check the id and "
            "split (owner/name:split) and the network, or give a local file "
            f"({_known_suffixes()})."
        ) from error
    return Table(rows=rows, columns=tuple(names))


READERS: Mapping[str, Callable[[Path, Sequence[str] | None, str], Table]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
}
