"""The rollout engines: one module for each name in `rlsys.config.engines.ENGINES`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from workers.generation.engines.engine import RolloutEngine

if TYPE_CHECKING:
    from rlsys.config import RunConfig


def make_engine(config: RunConfig, model_directory: str) -> RolloutEngine:
    """Build the engine that `generation.engine` names; only its own module is imported."""
    from rlsys.config.engines import ENGINES

    name = config.generation.engine
    assert name in ENGINES, "checked by the config"
    module = importlib.import_module(f"workers.generation.engines.{name}")
    return module.ENGINE(config, model_directory)
