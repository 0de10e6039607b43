"""The whole configuration of a run."""

import os

from pydantic import Field

from rlsys.config.algorithm import AlgorithmConfig
from rlsys.config.data import DataConfig
from rlsys.config.diagnostics import DiagnosticsConfig
from rlsys.config.generation import GenerationConfig
from rlsys.config.model import ModelConfig
from rlsys.config.policy import PolicyConfig
from rlsys.config.reward import RewardConfig
from rlsys.config.section import Section
from rlsys.config.trainer import TrainerConfig


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
    plugins: tuple[str, ...] = Field(
        default=(),
        description="Importable modules that register estimators, objectives or rewards; loaded in every process.",
    )
    model: ModelConfig = Field(default=ModelConfig(), description="The language model.")
    data: DataConfig = Field(default=DataConfig(), description="Prompts and their wording.")
    generation: GenerationConfig = Field(
        default=GenerationConfig(), description="The generation group."
    )
    policy: PolicyConfig = Field(
        default=PolicyConfig(), description="The actor and reference group."
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
