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
from rlsys.config.generation import EngineConfig, GenerationConfig
from rlsys.config.model import Dtype, LoraConfig, ModelConfig
from rlsys.config.model_role import ModelRoleConfig, ReferenceConfig, TrainableRoleConfig
from rlsys.config.optimizer import OptimizerConfig
from rlsys.config.policy import PolicyConfig
from rlsys.config.ptx import PtxConfig, TextColumns
from rlsys.config.reward import RewardConfig, RewardFunctionConfig
from rlsys.config.root import ClusterConfig, RootConfig, RunSection
from rlsys.config.run import RunConfig
from rlsys.config.section import Section
from rlsys.config.sync import SyncConfig
from rlsys.config.trainer import (
    CheckpointConfig,
    EvaluationConfig,
    EvaluationSchedule,
    LoopConfig,
    TrainerConfig,
)

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
    "EngineConfig",
    "EntropyConfig",
    "EvaluationConfig",
    "EvaluationSchedule",
    "GenerationConfig",
    "KLConfig",
    "LoopConfig",
    "LoraConfig",
    "ModelConfig",
    "ModelRoleConfig",
    "ObjectiveConfig",
    "OldKLConfig",
    "OptimizerConfig",
    "OverlongConfig",
    "PolicyConfig",
    "PtxConfig",
    "ReferenceConfig",
    "RewardConfig",
    "RewardFunctionConfig",
    "RolloutCorrectionConfig",
    "RootConfig",
    "RunConfig",
    "RunSection",
    "Section",
    "SyncConfig",
    "SyntheticConfig",
    "TextColumns",
    "TrainableRoleConfig",
    "TrainerConfig",
]
