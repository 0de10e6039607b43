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
from rlsys.config.data import ColumnNames, DataConfig, SyntheticConfig
from rlsys.config.diagnostics import DiagnosticsConfig
from rlsys.config.generation import GenerationConfig
from rlsys.config.model import Dtype, ModelConfig
from rlsys.config.policy import OptimizerConfig, PolicyConfig
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
    "DataConfig",
    "DiagnosticsConfig",
    "Dtype",
    "DynamicSamplingConfig",
    "EntropyConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "KLConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OldKLConfig",
    "OptimizerConfig",
    "OverlongConfig",
    "PolicyConfig",
    "RewardConfig",
    "RewardFunctionConfig",
    "RolloutCorrectionConfig",
    "RunConfig",
    "RunSection",
    "Section",
    "SyntheticConfig",
    "TrainerConfig",
]
