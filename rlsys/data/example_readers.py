"""Examples from files and Hugging Face data sets: the usual public shapes are recognized.

    demonstrations   messages | prompt + completion | problem + solution | text
    rankings         prompt + chosen + rejected | chosen + rejected as whole conversations |
                     prompt + responses (+ ranks)
    step labels      prompt + completions + labels

A prompt is text, or chat messages that end with the user's; a response is text, or one message of
the assistant. A column that is named in `data.columns` goes before the usual names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlsys.config import ConfigError, TextColumns
from rlsys.config.offline import ExampleColumns, RankingColumns, StepColumns
from rlsys.data.examples import Demonstration, PlainText, Ranking, StepLabels
from rlsys.data.problems import ChatMessage
from rlsys.data.readers import (
    RowFilters,
    RowReading,
    check_filtered_columns,
    has_column,
    listed_columns,
    optional_cell,
    required_cell,
)
from rlsys.data.row_files import Row, Table, read_table
from rlsys.data.row_values import (
    Blank,
    Unfit,
    answer_text,
    conversation,
    describe,
    id_text,
    is_missing,
    prompt_parts,
    response_text,
)

Columns = ExampleColumns | RankingColumns | StepColumns | TextColumns
Role = Literal[
    "messages",
    "prompt",
    "response",
    "text",
    "chosen",
    "rejected",
    "responses",
    "ranks",
    "steps",
    "labels",
    "answer",
    "id",
]

USUAL_NAMES: Mapping[Role, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt": ("prompt", "problem", "question"),
    "response": ("completion", "response", "solution"),
    "text": ("text",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "responses": ("responses",),
    "ranks": ("ranks",),
    "steps": ("completions", "steps"),
    "labels": ("labels",),
    "answer": ("answer",),
    "id": ("id",),
}


@dataclass(frozen=True, kw_only=True)
class ExampleSource:
    """A source of examples and how to read it."""

    source: str
    field: str  # name of the config field that holds `source`, for messages
    where: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    # Called with a notice of the rows that were dropped because they are blank. None: such rows
    # are refused.
    on_dropped: Callable[[str], None] | None = None
    columns_field: str = "data.columns"  # the config section of column names, for messages


def read_demonstrations(
    source: ExampleSource, columns: ExampleColumns
) -> list[Demonstration] | list[PlainText]:
    """Return the demonstrations of a file or a hub data set, or its plain texts.

    Raises:
        ValueError: the source is unreadable, its columns are of no known shape, or a row cannot be
            used.
    """
    reading = _Reading.of(source, columns, ("messages", "prompt", "response", "text", "answer"))
    reading.refuse_incomplete(
        shapes=(("messages",), ("prompt", "response"), ("text",)),
        wanted="messages, prompt and completion, problem and solution, or text",
        flags="--data.columns.prompt and --data.columns.response, --data.columns.messages or "
        "--data.columns.text",
    )
    names = reading.names
    if "messages" in names:
        return reading.rows(_conversation_row, "demonstration", "messages")
    if "response" in names and "prompt" in names:
        return reading.rows(_prompt_and_response, "demonstration", "a prompt or a response")
    return reading.rows(_plain_text, "text", "a text")


def read_texts(source: ExampleSource, columns: TextColumns) -> list[PlainText]:
    """Return the plain texts of a file or a hub data set.

    Raises:
        ValueError: the source is unreadable, has no column of text, or a row cannot be used.
    """
    reading = _Reading.of(source, columns, ("text",))
    reading.refuse_incomplete(
        shapes=(("text",),), wanted="text", flags=f"--{source.columns_field}.text"
    )
    return reading.rows(_plain_text, "text", "a text")


def read_rankings(source: ExampleSource, columns: RankingColumns) -> list[Ranking]:
    """Return the rankings of a file or a hub data set.

    Raises:
        ValueError: the source is unreadable, its columns are of no known shape, or a row cannot be
            used, such as one with fewer than two responses.
    """
    roles: tuple[Role, ...] = ("prompt", "chosen", "rejected", "responses", "ranks", "answer")
    reading = _Reading.of(source, columns, roles)
    reading.refuse_incomplete(
        shapes=(("prompt", "responses"), ("chosen", "rejected")),
        wanted="chosen and rejected, with a prompt or as whole conversations, or prompt and "
        "responses",
        flags="--data.columns.chosen and --data.columns.rejected, or --data.columns.responses",
    )
    names = reading.names
    if "responses" in names:
        return reading.rows(_ranked_responses, "ranking", "a prompt or responses")
    if "prompt" in names:
        return reading.rows(_pair, "ranking", "a prompt or a response")
    return reading.rows(_pair_of_conversations, "ranking", "a conversation")


def read_step_labels(source: ExampleSource, columns: StepColumns) -> list[StepLabels]:
    """Return the responses in steps of a file or a hub data set, with the label of each step.

    Raises:
        ValueError: the source is unreadable, its columns are of no known shape, or a row cannot be
            used, such as one with more steps than labels.
    """
    reading = _Reading.of(source, columns, ("prompt", "steps", "labels", "answer"))
    reading.refuse_incomplete(
        shapes=(("prompt", "steps", "labels"),),
        wanted="prompt, completions and labels",
        flags="--data.columns.prompt, --data.columns.steps and --data.columns.labels",
    )
    return reading.rows(_labelled_steps, "response in steps", "a prompt or a step")


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """A table, and the column of each role that it has."""

    source: ExampleSource
    table: Table
    names: Mapping[str, str]

    @staticmethod
    def of(source: ExampleSource, columns: Columns, roles: Sequence[Role]) -> _Reading:
        """Read the table and find the columns.

        Raises:
            ValueError: a column that `columns` names is missing.
        """
        table = read_table(source.source, needed=None, field=source.field)
        names: dict[str, str] = {}
        for role in (*roles, "id"):
            name = _column_of(role, columns, table, source)
            if name is not None:
                names[role] = name
        return _Reading(source=source, table=table, names=names)

    def refuse_incomplete(
        self, *, shapes: Sequence[Sequence[Role]], wanted: str, flags: str
    ) -> None:
        """Refuse a table whose columns make up none of the `shapes`.

        Raises:
            ConfigError: the message names the columns found and the flags that map them.
        """
        if not self.table.columns:
            return  # every row is defective, which is reported with the rows
        if any(all(role in self.names for role in shape) for shape in shapes):
            return
        raise ConfigError(
            f"{self.source.field}: {self.source.source!r} has the columns "
            f"{listed_columns(self.table.columns)}, which are not those of a known shape "
            f"({wanted}). Name the right ones with {flags}."
        )

    def rows(self, convert: Callable[[_ExampleRow], Any], kind: str, lacking: str) -> list[Any]:
        """Return what `convert` makes of each row that passes the filters."""
        source = self.source
        filters = RowFilters.of(source.where)
        check_filtered_columns(self.table, filters, source.source, source.field)
        reading = RowReading(source=source.source, field=source.field, kind=kind, lacking=lacking)

        def converted(row: Row, number: int) -> Any:
            return convert(_ExampleRow(row.values, number, self.names))

        return reading.convert(self.table, converted, filters, source.on_dropped)


def _column_of(role: Role, columns: Columns, table: Table, source: ExampleSource) -> str | None:
    """Return the column of a role: the one that is configured, else one with a usual name."""
    configured = getattr(columns, role)
    if configured is not None and has_column(table, configured):
        return configured
    if configured is None:
        return next((name for name in USUAL_NAMES[role] if has_column(table, name)), None)
    if role == "id" and configured in USUAL_NAMES["id"]:
        return None
    if not table.columns:
        return configured
    raise ConfigError(
        f"{source.columns_field}.{role}: {source.field} {source.source!r} has no column "
        f"{configured!r}. Its columns are {listed_columns(table.columns)}."
    )


@dataclass(frozen=True)
class _ExampleRow:
    """One row, read by role."""

    values: Mapping[str, Any]
    number: int
    names: Mapping[str, str]  # columns by role

    def get(self, role: Role, convert: Callable[[Any], Any]) -> Any:
        """Return the converted value of a role.

        Raises:
            Unfit: the row lacks it, or it cannot be converted.
        """
        return required_cell(self.values, self.names[role], convert)

    @property
    def example_id(self) -> str:
        name = self.names.get("id")
        return optional_cell(self.values, name, lambda value: id_text(value, self.number))

    @property
    def answer(self) -> str | None:
        name = self.names.get("answer")
        return optional_cell(
            self.values, name, lambda value: None if is_missing(value) else answer_text(value)
        )


def _conversation_row(row: _ExampleRow) -> Demonstration:
    messages = row.get("messages", conversation)
    return Demonstration(example_id=row.example_id, messages=messages, answer=None)


def _prompt_and_response(row: _ExampleRow) -> Demonstration:
    prompt, context = row.get("prompt", prompt_parts)
    return Demonstration(
        example_id=row.example_id,
        prompt=prompt,
        context=context,
        response=row.get("response", response_text),
        answer=row.answer,
    )


def _plain_text(row: _ExampleRow) -> PlainText:
    return PlainText(example_id=row.example_id, text=row.get("text", response_text))


def _pair(row: _ExampleRow) -> Ranking:
    prompt, context = row.get("prompt", prompt_parts)
    responses = (row.get("chosen", response_text), row.get("rejected", response_text))
    return _ranking(row, prompt, context, responses, (0, 1))


def _pair_of_conversations(row: _ExampleRow) -> Ranking:
    """Split two conversations into their common turns and the last turn of each."""
    chosen, rejected = row.get("chosen", conversation), row.get("rejected", conversation)
    context = chosen[:-1]
    if context != rejected[:-1]:
        raise Unfit(
            "differs from the rejected conversation before the last turn",
            "Both must have the same turns but for the assistant's last.",
        )
    if not context or context[-1].role not in ("user", "system", "developer"):
        raise Unfit(
            "has no turn of the user before the assistant's last",
            "Write whole conversations, or a prompt column.",
        )
    responses = (chosen[-1].content, rejected[-1].content)
    return _ranking(row, context[-1].content, context, responses, (0, 1))


def _ranked_responses(row: _ExampleRow) -> Ranking:
    prompt, context = row.get("prompt", prompt_parts)
    responses = row.get("responses", _texts)
    ranks = tuple(range(len(responses)))
    if "ranks" in row.names:
        ranks = row.get("ranks", _ranks)
    if len(ranks) != len(responses):
        raise Unfit(
            f"has {len(ranks)} ranks for {len(responses)} responses",
            "Give each response a rank.",
        )
    return _ranking(row, prompt, context, responses, ranks)


def _ranking(
    row: _ExampleRow,
    prompt: str,
    context: tuple[ChatMessage, ...],
    responses: tuple[str, ...],
    ranks: tuple[int, ...],
) -> Ranking:
    return Ranking(
        example_id=row.example_id,
        prompt=prompt,
        context=context,
        responses=responses,
        ranks=ranks,
        answer=row.answer,
    )


def _labelled_steps(row: _ExampleRow) -> StepLabels:
    prompt, context = row.get("prompt", prompt_parts)
    steps = row.get("steps", _steps)
    labels = row.get("labels", _labels)
    if len(labels) != len(steps):
        raise Unfit(f"has {len(labels)} labels for {len(steps)} steps", "Give each step a label.")
    return StepLabels(
        example_id=row.example_id,
        prompt=prompt,
        context=context,
        steps=steps,
        labels=labels,
        answer=row.answer,
    )


def _steps(value: Any) -> tuple[str, ...]:
    if is_missing(value):
        raise Blank(value)
    if not isinstance(value, list | tuple) or not value:
        raise Unfit(f"is {describe(value)}", "Write a list of the texts of the steps.")
    return tuple(map(response_text, value))


def _labels(value: Any) -> tuple[bool, ...]:
    if is_missing(value):
        raise Blank(value)
    if not isinstance(value, list | tuple):
        raise Unfit(f"is {describe(value)}", "Write a list of labels, true for a right step.")
    for item in value:
        # False == 0 and True == 1, in whatever form a file holds them.
        if not isinstance(item, bool | int | float) or item not in (0, 1):
            raise Unfit(
                f"holds {describe(item)}",
                "A label is true or 1 for a right step, and false or 0 for a wrong one. Of ratings "
                "from -1 to 1, as in PRM800K, make labels first.",
            )
    return tuple(map(bool, value))


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise Unfit(f"is {describe(value)}", "Write a list of at least two responses.")
    if len(value) < 2:
        raise Unfit(
            f"has {len(value)} response{'s' * (len(value) != 1)}",
            "A ranking needs at least two responses: drop the rows.",
        )
    return tuple(map(response_text, value))


def _ranks(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise Unfit(f"is {describe(value)}", "Write a list of ranks, 0 for the best response.")
    ranks = []
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int) or item < 0:
            raise Unfit(
                f"holds {describe(item)}", "Ranks are whole numbers from 0, the best response."
            )
        ranks.append(item)
    return tuple(ranks)
