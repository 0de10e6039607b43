"""Rewards: the functions, their weights, and the pool of processes that runs them."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlsys.config.node_label import NodeLabel
from rlsys.config.section import Section

LARGEST_WEIGHT = 1e30  # a weight, a score and their product are float32


class RewardFunctionConfig(Section):
    """One reward function, with its weight and parameters."""

    name: str = Field(description="Reward function, by its registered name.")
    weight: float = Field(
        default=1.0,
        ge=-LARGEST_WEIGHT,
        le=LARGEST_WEIGHT,
        allow_inf_nan=False,
        description="Weight of the function in the sum.",
    )
    parameters: dict[str, Any] = Field(
        default={},
        description="Keyword parameters of the function. Where it has a max_tokens, null means "
        "generation.max_tokens.",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        """Read a name as the function with weight 1 and its default parameters."""
        return {"name": value} if isinstance(value, str) else value


class RewardConfig(Section):
    """Reward functions, and the processes that run them."""

    functions: tuple[RewardFunctionConfig, ...] = Field(
        default=(RewardFunctionConfig(name="math"),),
        description="Reward functions; the reward is their weighted sum. Names "
        "(`math,format_boxed`), or mappings with name, weight and parameters. `model` is a reward "
        "model, and `process_model` one of steps, with the parameter path. The first one decides "
        "accuracy: a response to which it gives at least 0.5 is correct; a model decides none.",
    )
    on_failure: Literal["zero", "drop"] = Field(
        default="zero",
        description="Responses on which a function fails. zero: its term of the sum is 0. drop: "
        "the response has no reward, does not count in the statistics of its group, and is not "
        "trained on.",
    )
    workers: int = Field(
        default=1,
        ge=1,
        description="Reward workers (Ray actors). They take turns with the groups of a step; on a "
        "joined cluster each is on another node, as far as there are nodes.",
    )
    node_label: NodeLabel | None = Field(
        default=None,
        description="Place the reward workers only on nodes of a joined cluster with this label, "
        "as name=value (`ray start --labels name=value`). null: on any node, the driver's first.",
    )
    processes: int = Field(
        default=1, ge=1, description="Processes of each reward worker that run reward functions."
    )
    memory_gb: float = Field(
        default=1.0,
        ge=0,
        description="Memory that each process may allocate while it scores, in GiB; a function "
        "that needs more fails on that response. 0: no limit.",
    )
    timeout_s: float = Field(
        default=2.0,
        gt=0,
        description="Time limit of a function for one response, in seconds; if it takes longer, it "
        "fails on that response, and its process is replaced.",
    )

    @field_validator("functions", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        """Read one name, names separated by commas, or one mapping as a list."""
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
