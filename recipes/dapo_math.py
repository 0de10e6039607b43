"""DAPO: Clip-Higher, token-level loss, dynamic sampling and overlong shaping.

    python -m recipes.dapo_math

Source: Yu et al. 2025 (arXiv:2503.14476). No KL term. Everything else is that of `recipes.grpo_math`. Two mini-batches a rollout batch, so that the
second meets ratios other than 1.
"""

from recipes.grpo_math import grpo_math
from rlsys.config import RewardConfig, RewardFunctionConfig, RunConfig
from rlsys.config.hardware import Hardware
from rlsys.config.presets import PRESETS


def dapo_math(hardware: Hardware) -> RunConfig:
    """The default of this machine; the penalty for long responses grows over the last quarter of the token limit."""
    default = grpo_math(hardware)
    limit = default.generation.max_tokens
    overlong = RewardFunctionConfig(
        name="soft_overlong", parameters={"max_tokens": limit, "buffer_tokens": limit // 4}
    )
    return default.model_copy(
        update={
            "recipe": "dapo_math",
            "algorithm": PRESETS["dapo"],
            "reward": RewardConfig(functions=(RewardFunctionConfig(name="math"), overlong)),
            "policy": default.policy.model_copy(update={"mini_batches": 2}),
        }
    )


if __name__ == "__main__":
    from recipes.run_recipe import run_recipe

    run_recipe(dapo_math)
