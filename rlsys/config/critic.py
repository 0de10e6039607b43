"""The critic: the value function of PPO."""

from pydantic import Field

from rlsys.config.model import Dtype
from rlsys.config.optimizer import OptimizerConfig
from rlsys.config.section import Section


class CriticConfig(Section):
    """The value function that estimators such as gae read. null: as the policy.

    It runs in processes of its own on the resources of the policy's ranks.
    """

    enabled: bool = Field(
        default=False,
        description="Train a critic and give its values to the advantage estimator, which must "
        "read them (gae).",
    )
    path: str | None = Field(
        default=None,
        description="Initial weights of the critic, in the same forms as model.path: a language "
        "model, which gets a new value head, or a reward model with one label. null: those of "
        "model.path.",
    )
    optimizer: OptimizerConfig = Field(
        default=OptimizerConfig(), description="AdamW of the critic, and its schedule."
    )
    warmup_steps: int = Field(
        default=0,
        ge=0,
        description="Training steps at the beginning in which the critic is trained and the policy "
        "is not. 0: both from the first step.",
    )
    value_clip: float | None = Field(
        default=0.2,
        gt=0,
        description="Limit of how far a value moves from the old one in a step before it loses its "
        "gradient (PPO2), in units of the returns. null: no limit.",
    )
    epochs: int | None = Field(
        default=None,
        ge=1,
        description="Passes of the critic over each rollout batch. null: policy.epochs.",
    )
    num_mini_batches: int | None = Field(
        default=None,
        ge=1,
        description="Mini-batches of a rollout batch, one step of the critic's optimizer each, per "
        "epoch. It must divide trainer.prompts_per_step. null: policy.num_mini_batches.",
    )
    ranks: int | None = Field(
        default=None,
        ge=1,
        description="Number of critic ranks, each on the resources of a policy rank; at most "
        "policy.ranks. null: policy.ranks.",
    )
    compute_dtype: Dtype | None = Field(
        default=None,
        description="Precision of forward and backward pass; master weights and the value head are "
        "always float32. null: as the policy.",
    )
    microbatch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Largest number of tokens in one forward pass of a critic rank. null: as the "
        "policy.",
    )
    gradient_checkpointing: bool | None = Field(
        default=None,
        description="Recompute activations in the backward pass, to save memory. null: as the "
        "policy.",
    )
    offload_optimizer: bool | None = Field(
        default=None,
        description="Keep master weights and optimizer state in host memory (GPU only). null: as "
        "the policy.",
    )
    frozen: tuple[str, ...] = Field(
        default=(),
        description="Parameters of the critic that are not trained, as in policy.frozen. []: all "
        "are trained.",
    )
