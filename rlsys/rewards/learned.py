"""The reward that is a model: the score of a reward model, computed by ranks of its own.

It is configured as any reward function. Its value does not come from the reward pool: a group of
ranks scores each group of responses as soon as it is complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rlsys.config import ModelRoleConfig, RewardFunctionConfig, RunConfig
from rlsys.rewards.registry import (
    available_reward_functions,
    register_reward_function,
    reward_hooks,
)

REWARD_MODEL = "model"
PATH_FIELD = "reward.functions.parameters.path"
ROLE_PARAMETERS = ("ranks", "compute_dtype", "microbatch_tokens")
DTYPES = ("float32", "bfloat16")


def _validate(
    *, path: str, ranks: int | None, compute_dtype: str | None, microbatch_tokens: int | None
) -> None:
    if not path:
        raise ValueError(f"{PATH_FIELD}: it is empty. Give the directory of a reward model.")
    if compute_dtype is not None and compute_dtype not in DTYPES:
        raise ValueError(
            f"reward.functions.parameters.compute_dtype: {compute_dtype!r} is not accepted. Choose "
            f"one of {', '.join(DTYPES)}, or null for that of the policy."
        )
    for name, value in (("ranks", ranks), ("microbatch_tokens", microbatch_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"reward.functions.parameters.{name}: {value} must be at least 1.")


@register_reward_function("model", validate=_validate)  # --help reads it from here
def model_reward(
    completion: str,
    ground_truth: str,
    *,
    path: str,
    ranks: int | None = None,
    compute_dtype: Literal["float32", "bfloat16"] | None = None,
    microbatch_tokens: int | None = None,
) -> float:
    """Return the score of a reward model for prompt and response, minus its mean reward.

    The score is the value of the model's head at the end token of the response. A response without
    one, since it was cut off or ended with a stop string, gets one for scoring.

    `path` names a reward model with one label, as a directory, hub id or run of reward_model_math.
    `ranks` is their number, each beside a rank of the policy, or null for policy.ranks.
    `compute_dtype` is the precision of weights and arithmetic, or null for that of the policy.
    `microbatch_tokens` limits the tokens in one forward pass, null as the policy does.

    Raises:
        RuntimeError: always, since ranks of the model compute it.
    """
    raise RuntimeError(
        f"the reward {REWARD_MODEL!r} is computed by the ranks of the reward model, not here"
    )


def reward_model_of(functions: Sequence[RewardFunctionConfig]) -> RewardFunctionConfig | None:
    """Return the reward that is a model, or None where all are functions."""
    return next((function for function in functions if function.name == REWARD_MODEL), None)


def pool_functions(
    functions: Sequence[RewardFunctionConfig],
) -> tuple[RewardFunctionConfig, ...]:
    """Return the rewards that the reward pool computes."""
    return tuple(function for function in functions if function.name != REWARD_MODEL)


def has_accuracy(functions: Sequence[RewardFunctionConfig]) -> bool:
    """Return whether responses are right or wrong: the first function decides, a model does not."""
    return functions[0].name != REWARD_MODEL


def reward_model_role(config: RunConfig) -> ModelRoleConfig:
    """Return the role of the reward model: the policy's, with the parameters that are given."""
    function = reward_model_of(config.reward.functions)
    assert function is not None, "the run has no reward model"
    own = {
        name: function.parameters[name]
        for name in ROLE_PARAMETERS
        if function.parameters.get(name) is not None
    }
    common = config.policy.model_dump(include=set(ModelRoleConfig.model_fields))
    return ModelRoleConfig.model_validate(common | own)


def refuse_rewards_of_training(functions: Sequence[RewardFunctionConfig], command: str) -> None:
    """Refuse rewards that only RL training reads: a model, and rewards of nothing but steps.

    Raises:
        ValueError: there is one.
    """
    if reward_model_of(functions) is not None:
        raise ValueError(
            f"reward.functions: {REWARD_MODEL!r} is a reward of RL training, and {command} starts "
            "no reward model. Leave it out, and name functions such as math."
        )
    known = set(available_reward_functions())
    for function in functions:
        if function.name in known and not reward_hooks(function.name).scores:
            raise ValueError(
                f"reward.functions: {function.name!r} rewards steps alone, which RL training "
                f"reads, and {command} reads the rewards of whole responses. Leave it out."
            )
