"""AdamW and its schedule."""

from typing import Annotated, Literal

from pydantic import Field

from rlsys.config.section import Section

DecayRate = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    learning_rate: float = Field(
        default=1e-5, gt=0, le=1, description="Peak learning rate of AdamW, at most 1."
    )
    betas: tuple[DecayRate, DecayRate] = Field(
        default=(0.9, 0.95),
        description="AdamW's decay rates of first and second moments, each from 0 to below 1.",
    )
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="Decoupled weight decay of matrices; norms and biases have none. 0: none.",
    )
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="Clip the global gradient norm to this. 0: do not clip."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="Learning rate after warm-up: constant, or falling to minimum_ratio, which is reached after the last step.",
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="Trainer steps of linear warm-up from 0. 0: none."
    )
    minimum_ratio: float = Field(
        default=0.0, ge=0, le=1, description="Final learning rate as a share of the peak."
    )
