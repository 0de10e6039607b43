"""Problems from files and Hugging Face data sets. Every row is checked, and reported if unfit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rlsys.config import ColumnNames, DataConfig
from rlsys.config.offline import ExampleDataConfig
from rlsys.data.problems import Problem
from rlsys.data.row_files import Row, Table, read_table
from rlsys.data.row_values import (
    Blank,
    Unfit,
    answer_text,
    filter_key,
    id_text,
    lookup,
    metadata_value,
    prompt_parts,
)

T = TypeVar("T")
EXAMPLES = 5  # unfit rows that a message shows
SHOWN_NAMES = 20  # columns or values that a message lists


def read_problems(
    source: str,
    *,
    columns: ColumnNames,
    field: str,
    where: Mapping[str, Sequence[Any]] | None = None,
    metadata: bool = False,
    on_dropped: Callable[[str], None] | None = None,
) -> list[Problem]:
    """Return the problems of a file or a hub data set (`id` or `id:split`), filtered.

    Args:
        field: name of the config field that holds `source`, for messages.
        where: values by column, as in `data.where`.
        metadata: give each problem the columns that are not its text, answer or id.
        on_dropped: called with a notice of the rows that were dropped because they lack a problem
            or an answer. None: such rows are refused like every row that cannot be used.

    Raises:
        ValueError: the source is missing or unreadable, lacks a column, has rows that cannot be
            used, or holds nothing after the filters.
    """
    filters = RowFilters.of(where or {})
    used = [columns.problem, columns.answer, *filters.wanted]
    if columns.id:
        used.append(columns.id)
    table = read_table(source, needed=None if metadata else used, field=field)
    _check_columns(table, columns, filters, source, field)

    def convert(row: Row, number: int) -> Problem:
        return _problem(row, columns, number, metadata=metadata)

    reading = RowReading(
        source=source, field=field, kind="problem", lacking="a problem or an answer"
    )
    return reading.convert(table, convert, filters, on_dropped)


@dataclass(frozen=True, kw_only=True)
class RowReading:
    """The conversion of the rows of one source, with the words for messages about it."""

    source: str
    field: str  # name of the config field that holds `source`
    kind: str  # "problem": what a row becomes
    lacking: str  # "a problem or an answer": what a blank row lacks

    def convert(
        self,
        table: Table,
        convert: Callable[[Row, int], T],
        filters: RowFilters,
        on_dropped: Callable[[str], None] | None,
    ) -> list[T]:
        """Return what the rows become that pass the filters; `convert` gets row and number.

        Args:
            on_dropped: called with a notice of the rows that were dropped because they are blank.
                None: such rows are refused like every row that cannot be used.

        Raises:
            ValueError: rows that cannot be used, or nothing is left after the filters.
        """
        rows, unfit = _converted(table, convert, filters)
        refused = [row for row in unfit if not (on_dropped and rows and row.blank)]
        if refused:
            raise ValueError(
                f"{self.field}: {len(refused)} of {len(table.rows)} rows of {self.source!r} cannot "
                f"be used: {_examples(refused)}. {_remedies(refused)}"
            )

        if unfit and on_dropped:
            on_dropped(
                f"{self.field}: {len(unfit)} of {len(table.rows)} rows of {self.source!r} lack "
                f"{self.lacking} and were dropped: {_examples(unfit)}"
            )

        kept = [item for item, keys in rows if filters.keep(keys)]
        if not kept:
            found = filters.found([keys for _, keys in rows])
            raise ValueError(
                f"data.where: {filters} leaves no {self.kind} of {self.field} {self.source!r} "
                f"({len(rows)} rows read; {found}). Drop or widen the filters."
            )
        return kept


@dataclass(frozen=True)
class RowFilters:
    """The filters of `data.where`: the keys to keep (see `filter_key`) and the values as given."""

    wanted: Mapping[str, frozenset[str | None]]
    given: Mapping[str, Sequence[Any]]

    @staticmethod
    def of(where: Mapping[str, Sequence[Any]]) -> RowFilters:
        keys = {name: frozenset(map(filter_key, values)) for name, values in where.items()}
        return RowFilters(keys, where)

    def keys_of(self, row: Mapping[str, Any]) -> tuple[str | None, ...]:
        """Return the row's key in each column of the filters.

        Raises:
            Unfit: a value that cannot be compared.
        """
        return tuple(optional_cell(row, name, filter_key) for name in self.wanted)

    def keep(self, keys: Sequence[str | None]) -> bool:
        """Return whether a row passes all filters; a missing value passes none."""
        columns = zip(keys, self.wanted.values(), strict=True)
        return all(key is not None and key in wanted for key, wanted in columns)

    def found(self, rows: Sequence[Sequence[str | None]]) -> str:
        """Return text that lists the values of the filters' columns."""
        columns = zip(self.wanted, zip(*rows, strict=True), strict=True)
        return "; ".join(f"{name} holds {_distinct(keys)}" for name, keys in columns)

    def __str__(self) -> str:
        columns = (f"{name}: [{_listed([*map(str, v)])}]" for name, v in self.given.items())
        return f"{{{', '.join(columns)}}}"


def _distinct(keys: Iterable[str | None]) -> str:
    found = sorted({key for key in keys if key is not None}, key=lambda key: (len(key), key))
    return _listed(found) if found else "nothing"


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _check_columns(
    table: Table, columns: ColumnNames, filters: RowFilters, source: str, field: str
) -> None:
    """Refuse a mapping to columns that no row has.

    The default name of id may be absent.
    """
    if not table.columns:
        return  # every row is defective, which is reported with the rows
    required = {
        "data.columns.problem": columns.problem,
        "data.columns.answer": columns.answer,
        "data.columns.id": columns.id if columns.id != ColumnNames().id else None,
    }
    for role, name in required.items():
        if name and not has_column(table, name):
            raise ValueError(
                f"{field}: {source!r} has no column {name!r}. Its columns are "
                f"{listed_columns(table.columns)}; name the right one in {role}."
            )
    check_filtered_columns(table, filters, source, field)


def check_filtered_columns(table: Table, filters: RowFilters, source: str, field: str) -> None:
    """Refuse filters by columns that no row has.

    Raises:
        ValueError: the message names the columns that there are.
    """
    for name in filters.wanted:
        if not has_column(table, name):
            raise ValueError(
                f"data.where: {field} {source!r} has no column {name!r}. Its columns are "
                f"{listed_columns(table.columns)}."
            )


def has_column(table: Table, name: str) -> bool:
    """Return whether some row has a column, or the object in which it is a field."""
    return name in table.columns or name.split(".")[0] in table.columns


def listed_columns(names: Sequence[str]) -> str:
    """Return text that lists the columns of a table."""
    quoted = [name if name and name == name.strip() else repr(name) for name in sorted(names)]
    return _listed(quoted)


@dataclass(frozen=True)
class _UnfitRow:
    """A row that cannot become a problem, and the reason."""

    place: str
    error: Unfit

    @property
    def blank(self) -> bool:
        return isinstance(self.error, Blank)

    def __str__(self) -> str:
        column = "" if self.error.column is None else f"{self.error.column!r} "
        return f"{self.place}: {column}{self.error}"


def _converted(
    table: Table, convert: Callable[[Row, int], T], filters: RowFilters
) -> tuple[list[tuple[T, tuple[str | None, ...]]], list[_UnfitRow]]:
    """Return what each row becomes with its keys in the filters' columns, and the unfit rows."""
    items: list[tuple[T, tuple[str | None, ...]]] = []
    unfit: list[_UnfitRow] = []
    for number, row in enumerate(table.rows):
        try:
            if row.defect is not None:
                raise Unfit(row.defect, "Fix or drop the rows.")
            items.append((convert(row, number), filters.keys_of(row.values)))
        except Unfit as error:
            unfit.append(_UnfitRow(row.place, error))
    return items, unfit


def _examples(unfit: Sequence[_UnfitRow]) -> str:
    """Return the first few rows with place and reason, and the number of the rest."""
    shown = "; ".join(map(str, unfit[:EXAMPLES]))
    rest = len(unfit) - EXAMPLES
    return shown + (f"; and {rest} more" if rest > 0 else "")


def _remedies(unfit: Sequence[_UnfitRow]) -> str:
    return " ".join(dict.fromkeys(row.error.remedy for row in unfit[:EXAMPLES]))


def _problem(row: Row, columns: ColumnNames, number: int, *, metadata: bool) -> Problem:
    text, messages = required_cell(row.values, columns.problem, prompt_parts)
    return Problem(
        problem_id=optional_cell(row.values, columns.id, lambda value: id_text(value, number)),
        problem=text,
        answer=required_cell(row.values, columns.answer, answer_text),
        messages=messages,
        metadata=_metadata(row.values, columns) if metadata else {},
    )


def _metadata(row: Mapping[str, Any], columns: ColumnNames) -> dict[str, Any]:
    """Return the columns that have no role, and those of which a role reads one field."""
    roles = {columns.problem, columns.answer, columns.id}
    return {name: metadata_value(value) for name, value in row.items() if name not in roles}


def required_cell(row: Mapping[str, Any], name: str, convert: Callable[[Any], T]) -> T:
    """Convert the value of a column.

    Raises:
        Unfit: the row has no such column, or `convert` refuses its value.
    """
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


def optional_cell(row: Mapping[str, Any], name: str | None, convert: Callable[[Any], T]) -> T:
    """Convert the value of a column, or null where the row has no such column."""
    try:
        value = lookup(row, name) if name else None
    except KeyError:
        value = None
    try:
        return convert(value)
    except Unfit as error:
        error.column = name
        raise


def check_sources(data: DataConfig | ExampleDataConfig, noun: str) -> None:
    """Refuse sources that contradict each other; `noun` names what they hold.

    Raises:
        ValueError: names field, value and remedy.
    """
    if data.train in ("auto", "off"):
        raise ValueError(
            f"data.train: {data.train!r} is a value of data.eval. Give a source of {noun}."
        )
    if data.eval == "synthetic" and data.train != "synthetic":
        raise ValueError(
            f"data.eval: 'synthetic' {noun} do not measure data.train {data.train!r}. Set it to "
            f"auto to hold {noun} out of data.train, to a file, or to off."
        )
    reads_no_file = data.train == "synthetic" and data.eval in ("auto", "off", "synthetic")
    if reads_no_file and data.where:
        raise ValueError(
            f"data.where: {', '.join(data.where)} filters the rows of files, and data.train is "
            "synthetic. Choose its levels with data.synthetic.levels."
        )
