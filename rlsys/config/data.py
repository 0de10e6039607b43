"""Where prompts come from and how they are worded."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from rlsys.config.section import Section


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
    level: str | None = Field(
        default="level", description="Column of the difficulty level, for filters. null: none."
    )
    subject: str | None = Field(
        default="subject", description="Column of the subject, for filters. null: none."
    )


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
    levels: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="Keep rows of these levels only. null: all."
    )
    subjects: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="Keep rows of these subjects only. null: all."
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
