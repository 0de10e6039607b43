"""Configuration: frozen pydantic models, one file a section. Imports neither torch nor NumPy."""

from rlsys.config.algorithm import (
    AdvantageConfig,
    Aggregation,
    AlgorithmConfig,
    AuxiliaryConfig,
    DynamicSamplingConfig,
    EntropyConfig,
    KLConfig,
    ObjectiveConfig,
    OldKLConfig,
    OverlongConfig,
    RolloutCorrectionConfig,
)
from rlsys.config.critic import CriticConfig
from rlsys.config.data import ColumnNames, DataConfig, SyntheticConfig
from rlsys.config.diagnostics import DiagnosticsConfig
from rlsys.config.errors import ConfigError
from rlsys.config.generation import GenerationConfig
from rlsys.config.model import Dtype, ModelConfig
from rlsys.config.model_role import ModelRoleConfig, ReferenceConfig, TrainableRoleConfig
from rlsys.config.optimizer import OptimizerConfig
from rlsys.config.policy import PolicyConfig
from rlsys.config.reward import RewardConfig, RewardFunctionConfig
from rlsys.config.run import ClusterConfig, RunConfig, RunSection
from rlsys.config.section import Section
from rlsys.config.trainer import CheckpointConfig, EvaluationConfig, TrainerConfig

__all__ = [
    "AdvantageConfig",
    "Aggregation",
    "AlgorithmConfig",
    "AuxiliaryConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "ColumnNames",
    "ConfigError",
    "CriticConfig",
    "DataConfig",
    "DiagnosticsConfig",
    "Dtype",
    "DynamicSamplingConfig",
    "EntropyConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "KLConfig",
    "ModelConfig",
    "ModelRoleConfig",
    "ObjectiveConfig",
    "OldKLConfig",
    "OptimizerConfig",
    "OverlongConfig",
    "PolicyConfig",
    "ReferenceConfig",
    "RewardConfig",
    "RewardFunctionConfig",
    "RolloutCorrectionConfig",
    "RunConfig",
    "RunSection",
    "Section",
    "SyntheticConfig",
    "TrainableRoleConfig",
    "TrainerConfig",
]
