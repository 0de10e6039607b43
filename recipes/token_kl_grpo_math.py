"""GRPO with the KL to the reference inside the advantage, token by token.

    python -m recipes.token_kl_grpo_math

Source: Bai and Zhang 2026, Token-Level KL-Regularized Policy Gradient and GRPO. Everything else is that of `recipes.grpo_math`. Two
mini-batches a rollout batch, so that the second meets ratios other than 1.
"""

from recipes.grpo_math import grpo_math
from rlsys.config import RunConfig
from rlsys.config.hardware import Hardware
from rlsys.config.presets import PRESETS


def token_kl_grpo_math(hardware: Hardware) -> RunConfig:
    """The default of this machine."""
    default = grpo_math(hardware)
    return default.model_copy(
        update={
            "recipe": "token_kl_grpo_math",
            "algorithm": PRESETS["token_kl_grpo"],
            "policy": default.policy.model_copy(update={"mini_batches": 2}),
        }
    )


if __name__ == "__main__":
    from recipes.run_recipe import run_recipe

    run_recipe(token_kl_grpo_math)
