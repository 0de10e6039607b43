"""The whole configuration of a run."""

import os
from typing import Any, Self

from pydantic import Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from rlsys.config.algorithm import AlgorithmConfig
from rlsys.config.cross_field_rules import contradictions
from rlsys.config.data import DataConfig
from rlsys.config.diagnostics import DiagnosticsConfig
from rlsys.config.generation import GenerationConfig
from rlsys.config.model import ModelConfig
from rlsys.config.model_role import ModelRoleConfig, ReferenceConfig
from rlsys.config.policy import PolicyConfig
from rlsys.config.presets import preset_called
from rlsys.config.reward import RewardConfig
from rlsys.config.section import Section
from rlsys.config.trainer import TrainerConfig

# The validation context of the command line, which reports contradictions with all other mistakes.
CONTRADICTIONS_LATER = "contradictions are reported later"


class RunSection(Section):
    directory: str | None = Field(
        default=None, description="Where the run is written. null: runs/<recipe>-<date>-<time>."
    )
    progress: bool = Field(
        default=True, description="Live display on a terminal; plain lines elsewhere or when false."
    )
    note: str | None = Field(
        default=None, description="A remark that is printed when the run starts. null: none."
    )


class ClusterConfig(Section):
    address: str | None = Field(
        default=None,
        description="Address of a Ray cluster: host:port, ray://host:port, or auto for the one on this machine. local: start Ray here. "
        "null: RAY_ADDRESS where set, else start Ray here.",
    )
    object_store_gib: float = Field(
        default=1.0,
        ge=0.1,
        description="Object store of a Ray started here, in GiB; at least 0.1.",
    )

    @property
    def joined_address(self) -> str | None:
        """The cluster that a run joins: `address`, else RAY_ADDRESS; None where Ray is started here, which `local` asks for."""
        address = self.address or os.environ.get("RAY_ADDRESS")
        return None if address in (None, "", "local") else address


class RunConfig(Section):
    """Everything that one run depends on. Recipes return one; a YAML file and flags change fields of it."""

    recipe: str = Field(
        default="grpo_math",
        description="Name of the recipe, for the run's directory and its records.",
    )
    preset: str | None = Field(
        default=None,
        description="Published algorithm to start from, before --config and the other flags: it "
        "replaces the section algorithm, and policy.num_mini_batches. null: the recipe's own.",
    )
    plugins: tuple[str, ...] = Field(
        default=(),
        description="Importable modules that register estimators, objectives or rewards; loaded in every process.",
    )
    model: ModelConfig = Field(default=ModelConfig(), description="The language model.")
    data: DataConfig = Field(default=DataConfig(), description="Prompts and their wording.")
    generation: GenerationConfig = Field(
        default=GenerationConfig(), description="The generation group."
    )
    policy: PolicyConfig = Field(default=PolicyConfig(), description="The policy.")
    reference: ReferenceConfig = Field(
        default=ReferenceConfig(), description="The frozen reference."
    )
    algorithm: AlgorithmConfig = Field(
        default=AlgorithmConfig(), description="The mathematics of an update."
    )
    reward: RewardConfig = Field(default=RewardConfig(), description="Rewards.")
    trainer: TrainerConfig = Field(default=TrainerConfig(), description="The loop.")
    diagnostics: DiagnosticsConfig = Field(
        default=DiagnosticsConfig(), description="Measurements on request."
    )
    cluster: ClusterConfig = Field(default=ClusterConfig(), description="The Ray cluster.")
    run: RunSection = Field(default=RunSection(), description="The run's directory and display.")

    def reference_role(self) -> ModelRoleConfig:
        """Return how the reference is distributed and run: as the policy, but for what `reference` says."""
        own = self.reference.model_dump(exclude={"path"}, exclude_none=True)
        common = self.policy.model_dump(include=set(ModelRoleConfig.model_fields))
        return ModelRoleConfig.model_validate(common | own)

    @model_validator(mode="before")
    @classmethod
    def _starts_from_preset(cls, data: Any) -> Any:
        """Fill what the preset decides and the caller does not give; a whole configuration stays."""
        name = data.get("preset") if isinstance(data, dict) else None
        if not name or not isinstance(name, str):
            return data
        try:
            preset = preset_called(name)
        except ValueError as error:
            raise PydanticCustomError("mistakes", "{lines}", {"lines": str(error)}) from None
        policy = PolicyConfig(num_mini_batches=preset.num_mini_batches)
        return {"algorithm": preset.algorithm, "policy": policy} | data

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> Self:
        """Refuse fields that contradict each other: all contradictions in one error, a line each."""
        lines = [] if info.context == CONTRADICTIONS_LATER else contradictions(self)
        if lines:
            raise PydanticCustomError("mistakes", "{lines}", {"lines": "\n".join(lines)})
        return self
