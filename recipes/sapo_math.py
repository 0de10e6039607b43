"""SAPO: a soft gate on the token ratio in place of the clip.

    python -m recipes.sapo_math

Source: Gao et al. 2025 (arXiv:2511.20347). Everything else is that of `recipes.grpo_math`. Two mini-batches a rollout batch, so
that the second meets ratios other than 1.
"""

from recipes.grpo_math import grpo_math
from rlsys.config import RunConfig
from rlsys.config.hardware import Hardware
from rlsys.config.presets import PRESETS


def sapo_math(hardware: Hardware) -> RunConfig:
    """The default of this machine."""
    default = grpo_math(hardware)
    return default.model_copy(
        update={
            "recipe": "sapo_math",
            "algorithm": PRESETS["sapo"],
            "policy": default.policy.model_copy(update={"mini_batches": 2}),
        }
    )


if __name__ == "__main__":
    from recipes.run_recipe import run_recipe

    run_recipe(sapo_math)
