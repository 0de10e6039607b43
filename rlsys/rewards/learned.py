"""The rewards that are models: `model` scores a response, `process_model` each of its steps.

They are configured as any reward function. Their values do not come from the reward pool: a group
of ranks scores each group of responses as soon as it is complete.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from rlsys.config import ModelRoleConfig, RewardFunctionConfig, RunConfig
from rlsys.rewards.records import RewardResult
from rlsys.rewards.registry import (
    available_reward_functions,
    register_reward_function,
    reward_hooks,
)
from rlsys.rewards.steps import DELIMITER, Split, Step, split_steps

REWARD_MODEL = "model"
PROCESS_REWARD_MODEL = "process_model"
LEARNED = (REWARD_MODEL, PROCESS_REWARD_MODEL)
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


def _validate_steps(*, split: Split, delimiter: str, **role: Any) -> None:
    _validate(**role)
    if not delimiter:
        raise ValueError(
            "reward.functions.parameters.delimiter: '' does not separate anything. Give at least "
            "one character."
        )
    if split == "sentences" and delimiter != DELIMITER:
        raise ValueError(
            f"reward.functions.parameters.delimiter: {delimiter!r} is not read where split is "
            "sentences. Leave it out, or set split to delimiter."
        )


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


@register_reward_function(
    "process_model", validate=_validate_steps, steps=True, scores=False
)  # --help reads it from here
def process_model_reward(
    completion: str,
    ground_truth: str,
    *,
    path: str,
    split: Split = "delimiter",
    delimiter: str = DELIMITER,
    ranks: int | None = None,
    compute_dtype: Literal["float32", "bfloat16"] | None = None,
    microbatch_tokens: int | None = None,
) -> RewardResult:
    """Return for each step the probability that it is right, from a process reward model.

    The steps are those of `split_steps`. The reward of a step is the sigmoid of the value of the
    model's head at the token with the step's last character, where training reads it. Steps that
    end in one token are one. The score of the whole response is 0.

    `path` names a process reward model with one label, as a directory, hub id or run of
    process_reward_model_math. `ranks`, `compute_dtype` and `microbatch_tokens` are as in `model`.

    Raises:
        RuntimeError: always, since ranks of the model compute it.
    """
    raise RuntimeError(
        f"the reward {PROCESS_REWARD_MODEL!r} is computed by the ranks of the model, not here"
    )


def reward_model_of(functions: Sequence[RewardFunctionConfig]) -> RewardFunctionConfig | None:
    """Return the reward that is a model of either kind, or None where all are functions."""
    return next((function for function in functions if function.name in LEARNED), None)


def learned_contradictions(functions: Sequence[RewardFunctionConfig]) -> Iterator[str]:
    """Yield why the models among the rewards cannot be in one run."""
    names = [function.name for function in functions]
    if all(name in names for name in LEARNED):
        yield (
            f"reward.functions: {REWARD_MODEL!r} and {PROCESS_REWARD_MODEL!r} are both models, and "
            "a run has the ranks of one. Remove one of them."
        )


def scores_steps(config: RunConfig) -> bool:
    """Return whether the model among the rewards scores steps instead of responses."""
    function = reward_model_of(config.reward.functions)
    return function is not None and function.name == PROCESS_REWARD_MODEL


def longest_scored(config: RunConfig) -> int:
    """Return the tokens of the longest sequence that the model among the rewards reads.

    A model of whole responses reads an end token, which a response that was cut off gets for it.
    """
    longest = config.data.max_prompt_tokens + config.generation.max_tokens
    return longest if scores_steps(config) else longest + 1


def scored_steps(config: RunConfig, completion: str) -> list[Step]:
    """Return the steps of a response that the process reward model scores."""
    function = reward_model_of(config.reward.functions)
    assert function is not None, "the run has no process reward model"
    return split_steps(
        completion,
        function.parameters.get("split", "delimiter"),
        delimiter=function.parameters.get("delimiter", DELIMITER),
    )


def pool_functions(
    functions: Sequence[RewardFunctionConfig],
) -> tuple[RewardFunctionConfig, ...]:
    """Return the rewards that the reward pool computes."""
    return tuple(function for function in functions if function.name not in LEARNED)


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
    model = reward_model_of(functions)
    if model is not None:
        raise ValueError(
            f"reward.functions: {model.name!r} is a reward of RL training, and {command} starts "
            "no reward model. Leave it out, and name functions such as math."
        )
    known = set(available_reward_functions())
    for function in functions:
        if function.name in known and not reward_hooks(function.name).scores:
            raise ValueError(
                f"reward.functions: {function.name!r} rewards steps alone, which RL training "
                f"reads, and {command} reads the rewards of whole responses. Leave it out."
            )
