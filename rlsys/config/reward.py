"""Rewards: which functions, how weighted, and the pool that runs them."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlsys.config.section import Section

LARGEST_WEIGHT = 1e30  # a weight, a score and their product are float32


class RewardFunctionConfig(Section):
    name: str = Field(description="A registered reward function.")
    weight: float = Field(
        default=1.0,
        ge=-LARGEST_WEIGHT,
        le=LARGEST_WEIGHT,
        allow_inf_nan=False,
        description="Its weight in the sum.",
    )
    parameters: dict[str, Any] = Field(
        default={},
        description="Keyword parameters of the function, checked against its signature. A max_tokens that is null follows generation.max_tokens.",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        """A name stands for the function with weight 1 and its default parameters."""
        return {"name": value} if isinstance(value, str) else value


class RewardConfig(Section):
    functions: tuple[RewardFunctionConfig, ...] = Field(
        default=(RewardFunctionConfig(name="math"),),
        description="Reward functions, summed with their weights: names (`math,format_boxed`), or mappings with name, weight and parameters. The first "
        "decides accuracy (a score of at least 0.5 is right).",
    )
    on_failure: Literal["zero", "drop"] = Field(
        default="zero",
        description="What a function that fails on a response leaves: zero, its term of the sum is 0 and the others count; or drop, the response has no "
        "reward, is left out of its group's statistics and is not trained on.",
    )
    processes: int = Field(default=1, ge=1, description="Processes of the reward pool.")
    memory_gb: float = Field(
        default=1.0,
        ge=0,
        description="How much a process may grow while it scores, in GiB; a function that needs more fails on that response. 0 sets no limit.",
    )
    timeout_s: float = Field(
        default=2.0,
        gt=0,
        description="Wall-clock limit of one function on one response, in seconds; beyond it the function has failed there and the process is replaced.",
    )

    @field_validator("functions", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        """One name, names with commas between them, and one mapping are lists too."""
        if isinstance(value, str):
            return [name.strip() for name in value.split(",") if name.strip()]
        return [value] if isinstance(value, dict) else value

    @field_validator("functions")
    @classmethod
    def _at_least_one(
        cls, value: tuple[RewardFunctionConfig, ...]
    ) -> tuple[RewardFunctionConfig, ...]:
        if not value:
            raise ValueError("name at least one reward function")
        return value
