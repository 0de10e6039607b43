"""The whole configuration of a run."""

from typing import Any, Self

from pydantic import Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from rlsys.config.algorithm import AlgorithmConfig
from rlsys.config.critic import CriticConfig
from rlsys.config.cross_field_rules import contradictions
from rlsys.config.data import DataConfig
from rlsys.config.diagnostics import DiagnosticsConfig
from rlsys.config.generation import GenerationConfig
from rlsys.config.model import ModelConfig
from rlsys.config.model_role import ModelRoleConfig, ReferenceConfig, TrainableRoleConfig
from rlsys.config.policy import PolicyConfig
from rlsys.config.presets import preset_called
from rlsys.config.ptx import PtxConfig
from rlsys.config.reward import RewardConfig
from rlsys.config.root import CONTRADICTIONS_LATER, ClusterConfig, RootConfig, RunSection
from rlsys.config.sync import SyncConfig
from rlsys.config.trainer import TrainerConfig


class RunConfig(RootConfig):
    """Everything that one run depends on.

    Recipes return one; a YAML file and flags change fields of it.
    """

    recipe: str = Field(
        default="grpo_math",
        description="Name of the recipe, used in the name of the run's directory.",
    )
    preset: str | None = Field(
        default=None,
        description="Published algorithm to start from. It replaces the recipe's section "
        "algorithm, policy.num_mini_batches and critic.enabled; --config and the other flags "
        "change fields of it. null: the recipe's own.",
    )
    plugins: tuple[str, ...] = Field(
        default=(),
        description="Python modules that register estimators, objectives or reward functions; "
        "imported in every process.",
    )
    model: ModelConfig = Field(default=ModelConfig(), description="The language model.")
    data: DataConfig = Field(default=DataConfig(), description="Problems and prompts.")
    generation: GenerationConfig = Field(
        default=GenerationConfig(), description="The generation group."
    )
    sync: SyncConfig = Field(
        default=SyncConfig(),
        description="The transfer of the trained weights to the generation workers.",
    )
    policy: PolicyConfig = Field(default=PolicyConfig(), description="The policy.")
    critic: CriticConfig = Field(default=CriticConfig(), description="The value function.")
    reference: ReferenceConfig = Field(
        default=ReferenceConfig(), description="The frozen reference."
    )
    algorithm: AlgorithmConfig = Field(
        default=AlgorithmConfig(), description="The mathematics of an update."
    )
    ptx: PtxConfig = Field(default=PtxConfig(), description="Pretraining text in the update.")
    reward: RewardConfig = Field(default=RewardConfig(), description="Rewards.")
    trainer: TrainerConfig = Field(default=TrainerConfig(), description="The training loop.")
    diagnostics: DiagnosticsConfig = Field(
        default=DiagnosticsConfig(), description="Measurements that are off by default."
    )
    cluster: ClusterConfig = Field(default=ClusterConfig(), description="The Ray cluster.")
    run: RunSection = Field(default=RunSection(), description="The run's directory and display.")

    def reference_role(self) -> ModelRoleConfig:
        """Return the role of the reference: the policy's, with the fields that `reference` sets."""
        own = self.reference.model_dump(exclude={"path"}, exclude_none=True)
        common = self.policy.model_dump(include=set(ModelRoleConfig.model_fields))
        return ModelRoleConfig.model_validate(common | own)

    @property
    def is_own_reference(self) -> bool:
        """Whether the policy without its adapters is the reference, so that there is no other."""
        return self.model.lora.rank > 0 and self.reference.path is None

    def critic_role(self) -> TrainableRoleConfig:
        """Return the role of the critic: the policy's, with the fields that `critic` sets."""
        fields = set(TrainableRoleConfig.model_fields)
        own = self.critic.model_dump(include=fields, exclude_none=True)
        common = self.policy.model_dump(include=fields)
        return TrainableRoleConfig.model_validate(common | own)

    def critic_passes(self) -> tuple[int, int]:
        """Return the critic's epochs and mini-batches per epoch."""
        critic, policy = self.critic, self.policy
        return critic.epochs or policy.epochs, critic.num_mini_batches or policy.num_mini_batches

    @property
    def policy_steps(self) -> int:
        """The training steps in which the policy is trained: those after the critic's warm-up."""
        warmup = self.critic.warmup_steps if self.critic.enabled else 0
        return self.trainer.steps - warmup

    @property
    def evaluates_text(self) -> bool:
        """Whether evaluations measure the loss of held-out text."""
        return self.ptx.holds_out and self.trainer.evaluation.every > 0

    @property
    def reads_text(self) -> bool:
        """Whether the run trains on text or measures its loss."""
        return self.ptx.trains or self.evaluates_text

    @property
    def longest_text(self) -> int:
        """The positions that the longest piece of text takes; 0 where no text is read."""
        return self.ptx.max_tokens + 1 if self.reads_text else 0

    @model_validator(mode="before")
    @classmethod
    def _starts_from_preset(cls, data: Any) -> Any:
        """Fill the sections that the preset decides and the caller does not give."""
        name = data.get("preset") if isinstance(data, dict) else None
        if not name or not isinstance(name, str):
            return data
        try:
            preset = preset_called(name)
        except ValueError as error:
            raise PydanticCustomError("mistakes", "{lines}", {"lines": str(error)}) from None
        policy = PolicyConfig(num_mini_batches=preset.num_mini_batches)
        critic = CriticConfig(enabled=preset.critic)
        return {"algorithm": preset.algorithm, "policy": policy, "critic": critic} | data

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> Self:
        """Refuse fields that contradict each other, with one line for each contradiction."""
        if info.context == CONTRADICTIONS_LATER:
            return self
        lines = contradictions(self)
        if lines:
            raise PydanticCustomError("mistakes", "{lines}", {"lines": "\n".join(lines)})
        return self
