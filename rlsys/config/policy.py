"""The policy: the model that is trained, and how it goes over a batch."""

from pydantic import Field

from rlsys.config.model_role import TrainableRoleConfig


class PolicyConfig(TrainableRoleConfig):
    """The model that is trained."""

    epochs: int = Field(default=1, ge=1, description="Passes over each rollout batch.")
    num_mini_batches: int = Field(
        default=1,
        ge=1,
        description="Optimizer steps an epoch; prompts_per_step must be divisible by it (whole groups stay together).",
    )
