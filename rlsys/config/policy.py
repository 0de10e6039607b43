"""The policy: the model that is trained, and its passes over a batch."""

from pydantic import Field

from rlsys.config.model_role import TrainableRoleConfig


class PolicyConfig(TrainableRoleConfig):
    """The model that is trained."""

    epochs: int = Field(default=1, ge=1, description="Passes over each rollout batch (PPO epochs).")
    num_mini_batches: int = Field(
        default=1,
        ge=1,
        description="Mini-batches of a rollout batch, one optimizer step each, per epoch. It must "
        "divide trainer.prompts_per_step, since the responses to a prompt stay together.",
    )
