"""Data: sources of problems, filters, and prompt templates."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, field_validator, model_validator

from rlsys.config.section import Section

FilterValue = str | bool | int | FiniteFloat


class ColumnNames(Section):
    """Names of the columns of a data file; the defaults fit MATH. `a.b` is field b of object a."""

    problem: str = Field(
        default="problem",
        description="Column of the problem: its text, or chat messages.",
    )
    answer: str = Field(
        default="answer",
        description="Column of the ground-truth answer. a.b: field b of the objects in column a.",
    )
    id: str | None = Field(
        default="id",
        description="Column of a unique id. null, or not in the file: the row number is the id.",
    )

    @model_validator(mode="before")
    @classmethod
    def _columns_of_filters(cls, value: Any) -> Any:
        """Refuse the columns of former filters, and ignore their former defaults in old files."""
        if isinstance(value, dict):
            value = dict(value)
            for role in ("level", "subject"):
                name = value.pop(role, None)
                if name not in (None, role):
                    raise ValueError(
                        f"{role} is no longer a role: data.where names the column itself. Write "
                        f'--data.where "{{{name}: [...]}}"'
                    )
        return value


class SyntheticConfig(Section):
    """Embedded generator of arithmetic problems, used where train or eval is `synthetic`."""

    levels: tuple[Annotated[int, Field(ge=1, le=5)], ...] = Field(
        default=(1,),
        description="Difficulty levels of the generated problems, from 1 (one-digit numbers) to 5.",
        min_length=1,
    )
    train_size: int = Field(
        default=1000,
        ge=1,
        description="Training problems to generate; fewer where the levels have no more.",
    )
    eval_size: int = Field(
        default=64,
        ge=1,
        description="Held-out problems to generate; none of them is a training problem.",
    )


class DataConfig(Section):
    """Sources of training and held-out problems, and their prompts."""

    train: str = Field(
        default="synthetic",
        description="Training problems: `synthetic` (generated), a .parquet, .jsonl, .json, .csv "
        "or .tsv file, or a Hugging Face data set as id or id:split.",
    )
    eval: str = Field(
        default="auto",
        description="Held-out problems: a source as for train; `off` or null (no evaluation); or "
        "`auto` (generated where train is synthetic, else the fraction data.held_out of train, "
        "which is then not trained on).",
    )
    held_out: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="With eval `auto`: the fraction of the distinct problems of train to hold out, "
        "chosen by a hash of their text; at most eval_limit problems.",
    )
    columns: ColumnNames = Field(default=ColumnNames(), description="Column names of the files.")
    synthetic: SyntheticConfig = Field(
        default=SyntheticConfig(), description="The embedded problem generator."
    )
    template: str = Field(
        default="few_shot",
        description="Prompt template: chat_boxed (the model's chat template, with the instruction "
        "to box the answer), chat (the chat template only), r1_zero (<think> and <answer> tags), "
        "few_shot (worked examples), or the path of a Jinja file that uses {{ problem }}.",
    )
    chat: bool | None = Field(
        default=None,
        description="Wrap prompts in the model's chat template. null: only with the templates chat "
        "and chat_boxed, or where a Jinja file declares it.",
    )
    where: dict[str, tuple[FilterValue, ...]] = Field(
        default={},
        description="Keep only the rows of train and eval whose columns have one of these values: "
        '{level: [1, 2], subject: Algebra}. Numbers are compared by value (3, 3.0 and "3" are '
        "equal). null as a value: do not filter by that column.",
    )
    blank_rows: Literal["drop", "refuse"] = Field(
        default="drop",
        description="Rows whose problem or answer is null or blank. drop: leave them out, and "
        "report how many. refuse: do not start. Other invalid rows are always refused.",
    )
    max_prompt_tokens: int = Field(default=512, ge=1, description="Longest prompt, in tokens.")
    overlong_prompts: Literal["drop", "refuse"] = Field(
        default="drop",
        description="Prompts longer than max_prompt_tokens. drop: leave them out, and report how "
        "many. refuse: do not start.",
    )
    shuffle: bool = Field(
        default=True,
        description="Shuffle the training problems in each epoch, with trainer.seed.",
    )
    eval_limit: int = Field(
        default=500,
        ge=0,
        description="Evaluate on the first N held-out problems. 0: on all.",
    )

    @field_validator("eval", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        """Accept false and null, since YAML reads off as false."""
        return "off" if value is None or value is False else value

    @field_validator("where", mode="before")
    @classmethod
    def _lists_of_values(cls, value: Any) -> Any:
        """Read one value as a list of one, and nested columns as dotted names."""
        if value is None:
            return {}
        if not isinstance(value, dict):
            return value

        lists = {}
        for name, wanted in _dotted(value):
            if wanted is None:
                continue
            lists[name] = wanted if isinstance(wanted, list | tuple) else (wanted,)
        return lists

    @field_validator("where")
    @classmethod
    def _some_value(
        cls, value: dict[str, tuple[FilterValue, ...]]
    ) -> dict[str, tuple[FilterValue, ...]]:
        for name, wanted in value.items():
            if not wanted:
                raise ValueError(
                    f"{name} has an empty list, which no row matches: name some values"
                )
        return value


def _dotted(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
