"""Where prompts come from and how they are worded."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, field_validator, model_validator

from rlsys.config.section import Section

FilterValue = str | bool | int | FiniteFloat


class ColumnNames(Section):
    """Names of the columns of a data file; the defaults fit MATH. A dot leads into an object."""

    problem: str = Field(
        default="problem",
        description="Column of the problem's text or chat messages.",
    )
    answer: str = Field(
        default="answer",
        description="Column of the ground-truth answer; a.b is the field b of the objects in a.",
    )
    id: str | None = Field(
        default="id",
        description="Column of a unique id. null, or absent from the file: the row number.",
    )

    @model_validator(mode="before")
    @classmethod
    def _columns_of_filters(cls, value: Any) -> Any:
        """Refuse the columns of former filters; their former defaults, in old files, say nothing."""
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
    """The embedded generator of integer problems, used where train or eval is `synthetic`."""

    levels: tuple[Annotated[int, Field(ge=1, le=5)], ...] = Field(
        default=(1,),
        description="Difficulty levels to draw from, each 1 (one-digit) to 5.",
        min_length=1,
    )
    train_size: int = Field(
        default=1000,
        ge=1,
        description="Training problems to generate (problems, at most what the levels hold).",
    )
    eval_size: int = Field(
        default=64,
        ge=1,
        description="Held-out problems to generate; never equal to a training problem.",
    )


class DataConfig(Section):
    train: str = Field(
        default="synthetic",
        description="`synthetic`, a .parquet, .jsonl, .json, .csv or .tsv file, or a Hugging Face "
        "data set id[:split].",
    )
    eval: str = Field(
        default="auto",
        description="Held-out problems: `auto` (synthetic for synthetic train, else data.held_out "
        "of train, which is then not trained on), `off` or null (no evaluation), or a source as "
        "for train.",
    )
    held_out: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Part of the different problems of a train file that eval `auto` holds out, "
        "by a hash of their text; at most eval_limit problems.",
    )
    columns: ColumnNames = Field(default=ColumnNames(), description="Column names of the files.")
    synthetic: SyntheticConfig = Field(
        default=SyntheticConfig(), description="The embedded problem generator."
    )
    template: str = Field(
        default="few_shot",
        description="How a problem becomes a prompt: chat_boxed (the model's chat template with a boxed-answer instruction), "
        "chat (the chat template alone), "
        "r1_zero (<think> and <answer> tags), few_shot (worked examples), or the path of a Jinja file that uses {{ problem }}.",
    )
    chat: bool | None = Field(
        default=None,
        description="Wrap prompts in the model's chat template. null: as the template declares "
        "(chat and chat_boxed do).",
    )
    where: dict[str, tuple[FilterValue, ...]] = Field(
        default={},
        description="Keep the rows of train and eval whose columns have one of these values: "
        '{level: [1, 2], subject: Algebra}. Numbers are equal by value (3, 3.0, "3"). '
        "null: the column is not looked at.",
    )
    blank_rows: Literal["drop", "refuse"] = Field(
        default="drop",
        description="What to do with rows whose problem or answer is null or blank: drop them (counted and "
        "reported), or refuse to start. Rows that hold anything else than a problem are always refused.",
    )
    max_prompt_tokens: int = Field(default=512, ge=1, description="Longest prompt, in tokens.")
    overlong_prompts: Literal["drop", "refuse"] = Field(
        default="drop",
        description="What to do with longer prompts: drop them (counted and reported), or refuse to start.",
    )
    shuffle: bool = Field(
        default=True,
        description="Shuffle the training problems anew each epoch, from the run's seed.",
    )
    eval_limit: int = Field(
        default=500,
        ge=0,
        description="Held-out problems used for evaluation (the first ones). 0: all.",
    )

    @field_validator("eval", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        """YAML reads off as false."""
        return "off" if value is None or value is False else value

    @field_validator("where", mode="before")
    @classmethod
    def _lists_of_values(cls, value: Any) -> Any:
        """One value is a list of one; columns inside an object may be nested."""
        if value is None:
            return {}
        if not isinstance(value, dict):
            return value
        return {
            name: wanted if isinstance(wanted, list | tuple) else (wanted,)
            for name, wanted in _dotted(value)
            if wanted is not None
        }

    @field_validator("where")
    @classmethod
    def _some_value(
        cls, value: dict[str, tuple[FilterValue, ...]]
    ) -> dict[str, tuple[FilterValue, ...]]:
        for name, wanted in value.items():
            if not wanted:
                raise ValueError(f"{name} has an empty list, which no row fits: name some values")
        return value


def _dotted(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
