"""The rollout engines: one module for each name in `rlsys.config.engines.ENGINES`."""

from __future__ import annotations

import importlib

from rlsys.config import RunConfig
from rlsys.config.engines import ENGINES
from workers.generation.engines.engine import RolloutEngine


def make_engine(config: RunConfig, model_directory: str) -> RolloutEngine:
    """Build the engine that `generation.engine` names; only its own module is imported."""
    name = config.generation.engine
    assert name in ENGINES, "checked by the config"
    module = importlib.import_module(f"workers.generation.engines.{name}")
    return module.ENGINE(config, model_directory)
