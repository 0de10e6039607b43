"""Where prompts come from and how they are worded."""

from typing import Literal

from pydantic import Field

from rlsys.config.section import Section


class ColumnNames(Section):
    """Names of the columns of a data file; the defaults fit MATH."""

    problem: str = Field(default="problem", description="Column of the problem's text.")
    answer: str = Field(default="answer", description="Column of the ground-truth answer.")
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

    levels: tuple[int, ...] = Field(
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
        description="`synthetic`, a .parquet or .jsonl file, or a Hugging Face data set id[:split].",
    )
    eval: str = Field(
        default="synthetic", description="Held-out problems, in the same forms as train."
    )
    columns: ColumnNames = Field(default=ColumnNames(), description="Column names of the files.")
    synthetic: SyntheticConfig = Field(
        default=SyntheticConfig(), description="The embedded problem generator."
    )
    template: str = Field(
        default="few_shot",
        description="How a problem becomes a prompt: chat_boxed (the model's chat template with a boxed-answer instruction), "
        "r1_zero (<think> and <answer> tags), few_shot (worked examples), or the path of a Jinja file that uses {{ problem }}.",
    )
    levels: tuple[int, ...] | None = Field(
        default=None, description="Keep rows of these levels only. null: all."
    )
    subjects: tuple[str, ...] | None = Field(
        default=None, description="Keep rows of these subjects only. null: all."
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
