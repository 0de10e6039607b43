"""The frozen reference model of the KL terms."""

from __future__ import annotations

from workers.training.rank_worker import CausalLMWorker


class ReferenceWorker(CausalLMWorker):
    """One rank of the frozen reference."""

    role = "reference"
