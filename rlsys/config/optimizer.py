"""AdamW, and the schedule of its learning rate."""

from typing import Annotated, Literal

from pydantic import Field

from rlsys.config.section import Section

DecayRate = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW, and the schedule of its learning rate."""

    learning_rate: float = Field(
        default=1e-5, gt=0, le=1, description="Peak learning rate of AdamW, at most 1."
    )
    betas: tuple[DecayRate, DecayRate] = Field(
        default=(0.9, 0.95),
        description="AdamW's decay rates of the first and second moments, each in [0, 1).",
    )
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="Decoupled weight decay of the weight matrices; norms and biases have none. "
        "0: off.",
    )
    max_grad_norm: float = Field(
        default=1.0,
        ge=0,
        description="Clip the global gradient norm to this value. 0: no clipping.",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="Learning rate after the warm-up: constant, or linear or cosine decay, which "
        "reaches minimum_ratio after the last step.",
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="Training steps of linear warm-up from 0. 0: no warm-up."
    )
    minimum_ratio: float = Field(
        default=0.0, ge=0, le=1, description="Final learning rate, as a fraction of the peak."
    )
