"""Rewards: which functions, how weighted, and the pool that runs them."""

from typing import Any

from pydantic import Field

from rlsys.config.section import Section


class RewardFunctionConfig(Section):
    name: str = Field(description="A registered reward function.")
    weight: float = Field(default=1.0, description="Its weight in the sum.")
    parameters: dict[str, Any] = Field(
        default={}, description="Keyword parameters of the function, checked against its signature."
    )


class RewardConfig(Section):
    functions: tuple[RewardFunctionConfig, ...] = Field(
        default=(RewardFunctionConfig(name="math"),),
        min_length=1,
        description="Reward functions, summed with their weights. The first decides accuracy (a score of at least 0.5 is right).",
    )
    processes: int = Field(default=1, ge=1, description="Processes of the reward pool.")
    memory_gb: float = Field(
        default=1.0,
        ge=0,
        description="How much a process may grow while it scores, in GiB; beyond it the answer gets 0. 0 sets no limit.",
    )
    timeout_s: float = Field(
        default=2.0,
        gt=0,
        description="Wall-clock limit of one answer, in seconds; beyond it the process is replaced and the reward is 0.",
    )
