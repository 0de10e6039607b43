"""Rewards: registered functions of a response that return a number, or one with its reason."""

from rlsys.math_verifier import MathVerdict, verify_math
from rlsys.rewards.arithmetic import arithmetic_steps_reward
from rlsys.rewards.functions import (
    format_boxed_reward,
    format_r1_zero_reward,
    math_reward,
    repetition_reward,
    soft_overlong_reward,
)
from rlsys.rewards.ground_truths import ground_truth_notices
from rlsys.rewards.learned import (
    has_accuracy,
    model_reward,
    pool_functions,
    process_model_reward,
    refuse_rewards_of_training,
    reward_model_of,
    reward_model_role,
)
from rlsys.rewards.records import RewardInput, RewardResult
from rlsys.rewards.registry import (
    available_reward_functions,
    check_reward_function,
    get_reward_function,
    reads_metadata,
    register_reward_function,
    step_functions,
    with_token_limit,
)
from rlsys.rewards.steps import Step, split_steps

__all__ = [
    "MathVerdict",
    "RewardInput",
    "RewardResult",
    "Step",
    "arithmetic_steps_reward",
    "available_reward_functions",
    "check_reward_function",
    "format_boxed_reward",
    "format_r1_zero_reward",
    "get_reward_function",
    "ground_truth_notices",
    "has_accuracy",
    "math_reward",
    "model_reward",
    "pool_functions",
    "process_model_reward",
    "reads_metadata",
    "refuse_rewards_of_training",
    "register_reward_function",
    "repetition_reward",
    "reward_model_of",
    "reward_model_role",
    "soft_overlong_reward",
    "split_steps",
    "step_functions",
    "verify_math",
    "with_token_limit",
]
