"""Dr. GRPO: no division by the standard deviation, none by the response's own length.

    python -m recipes.dr_grpo_math

Source: Liu et al. 2025 (arXiv:2503.20783). Everything else is that of `recipes.grpo_math`. Two mini-batches a rollout batch, so
that the second meets ratios other than 1.
"""

from recipes.grpo_math import grpo_math
from rlsys.config import RunConfig
from rlsys.config.hardware import Hardware
from rlsys.config.presets import PRESETS


def dr_grpo_math(hardware: Hardware) -> RunConfig:
    """The default of this machine."""
    default = grpo_math(hardware)
    return default.model_copy(
        update={
            "recipe": "dr_grpo_math",
            "algorithm": PRESETS["dr_grpo"],
            "policy": default.policy.model_copy(update={"mini_batches": 2}),
        }
    )


if __name__ == "__main__":
    from recipes.run_recipe import run_recipe

    run_recipe(dr_grpo_math)
