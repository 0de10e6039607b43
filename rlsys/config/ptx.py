"""Pretraining text in the update of the policy (PPO-ptx), and its held-out loss."""

from typing import Any

from pydantic import Field, field_validator

from rlsys.config.section import Section


class TextColumns(Section):
    """Names of the columns of a data file."""

    text: str | None = Field(
        default=None, description="Column of the text, of which every token is learned. null: text."
    )
    id: str | None = Field(
        default="id",
        description="Column of a unique id. null, or not in the file: the row number is the id.",
    )


class PtxConfig(Section):
    """A language-modelling loss on text, added to the loss of any objective (PPO-ptx)."""

    coefficient: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the negative log-likelihood per token of text in the loss of each "
        "optimizer step of the policy (InstructGPT's gamma). 0: off.",
    )
    train: str = Field(
        default="off",
        description="Text to train on: `synthetic` (short generated passages), a .parquet, .jsonl, "
        ".json, .csv or .tsv file, or a Hugging Face data set as id or id:split; `off` or null: "
        "none. With coefficient 0 it is not trained on, and only decides what is held out.",
    )
    eval: str = Field(
        default="auto",
        description="Held-out text, whose loss each evaluation measures, also with coefficient 0: "
        "a source as for train; `off` or null; or `auto` (the fraction held_out of train, which is "
        "then not trained on). `synthetic` is a part of the passages that is never trained on.",
    )
    columns: TextColumns = Field(default=TextColumns(), description="Column names of the files.")
    held_out: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="With eval `auto` or `synthetic`: the fraction of the distinct texts to hold "
        "out, chosen by a hash of the text; at most eval_limit texts.",
    )
    eval_limit: int = Field(
        default=100, ge=0, description="Evaluate on the first N held-out texts. 0: on all."
    )
    examples_per_step: int = Field(
        default=32,
        ge=1,
        description="Texts per training step, divided among its optimizer steps (policy.epochs x "
        "policy.num_mini_batches), of which each must get one. A text longer than max_tokens "
        "counts as several.",
    )
    max_tokens: int = Field(
        default=512,
        ge=1,
        description="Learned tokens of a text at most. Longer texts are cut into pieces of that "
        "length, each of which is predicted from one token before it on.",
    )

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        """Accept false and null, since YAML reads off as false."""
        return "off" if value is None or value is False else value

    @property
    def trains(self) -> bool:
        """Whether text is trained on."""
        return self.coefficient > 0

    @property
    def holds_out(self) -> bool:
        """Whether there is held-out text."""
        return self.eval != "off" and not (self.eval == "auto" and self.train == "off")
