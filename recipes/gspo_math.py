"""GSPO: one ratio a response, clipped in a narrow band.

    python -m recipes.gspo_math

Source: Zheng et al. 2025 (arXiv:2507.18071). Everything else is that of `recipes.grpo_math`. Two mini-batches a rollout batch, so
that the second meets ratios other than 1.
"""

from recipes.grpo_math import grpo_math
from rlsys.config import RunConfig
from rlsys.config.hardware import Hardware
from rlsys.config.presets import PRESETS


def gspo_math(hardware: Hardware) -> RunConfig:
    """The default of this machine."""
    default = grpo_math(hardware)
    return default.model_copy(
        update={
            "recipe": "gspo_math",
            "algorithm": PRESETS["gspo"],
            "policy": default.policy.model_copy(update={"mini_batches": 2}),
        }
    )


if __name__ == "__main__":
    from recipes.run_recipe import run_recipe

    run_recipe(gspo_math)
