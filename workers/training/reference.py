"""The frozen reference model of the KL terms."""

from __future__ import annotations

from rlsys.config import RunConfig
from workers.training.rank_worker import CausalLMWorker


class ReferenceWorker(CausalLMWorker):
    """One rank of the frozen reference."""

    role = "reference"

    def __init__(self, config: RunConfig, model_directory: str, rank: int, world_size: int) -> None:
        super().__init__(config, config.reference_role(), model_directory, rank, world_size)
